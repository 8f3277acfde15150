"""Names and prompts of the classes of labelled data sets.

The lists lie in class_names/, each with its source.
"""

import functools
import hashlib
import importlib.resources
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from clipmoe_jax.core.checks import read_bytes
from clipmoe_jax.core.errors import naming
from clipmoe_jax.core.json_files import read_json

OWN_NAMES = "none"
GENERIC_TEMPLATES = ("a photo of a {}.",)
TEMPLATES = {
    "imagenet": "imagenet",
    "imagenet-v2": "imagenet",
    "imagenet-o": "imagenet",
    "cifar10": "cifar",
    "cifar100": "cifar",
}
# First words of descriptions that "which is" and "which" come before; "which has" comes before others.
IS, VERBS = ("a", "an", "used"), ("is", "has", "often", "typically", "usually", "may", "can")


def class_table(name: str, labels: Iterable[str] = ()) -> dict[str, str]:
    """Returns {label: class name} of a data set, in the order of its class indices.

    Labels are the names of the data set's folders or files: WordNet ids of imagenet and imagenet-o (the
    200 classes of ImageNet that its images are taken for), "0" to "999" of imagenet-v2, names with
    underscores of cifar10 and cifar100. name "none": the labels given, sorted, are their own names.
    Raises ValueError for another name, for "none" without labels, and for labels that the table lacks.
    """
    labels = set(labels)
    if name == OWN_NAMES:
        if not labels:
            raise ValueError('classes="none" names classes by their labels: there are no labels')
        return {label: label for label in sorted(labels)}
    _check(name)
    imagenet = _read("imagenet.json")["names"]
    if name == "imagenet":
        table = imagenet
    elif name == "imagenet-v2":
        table = {str(i): class_name for i, class_name in enumerate(imagenet.values())}
    elif name == "imagenet-o":
        table = {wnid: imagenet[wnid] for wnid in _read("imagenet_o.json")["wnids"]}
    else:
        table = _read(f"{name}.json")["names"]
    if unknown := sorted(labels - table.keys()):
        raise ValueError(
            f"labels {unknown[:5]} are none of {name}'s, such as {list(table)[:3]}: "
            f'choose another table of {sorted(TEMPLATES)}, or "none" to take labels as names'
        )
    return dict(table)


def templates(name: str) -> tuple[str, ...]:
    """Returns sentences with {} in place of a class name, for a table of `class_table`: OpenAI's 80 for
    ImageNet, 18 for CIFAR, and a single one for "none"."""
    if name == OWN_NAMES:
        return GENERIC_TEMPLATES
    _check(name)
    return tuple(_read("templates.json")[TEMPLATES[name]])


def chosen_templates(given: str | Sequence[str]) -> tuple[str, ...]:
    """Returns sentences with {} in place of a class name, given as such or by the name of a table.

    Raises ValueError if there is none, or if a sentence has no {}.
    """
    tables = ""
    if isinstance(given, str):
        tables = f", or name one of the tables {', '.join(sorted(TEMPLATES))}"
        given = templates(given) if given in TEMPLATES else (given,)
    if not given:
        raise ValueError("templates are empty: give one or more")
    for sentence in given:
        if "{}" not in sentence:
            raise ValueError(f"template {sentence!r} has no {{}}: put it in place of the class name{tables}")
    return tuple(given)


def read_templates(file: str) -> tuple[str, ...]:
    """Returns the templates of a text file, one a line, with {} in place of a class name.

    Raises FileNotFoundError, and ValueError for a file that is not UTF-8, and as `chosen_templates`.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(f"templates={file} does not exist")
    with naming(f"templates={file}"):
        try:
            lines = read_bytes(file).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start}") from error
        return chosen_templates([line.strip() for line in lines if line.strip()])


def table_digest(name: str) -> str:
    """Returns a hash of a table of `class_table`, but "none", and of its templates."""
    described = json.dumps([list(class_table(name).items()), templates(name)])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def make_prompts(names: Sequence[str], sentences: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Returns each class name in each sentence, T = C·len(sentences) prompts, and the class of each, (T,)
    int."""
    prompts = [sentence.replace("{}", name) for name in names for sentence in sentences]
    return prompts, np.repeat(np.arange(len(names)), len(sentences))


def read_descriptions(file: str, table: Mapping[str, str]) -> tuple[list[str], np.ndarray]:
    """Returns the name of each class of a `class_table` with each of its descriptions, T prompts, and the
    class of each, (T,) int.

    file: JSON, {class name or label: ["two legs", "a red comb", …]}, as arXiv 2210.07183 publishes them. A
    description with {} has the name there; others follow it, "hen, which has two legs", with "is", "has" or
    no verb by their first word. Raises FileNotFoundError, and ValueError for a class without descriptions.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(f"descriptions={file} does not exist")
    content = read_json(pathlib.Path(file))
    prompts = []
    for label, name in table.items():
        descriptions = content.get(name, content.get(label))
        if not isinstance(descriptions, list) or not all(isinstance(one, str) for one in descriptions):
            raise ValueError(f"descriptions={file}: {name!r} must have a list of strings")
        if not descriptions:
            raise ValueError(f"descriptions={file}: {name!r} has none: give it one or more")
        prompts.append([_described(name, description) for description in descriptions])
    return list(itertools.chain(*prompts)), np.repeat(np.arange(len(prompts)), list(map(len, prompts)))


def _described(name: str, description: str) -> str:
    if "{}" in description:
        return description.replace("{}", name)
    first = description.partition(" ")[0].lower()
    verb = "is " if first in IS else "" if first in VERBS else "has "
    return f"{name}, which {verb}{description}"


def _check(name: str) -> None:
    if name not in TEMPLATES:
        raise ValueError(f"classes={name!r} is no table: choose one of {[*sorted(TEMPLATES), OWN_NAMES]}")


@functools.cache
def _read(file: str) -> Mapping[str, Any]:
    folder = importlib.resources.files("clipmoe_jax.evaluation") / "class_names"
    return json.loads((folder / file).read_text(encoding="utf-8"))
