"""Evaluations of a model, each in one line: KIND:PATH?option=value&option=value.

    retrieval:data/coco_test                                  a prepared data set, all captions of each image
    precision:data/imagenet?classes=imagenet                  several right answers: a class's images
    zero_shot:data/imagenet?classes=imagenet                  labelled images, prepared from classes:DIR
    corrupted:data/imagenet?classes=imagenet                  zero-shot on corrupted images
    linear_probe:data/cifar10_test?train=data/cifar10_train   logistic regression on frozen features
    knn:data/cifar10_test?train=data/cifar10_train            the vote of the 20 nearest training images
    gda:data/cifar10_test?train=data/cifar10_train            Gaussians of training features, with zero-shot
    attributes:data/scenes_test                               zero-shot for each attribute of a data set
    mmvp:MMVP_VLM                                             the folder with Questions.csv, as published
    sugarcrepe:sugar-crepe/data?images=val2017                the own caption against one that is wrong
    winoground:winoground/data                                two images, two captions of the same words
    ood:data/imagenet?unknown=data/imagenet_o&classes=imagenet&train=data/imagenet_train

`split` (of `unknown` and `train`: unknown_split, train_split) may be left out where there is only one.
`classes` is a table of `classes.class_table`; "none", the default, takes the split's labels as names.
`templates=FILE` of `zero_shot` has prompts of one's own (`classes.read_templates`).
`descriptions=FILE.json` of `zero_shot` has descriptions in place of templates (`classes.read_descriptions`).
`groups=FILE.csv#COLUMN` adds the gap between groups of images (`groups.read_groups`).
`ood` scores known against unknown images by zero-shot probabilities, with `train` also by a linear probe and
by both, and with `classifier=FILE.npz` (probabilities "known" (N, C) and "unknown" (M, C) of a network that
knows these classes alone, sorted as the table) by COOkeD's ensemble of all three.

Letters: N known images, M unknown images, C classes.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence

from clipmoe_jax.core import stamps
from clipmoe_jax.data.sources.options import parse_options
from clipmoe_jax.evaluation.classes import OWN_NAMES, table_digest
from clipmoe_jax.evaluation.data_sets import DataSets
from clipmoe_jax.evaluation.kinds import KINDS, Data, NotApplicableError, Numbers
from clipmoe_jax.evaluation.subject import Subject

PATH_OPTIONS = ("train", "unknown", "classifier", "templates", "descriptions", "groups", "images")

__all__ = ["KINDS", "Evaluation", "NotApplicableError", "open_applicable", "parse_evaluation"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A line, taken apart."""

    line: str
    kind: str
    path: str
    options: Mapping[str, str]

    @functools.cached_property
    def data(self) -> Data:
        """Returns the data that the line names, opened once.

        Raises:
            FileNotFoundError: a file or data set is not there.
            NotApplicableError: the data lacks what the evaluation is of.
            ValueError: the data does not fit.
        """
        with self.naming_line():
            return KINDS[self.kind].open(self._data_sets)

    @contextlib.contextmanager
    def naming_line(self) -> Iterator[None]:
        """Errors inside say which evaluation they are of."""
        try:
            yield
        except (FileNotFoundError, ValueError) as error:
            kinds = (FileNotFoundError, NotApplicableError, ValueError)
            kind = next(kind for kind in kinds if isinstance(error, kind))
            raise kind(f"evaluation {self.line}: {error}") from error

    def measure(self, subject: Subject) -> Numbers:
        """Returns {metric: value} of a model."""
        return self.data.measure(subject)

    @property
    def chance(self) -> Numbers:
        """Returns {metric: value that guessing reaches}, of the metrics for which it is known."""
        return self.data.chance

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """Returns {"path" or option: a hash of the data, the files or the class names that it names}."""
        options = [name for name in ("train", "unknown") if name in self.options]
        hashes = {name: self._data_sets.records(name).fingerprint for name in options}
        if files := KINDS[self.kind].files:
            hashes["path"] = stamps.digest(*files(self._data_sets))
        else:
            hashes["path"] = self._data_sets.records().fingerprint
        if (table := self.options.get("classes", OWN_NAMES)) != OWN_NAMES:
            hashes["classes"] = table_digest(table)
        for name in ("classifier", "templates", "descriptions", "groups"):
            if file := self.options.get(name):
                hashes[name] = stamps.digest(file.rpartition("#")[0] if name == "groups" else file)
        return hashes

    @functools.cached_property
    def _data_sets(self) -> DataSets:
        return DataSets(self.path, self.options)


def parse_evaluation(line: str) -> Evaluation:
    """Takes a line apart. Raises ValueError naming what it does not know."""
    kind, colon, rest = line.partition(":")
    path, _, query = rest.partition("?")
    if not colon or not path or kind not in KINDS:
        raise ValueError(
            f"evaluation {line!r} is not KIND:PATH: choose a kind of {', '.join(KINDS)}, such as "
            "retrieval:data/coco_test"
        )
    try:
        options = parse_options(query)
    except ValueError as error:
        raise ValueError(f"evaluation {line!r}: {error}") from None
    known = KINDS[kind]
    if unknown := options.keys() - set(known.options):
        raise ValueError(
            f"evaluation {line!r}: no option {', '.join(sorted(unknown))}; {kind} has "
            f"{', '.join(known.options) or 'none'}"
        )
    if missing := set(known.required) - options.keys():
        raise ValueError(f"evaluation {line!r}: {', '.join(sorted(missing))}= must be given")
    named = {name: os.path.expanduser(value) for name, value in options.items() if name in PATH_OPTIONS}
    return Evaluation(line, kind, os.path.expanduser(path), options | named)


def open_applicable(evaluations: Sequence[Evaluation]) -> tuple[list[Evaluation], list[str]]:
    """Opens the data of evaluations.

    Returns those that apply to their data, and for each of the others the reason.
    """
    applicable, reasons = [], []
    for evaluation in evaluations:
        try:
            _ = evaluation.data
        except NotApplicableError as error:
            reasons.append(str(error))
        else:
            applicable.append(evaluation)
    return applicable, reasons
