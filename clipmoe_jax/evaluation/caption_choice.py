"""Choosing between captions that differ in a word or in the order of words: SugarCrepe and Winoground.

Letters: N examples, d embedding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipmoe_jax.core.json_files import field, parse_json, read_json
from clipmoe_jax.data.sources.base import read_text

EXAMPLES, IMAGES = "examples.jsonl", "images"  # of Winoground's folder
IMAGE_SUFFIXES = (".png", ".jpg")


class Choice(NamedTuple):
    """An example: two images and the caption of each, or one image, its caption and a wrong one. part: the
    name of SugarCrepe's file."""

    part: str
    images: tuple[Path, ...]
    captions: tuple[str, str]


def sugarcrepe_choices(path: str, images: str) -> list[Choice]:
    """Reads SugarCrepe's files (https://github.com/RAIVNLab/sugar-crepe): {number: {"filename", "caption",
    "negative_caption"}}.

    path: one JSON file, or the folder of all. images: the folder of COCO's val2017. Raises FileNotFoundError
    for what is not there, ValueError for other content and names that lead out of the folder.
    """
    choices = []
    for file in sugarcrepe_tables(path):
        for number, example in read_json(file).items():
            where = f"{file}: {number}"
            if not isinstance(example, dict):
                raise ValueError(f"{where} is not an object with filename, caption and negative_caption")
            name, *captions = (
                field(example, key, str, where) for key in ("filename", "caption", "negative_caption")
            )
            choices.append(Choice(file.stem, (_image(images, name, where),), tuple(captions)))
    return _checked(choices, path)


def sugarcrepe_tables(path: str) -> list[Path]:
    """Returns the JSON files that a path names. Raises FileNotFoundError if there is none."""
    files = sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path} is neither a JSON file of SugarCrepe nor a folder of them")
    return files


def winoground_choices(folder: str) -> list[Choice]:
    """Reads Winoground's folder (https://huggingface.co/datasets/facebook/winoground, `data` with its images
    unpacked): examples.jsonl with {"image_0", "image_1", "caption_0", "caption_1"}, and images/NAME.png.

    Raises as `sugarcrepe_choices`.
    """
    table, images = Path(folder) / EXAMPLES, Path(folder) / IMAGES
    if not table.is_file():
        raise FileNotFoundError(f"{table} does not exist: give the folder of Winoground's {EXAMPLES}")
    choices = []
    for number, line in enumerate(read_text(table).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{table}, line {number}"
        example = parse_json(line.encode(), where)
        names = [field(example, f"image_{i}", str, where) for i in (0, 1)]
        files = [_image(str(images), name, where) for name in names]
        captions = (field(example, "caption_0", str, where), field(example, "caption_1", str, where))
        choices.append(Choice("", (files[0], files[1]), captions))
    return _checked(choices, str(table))


def files_of(choices: Sequence[Choice]) -> list[Path]:
    """Returns the images of all examples, each once."""
    return list(dict.fromkeys(image for choice in choices for image in choice.images))


def caption_accuracy(
    image_features: np.ndarray, text_features: np.ndarray, parts: Sequence[str]
) -> dict[str, float]:
    """Returns {part: share of its images whose own caption scores higher, …, "average": the mean over parts},
    as SugarCrepe does (arXiv 2306.14610). Equal is wrong.

    image_features (N, 1, d), text_features (N, 2, d) float32, the own caption first; parts (N,).
    """
    scores = _scores(image_features, text_features)[:, 0]
    return share_by_part(scores[:, 0] > scores[:, 1], parts)


def share_by_part(right: np.ndarray, parts: Sequence[str]) -> dict[str, float]:
    """Returns {part: share of its examples that are right, …, "average": the mean over parts}. right (N,)
    bool, parts (N,)."""
    of_part = np.asarray(parts)
    shares = {part: float(right[of_part == part].mean()) for part in dict.fromkeys(parts)}
    return shares | {"average": float(np.mean(list(shares.values())))}


def captions_find_images(scores: np.ndarray) -> np.ndarray:
    """Returns bool (N,): whether both captions score higher with their own image; equal is wrong. scores
    (N, 2 images, 2 captions), own ones on the diagonal."""
    return (scores[:, 0, 0] > scores[:, 1, 0]) & (scores[:, 1, 1] > scores[:, 0, 1])


def winoground_scores(image_features: np.ndarray, text_features: np.ndarray) -> dict[str, float]:
    """Returns Winoground's text, image and group scores (arXiv 2204.03162): the shares of examples of which
    each image has its own caption above the other, each caption its own image, and both. Equal is wrong.

    image_features, text_features (N, 2, d) float32, those of an example in the same order.
    """
    scores = _scores(image_features, text_features)
    image, text = captions_find_images(scores), captions_find_images(scores.swapaxes(1, 2))
    found = {"text": text, "image": image, "group": text & image}
    return {name: float(right.mean()) for name, right in found.items()}


def _scores(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """Returns the similarity of each image and each caption of an example, (N, images, captions)."""
    scores = np.einsum("nid,ntd->nit", image_features, text_features)
    if not np.isfinite(scores).all():
        raise ValueError("caption choice: some features are not finite")
    return scores


def _image(folder: str, name: str, where: str) -> Path:
    """Returns the image of a name in a folder, which may lack its ending."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: {name!r} leads out of {folder}")
    plain = Path(folder) / name
    found = [plain, *(plain.with_name(plain.name + suffix) for suffix in IMAGE_SUFFIXES)]
    return next((file for file in found if file.is_file()), plain)


def _checked(choices: list[Choice], path: str) -> list[Choice]:
    """Returns the examples if there are some and their images are there."""
    if not choices:
        raise ValueError(f"{path} has no example")
    if missing := [file for file in files_of(choices) if not file.is_file()]:
        raise FileNotFoundError(f"{len(missing)} images of {path} do not exist, the first {missing[0]}")
    return choices
