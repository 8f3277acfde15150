"""The prepared data sets that an evaluation names, and their labels: an image's only caption is its label.

Letters: N images, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from clipmoe_jax.data.records import Records


class DataSets:
    """The data sets that an evaluation's path and options name, each opened once and its labels read once.

    Attributes:
        path: of the evaluation.
        options: of the evaluation, without defaults.
    """

    def __init__(self, path: str, options: Mapping[str, str]):
        self.path, self.options = path, options
        self._records: dict[tuple[str, str], Records] = {}  # by path and split, as the labels
        self._labels: dict[tuple[str, str], list[str]] = {}

    def records(self, option: str = "", *, whole: bool = False) -> Records:
        """Returns the data set of the path, or of an option; whole: of a slice, all of its split."""
        key = self._key(option, whole)
        if key not in self._records:
            self._records[key] = Records(*key)
        return self._records[key]

    def labels(self, option: str = "", *, whole: bool = False) -> list[str]:
        """Returns the labels of `records(option, whole=whole)`. Raises ValueError as `read_labels`."""
        key, whole_key = self._key(option, whole), self._key(option, True)
        if key not in self._labels:
            if whole_key in self._labels:
                return self.records(option).take(self._labels[whole_key])
            self._labels[key] = read_labels(self.records(option, whole=whole))
        return self._labels[key]

    def _key(self, option: str, whole: bool) -> tuple[str, str]:
        split = self.options.get(f"{option}_split" if option else "split", "")
        path = self.options[option] if option else self.path
        return path, split.partition("[")[0] if whole else split


class Labelled(NamedTuple):
    """A data set with the class of each image.

    Attributes:
        records: the images.
        labels: (N,) int, indices into `names`.
        names: of the C classes.
    """

    records: Records
    labels: np.ndarray
    names: list[str]


def read_labels(records: Records) -> list[str]:
    """Returns the label of each image, its only caption. Raises ValueError if an image has several."""
    captions = [records[i]["captions"] for i in range(len(records))]
    for i, of_one in enumerate(captions):
        if len(of_one) != 1:
            raise ValueError(
                f"record {i} of {records.path} has {len(of_one)} captions, and labelled images have one, "
                "their label: prepare them from a source such as classes:DIR"
            )
    return [of_one[0] for of_one in captions]


def label_records(records: Records, labels: Sequence[str], table: Mapping[str, str]) -> Labelled:
    """Returns the data set with its labels as places in a table, {label: class name}. Raises ValueError for
    labels that the table lacks."""
    if unknown := sorted(set(labels) - table.keys()):
        raise ValueError(f"{records.path} has labels that are no classes: {', '.join(unknown[:5])}")
    place = {label: i for i, label in enumerate(table)}
    return Labelled(records, np.array([place[label] for label in labels]), list(table.values()))
