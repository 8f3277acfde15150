"""The kinds of evaluation: what each opens, and how it measures a model on that.

Letters: N images, C classes, d embedding.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
from etils import epath

from clipmoe_jax.data.npy import load_arrays
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.sources.base import AttributeTable
from clipmoe_jax.evaluation import ood, probe
from clipmoe_jax.evaluation.caption_choice import (
    EXAMPLES,
    Choice,
    caption_accuracy,
    files_of,
    sugarcrepe_choices,
    sugarcrepe_tables,
    winoground_choices,
    winoground_scores,
)
from clipmoe_jax.evaluation.classes import (
    OWN_NAMES,
    class_table,
    make_prompts,
    read_descriptions,
    read_templates,
    templates,
)
from clipmoe_jax.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from clipmoe_jax.evaluation.data_sets import DataSets, Labelled, label_records
from clipmoe_jax.evaluation.gda import check_gda, gda
from clipmoe_jax.evaluation.groups import group_metrics, read_groups
from clipmoe_jax.evaluation.mmvp import MmvpPair, mmvp_accuracy, mmvp_files, mmvp_pairs
from clipmoe_jax.evaluation.precision import precision_metrics
from clipmoe_jax.evaluation.retrieval import retrieval_features, retrieval_recall
from clipmoe_jax.evaluation.subject import Subject
from clipmoe_jax.evaluation.zero_shot import (
    attribute_accuracy,
    class_embeddings,
    metrics_of_ranks,
    nearest_ranks,
)

Numbers = dict[str, float]


class NotApplicableError(ValueError):
    """The data is there and lacks what the evaluation is of: the evaluation is skipped, the others go on."""


class Data(Protocol):
    """The data of an evaluation, opened, for any number of models."""

    @property
    def chance(self) -> Numbers:
        """Returns the value of each metric that guessing reaches, where that is known."""
        ...

    def measure(self, subject: Subject) -> Numbers:
        """Returns {metric: value} of a model."""
        ...


class Kind(NamedTuple):
    """A row of KINDS.

    Attributes:
        open: reads what a line names. Raises FileNotFoundError or ValueError if that is not there or does not
            fit, and NotApplicableError.
        options: names of the options that a line may have.
        required: those that it must have.
        files: the files that a path names where it is no prepared data set.
    """

    open: Callable[[DataSets], Data]
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    files: Callable[[DataSets], Sequence[Path]] | None = None


@dataclasses.dataclass(frozen=True)
class _Retrieval:
    records: Records
    chance: Numbers = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, data: DataSets) -> "_Retrieval":
        return cls(data.records())

    def measure(self, subject: Subject) -> Numbers:
        features = retrieval_features(subject, self.records)
        return retrieval_recall(features.images, features.texts, features.image_of_text)


@dataclasses.dataclass(frozen=True)
class _ZeroShot:
    """prompts (T,) and the class of each, (T,) int. is_described: whether they are descriptions: a class then
    scores the mean of their similarities, else it is the unit mean of its prompts. groups: of each image, ()
    for none."""

    images: Labelled
    prompts: Sequence[str]
    class_of_prompt: np.ndarray
    is_described: bool = False
    groups: Sequence[str] = ()

    @classmethod
    def open(cls, data: DataSets) -> "_ZeroShot":
        table = _table(data)  # first: the labels of a slice are then not read again
        images = label_records(data.records(), data.labels(), table)
        described, own = data.options.get("descriptions"), data.options.get("templates")
        if described and own:
            raise ValueError("templates= and descriptions= both say what the prompts are: give one")
        if described:
            prompts = read_descriptions(described, table)
        else:
            sentences = read_templates(own) if own else templates(data.options.get("classes", OWN_NAMES))
            prompts = make_prompts(images.names, sentences)
        groups = []
        if named := data.options.get("groups"):
            groups = read_groups(named, [images.records[i]["id"] for i in range(len(images.records))])
        return cls(images, *prompts, bool(described), groups)

    @property
    def chance(self) -> Numbers:
        return _chance(self.images)

    def measure(self, subject: Subject) -> Numbers:
        features, labels = subject.images(self.images.records), self.images.labels
        ranks = nearest_ranks(features, self.class_embeddings(subject), labels)
        gaps = group_metrics(ranks < 1, self.groups) if self.groups else {}
        return metrics_of_ranks(ranks, labels) | gaps

    def class_embeddings(self, subject: Subject) -> np.ndarray:
        """Returns (C, d) float32, one for each class."""
        texts = subject.texts(self.prompts)
        return class_embeddings(texts, self.class_of_prompt, normalize=not self.is_described)


def _table(data: DataSets) -> dict[str, str]:
    """Returns {label: class name} of the whole split: the labels of a slice might be one alone."""
    return class_table(data.options.get("classes", OWN_NAMES), data.labels(whole=True))


def _chance(images: Labelled) -> Numbers:
    return {"top1": 1 / len(images.names)}


@dataclasses.dataclass(frozen=True)
class _Corrupted:
    zero_shot: _ZeroShot
    severities: Sequence[int]

    @classmethod
    def open(cls, data: DataSets) -> "_Corrupted":
        severities = SEVERITIES
        if given := data.options.get("severity"):
            if given not in map(str, SEVERITIES):
                raise ValueError(f"severity={given} must be one of {', '.join(map(str, SEVERITIES))}")
            severities = (int(given),)
        return cls(_ZeroShot.open(data), severities)

    @property
    def chance(self) -> Numbers:
        chance = 1 / len(self.zero_shot.images.names)
        return dict.fromkeys(["mean", *(corruption.__name__ for corruption in CORRUPTIONS)], chance)

    def measure(self, subject: Subject) -> Numbers:
        """Returns top1 of each corruption, mean over severities, and the mean over corruptions."""
        images, classes, numbers = self.zero_shot.images, self.zero_shot.class_embeddings(subject), {}
        for corruption in CORRUPTIONS:
            right = []
            for severity in self.severities:
                change = functools.partial(corrupt, corruption, severity)
                features = subject.changed_images(images.records, change)
                right.append(np.mean(nearest_ranks(features, classes, images.labels) < 1))
            numbers[corruption.__name__] = float(np.mean(right))
        return {"mean": float(np.mean(list(numbers.values())))} | numbers


@dataclasses.dataclass(frozen=True)
class _Precision:
    """classes: whose images are to be found by their prompts; None finds an image's captions by the image."""

    records: Records
    classes: _ZeroShot | None
    chance: Numbers = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, data: DataSets) -> "_Precision":
        return cls(data.records(), _ZeroShot.open(data) if "classes" in data.options else None)

    def measure(self, subject: Subject) -> Numbers:
        if self.classes is not None:
            queries, labels = self.classes.class_embeddings(subject), self.classes.images.labels
            images = subject.images(self.records)
            return precision_metrics(queries, images, np.arange(len(queries)), labels)
        features = retrieval_features(subject, self.records)
        image_ids = np.arange(len(features.images))
        return precision_metrics(features.images, features.texts, image_ids, features.image_of_text)


