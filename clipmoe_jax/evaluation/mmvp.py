"""MMVP-VLM: pairs of images that differ in one visual pattern, and a statement for each (arXiv 2401.06209).

Letters: P pairs, d embedding.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipmoe_jax.data.sources.base import read_text
from clipmoe_jax.evaluation.caption_choice import captions_find_images, share_by_part

TABLE = "Questions.csv"
MOST_ROWS = 10_000  # it has 270
COLUMNS = ("Question ID", "Type", "Statement")
# The data set as it is published, and as its README has it.
IMAGE_FOLDERS = ("MLLM_VLM Images", "MMVP_VLM_Images")
PROMPT = "a photo of {}"


class MmvpPair(NamedTuple):
    """Two images and the prompt that is true of each; attribute is the visual pattern they differ in."""

    attribute: str
    images: tuple[Path, Path]
    prompts: tuple[str, str]


def mmvp_pairs(folder: str) -> list[MmvpPair]:
    """Reads the pairs of a folder with Questions.csv and MLLM_VLM Images/TYPE/ID.jpg, as it is published
    (https://huggingface.co/datasets/MMVP/MMVP_VLM).

    Rows that follow each other are a pair. Raises FileNotFoundError for a file that is not there and
    ValueError for rows that are no pair.
    """
    root = Path(folder)
    table = root / TABLE
    if not table.is_file():
        raise FileNotFoundError(f"{table} does not exist: give the folder of MMVP_VLM's {TABLE}")
    images = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    if images is None:
        raise FileNotFoundError(f"{root} has no folder {IMAGE_FOLDERS[0]!r}: MMVP_VLM's images belong there")
    rows = _read_rows(table)
    pairs = []
    for (first, kind, statement), (second, other_kind, other_statement) in zip(
        rows[::2], rows[1::2], strict=True
    ):
        if kind in (".", "..") or "/" in kind:
            raise ValueError(f"{table}: the Type {kind!r} names no folder of {images}")
        if kind != other_kind or not first.isdecimal() or not second.isdecimal() or first == second:
            raise ValueError(
                f"{table}: rows {first!r} ({kind}) and {second!r} ({other_kind}) are no pair: two numbers of "
                "one Type must follow each other"
            )
        paths = (images / kind / f"{first}.jpg", images / kind / f"{second}.jpg")
        prompts = (PROMPT.format(statement), PROMPT.format(other_statement))
        pairs.append(MmvpPair(kind, paths, prompts))
    if missing := [path for pair in pairs for path in pair.images if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {2 * len(pairs)} images of {table} do not exist, the first {missing[0]}"
        )
    return pairs


def mmvp_files(folder: str) -> list[Path]:
    """Returns the files that a folder's pairs are in, each once. Raises as `mmvp_pairs`."""
    images = (path for pair in mmvp_pairs(folder) for path in pair.images)
    return [Path(folder) / TABLE, *dict.fromkeys(images)]


def mmvp_accuracy(
    image_features: np.ndarray, text_features: np.ndarray, attribute_of_pair: Sequence[str]
) -> dict[str, float]:
    """Returns {attribute: share of its pairs that are right, …, "average": the mean over attributes}.

    image_features, text_features (P, 2, d) float32, those of each pair in the order of `MmvpPair`, compared
    by inner product; attribute_of_pair (P,). A pair is right if each prompt scores higher with its own image
    than with the other one, as in scripts/evaluate_vlm.py of https://github.com/tsb0601/MMVP; equal is wrong.
    Raises ValueError for features of other shapes or not finite.
    """
    expected = (len(attribute_of_pair), 2)
    for name, features in (("image", image_features), ("text", text_features)):
        if features.ndim != 3 or features.shape[:2] != expected:
            raise ValueError(f"MMVP: {name} features have shape {features.shape}, not {expected} and d")
        if not np.isfinite(features).all():
            raise ValueError(f"MMVP: some {name} features are not finite")
    scores = np.einsum("pid,ptd->pit", image_features, text_features)
    return share_by_part(captions_find_images(scores), attribute_of_pair)


def _read_rows(table: Path) -> list[list[str]]:
    """Returns (question id, type, statement) of each row."""
    try:
        table_rows = list(csv.reader(io.StringIO(read_text(table))))
    except csv.Error as error:
        raise ValueError(f"{table} is no table: {error}") from error
    rows = [[cell.strip() for cell in row] for row in table_rows if any(row)][1:]  # after the header
    if wrong := [row for row in rows if len(row) != len(COLUMNS)]:
        raise ValueError(f"{table}: the row {wrong[0]} is not {', '.join(COLUMNS)}")
    # A quote that is not closed takes in the rows after it.
    if open_rows := [row for row in rows if any("\n" in cell for cell in row)]:
        raise ValueError(f"{table}: a quote in the row {open_rows[0][0]!r} is not closed")
    if len(rows) > MOST_ROWS:
        raise ValueError(f"{table} has {len(rows):,} rows, of which {MOST_ROWS:,} may be read")
    if not rows or len(rows) % 2:
        raise ValueError(f"{table} has {len(rows)} rows, which are not pairs")
    return rows