@dataclasses.dataclass(frozen=True)
class _OfFeatures:
    """A classifier of images by features of training images."""

    train: Labelled
    test: Labelled

    @classmethod
    def open(cls, data: DataSets) -> Self:
        """Opens training and test images, in the classes of the training images."""
        labels = data.labels("train")
        table = class_table(OWN_NAMES, labels)
        train = label_records(data.records("train"), labels, table)
        return cls(train, label_records(data.records(), data.labels(), table))

    @property
    def chance(self) -> Numbers:
        return _chance(self.train)

    def arrays(self, subject: Subject) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns features and labels of the training images, then of the test images."""
        train, test = subject.images(self.train.records), subject.images(self.test.records)
        return train, self.train.labels, test, self.test.labels


@dataclasses.dataclass(frozen=True)
class _LinearProbe(_OfFeatures):
    @classmethod
    def open(cls, data: DataSets) -> Self:
        opened = super().open(data)
        probe.check_linear_probe(opened.train.labels, len(opened.train.names))
        return opened

    def measure(self, subject: Subject) -> Numbers:
        return probe.linear_probe(*self.arrays(subject), len(self.train.names))[0]


@dataclasses.dataclass(frozen=True)
class _Neighbours(_OfFeatures):
    @classmethod
    def open(cls, data: DataSets) -> Self:
        opened = super().open(data)
        if len(opened.train.records) < probe.NEIGHBOURS:
            raise ValueError(
                f"{opened.train.records.path} has {len(opened.train.records)} images, and the "
                f"{probe.NEIGHBOURS} nearest vote: give more, or use linear_probe"
            )
        return opened

    def measure(self, subject: Subject) -> Numbers:
        return probe.knn(*self.arrays(subject), len(self.train.names))


@dataclasses.dataclass(frozen=True)
class _Gda:
    zero_shot: _ZeroShot
    train: Labelled

    @classmethod
    def open(cls, data: DataSets) -> "_Gda":
        zero_shot = _ZeroShot.open(data)
        train = label_records(data.records("train"), data.labels("train"), _table(data))
        check_gda(train.labels, len(train.names))
        return cls(zero_shot, train)

    @property
    def chance(self) -> Numbers:
        return self.zero_shot.chance

    def measure(self, subject: Subject) -> Numbers:
        train, test = (subject.images(images.records) for images in (self.train, self.zero_shot.images))
        classes = self.zero_shot.class_embeddings(subject)
        return gda(train, self.train.labels, test, self.zero_shot.images.labels, classes)


@dataclasses.dataclass(frozen=True)
class _Attributes:
    """labels: {attribute: (N,) int, indices into its values}."""

    records: Records
    table: AttributeTable
    labels: Mapping[str, np.ndarray]

    @classmethod
    def open(cls, data: DataSets) -> "_Attributes":
        records = data.records()
        if (table := records.attribute_table) is None:
            raise NotApplicableError(f"{records.path} has no attributes, as few data sets have")
        attributes = [records[i]["attributes"] for i in range(len(records))]
        labels = {
            name: np.array([attribute.values.index(of_one[name]) for of_one in attributes])
            for name, attribute in table.items()
        }
        return cls(records, table, labels)

    @property
    def chance(self) -> Numbers:
        return _with_mean({name: 1 / len(attribute.values) for name, attribute in self.table.items()})

    def measure(self, subject: Subject) -> Numbers:
        images = subject.images(self.records)
        return _with_mean(attribute_accuracy(images, self.labels, self.table, subject.texts))


def _with_mean(numbers: Numbers, name: str = "mean") -> Numbers:
    return numbers | {name: float(np.mean(list(numbers.values())))}


@dataclasses.dataclass(frozen=True)
class _Mmvp:
    pairs: Sequence[MmvpPair]
    chance: Numbers = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, data: DataSets) -> "_Mmvp":
        return cls(mmvp_pairs(data.path))

    def measure(self, subject: Subject) -> Numbers:
        images = subject.pictures([file for pair in self.pairs for file in pair.images])
        texts = subject.texts([prompt for pair in self.pairs for prompt in pair.prompts])
        images, texts = (features.reshape(len(self.pairs), 2, -1) for features in (images, texts))
        return mmvp_accuracy(images, texts, [pair.attribute for pair in self.pairs])


@dataclasses.dataclass(frozen=True)
class _CaptionChoice:
    choices: Sequence[Choice]

    def features(self, subject: Subject) -> tuple[np.ndarray, np.ndarray]:
        """Returns features of each example's images (N, images, d) and captions (N, 2, d)."""
        images = subject.pictures([image for choice in self.choices for image in choice.images])
        texts = subject.texts([caption for choice in self.choices for caption in choice.captions])
        images, texts = (
            features.reshape(len(self.choices), -1, features.shape[1]) for features in (images, texts)
        )
        return images, texts


@dataclasses.dataclass(frozen=True)
class _SugarCrepe(_CaptionChoice):
    @classmethod
    def open(cls, data: DataSets) -> "_SugarCrepe":
        return cls(sugarcrepe_choices(data.path, data.options["images"]))

    @classmethod
    def files(cls, data: DataSets) -> list[Path]:
        return [*sugarcrepe_tables(data.path), *files_of(cls.open(data).choices)]

    @property
    def chance(self) -> Numbers:
        return _with_mean({choice.part: 0.5 for choice in self.choices}, "average")

    def measure(self, subject: Subject) -> Numbers:
        return caption_accuracy(*self.features(subject), [choice.part for choice in self.choices])


@dataclasses.dataclass(frozen=True)
class _Winoground(_CaptionChoice):
    chance: Numbers = dataclasses.field(
        default_factory=lambda: {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
    )

    @classmethod
    def open(cls, data: DataSets) -> "_Winoground":
        return cls(winoground_choices(data.path))

    @classmethod
    def files(cls, data: DataSets) -> list[Path]:
        return [Path(data.path) / EXAMPLES, *files_of(cls.open(data).choices)]

    def measure(self, subject: Subject) -> Numbers:
        return winoground_scores(*self.features(subject))


@dataclasses.dataclass(frozen=True)
class _KnownAndUnknown:
    known: _ZeroShot
    unknown: Records
    train: Labelled | None
    classifier: Mapping[str, np.ndarray] | None
    chance: Numbers = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, data: DataSets) -> "_KnownAndUnknown":
        known, unknown, train, classifier = _ZeroShot.open(data), data.records("unknown"), None, None
        if "train" in data.options:
            train = label_records(data.records("train"), data.labels("train"), _table(data))
            probe.check_linear_probe(train.labels, len(train.names))
        if file := data.options.get("classifier"):
            if train is None:
                raise ValueError("COOkeD's ensemble has a linear probe: give train= beside classifier=")
            num_classes = len(known.images.names)
            shapes = {
                "known": (len(known.images.records), num_classes),
                "unknown": (len(unknown), num_classes),
            }
            classifier = load_arrays(epath.Path(file), shapes)
        return cls(known, unknown, train, classifier)

    def measure(self, subject: Subject) -> Numbers:
        features = {
            "known": subject.images(self.known.images.records),
            "unknown": subject.images(self.unknown),
        }
        classes = self.known.class_embeddings(subject)
        zero_shot = {part: ood.zero_shot_probabilities(array, classes) for part, array in features.items()}
        probabilities = {"zero_shot": zero_shot}
        if self.train is not None:
            train = subject.images(self.train.records)
            fitted = probe.fit_linear_probe(train, self.train.labels, len(self.train.names))
            probed = {part: fitted.probabilities(array) for part, array in features.items()}
            both = {part: (zero_shot[part] + probed[part]) / 2 for part in features}
            probabilities |= {"probe": probed, "zero_shot_and_probe": both}
            if self.classifier is not None:
                probabilities["cooked"] = {
                    part: ood.cooked_probabilities(self.classifier[part], probed[part], zero_shot[part])
                    for part in features
                }
        numbers = {}
        for name, of_part in probabilities.items():
            known, unknown = (ood.max_probability(of_part[part]) for part in ("known", "unknown"))
            detection = ood.detection_metrics(known, unknown)
            numbers |= {f"{name}_{metric}": value for metric, value in detection.items()}
        return numbers


KINDS = {
    "retrieval": Kind(_Retrieval.open, ("split",)),
    "precision": Kind(_Precision.open, ("split", "classes")),
    "zero_shot": Kind(_ZeroShot.open, ("split", "classes", "templates", "descriptions", "groups")),
    "corrupted": Kind(_Corrupted.open, ("split", "classes", "severity")),
    "linear_probe": Kind(_LinearProbe.open, ("split", "train", "train_split"), ("train",)),
    "knn": Kind(_Neighbours.open, ("split", "train", "train_split"), ("train",)),
    "gda": Kind(_Gda.open, ("split", "classes", "train", "train_split"), ("train",)),
    "attributes": Kind(_Attributes.open, ("split",)),
    "mmvp": Kind(_Mmvp.open, files=lambda data: mmvp_files(data.path)),
    "sugarcrepe": Kind(_SugarCrepe.open, ("images",), ("images",), _SugarCrepe.files),
    "winoground": Kind(_Winoground.open, files=_Winoground.files),
    "ood": Kind(
        _KnownAndUnknown.open,
        ("split", "classes", "unknown", "unknown_split", "train", "train_split", "classifier"),
        ("unknown",),
    ),
}
