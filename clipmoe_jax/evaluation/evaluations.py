"""What a model can be evaluated on, each in one line: KIND:PATH?option=value&option=value.

    retrieval:data/coco_test                                  a prepared data set, all captions of each image
    zero_shot:data/imagenet?classes=imagenet                  labelled images: `prepare --source=classes:DIR`
    linear_probe:data/cifar10_test?train=data/cifar10_train   logistic regression on frozen features
    knn:data/cifar10_test?train=data/cifar10_train            the vote of the 20 nearest training images
    mmvp:MMVP_VLM                                             the folder with Questions.csv, as published
    ood:data/imagenet?unknown=data/imagenet_o&classes=imagenet&train=data/imagenet_train

`split` (of `unknown` and `train`: unknown_split, train_split) may be left out where there is only one.
`classes` is a table of `classes.class_table`; "none", the default, takes the split's labels as names. `ood`
scores known against unknown images by zero-shot probabilities, with `train` also by a linear probe and by
both, and with `classifier=FILE.npz` (probabilities "known" (N, C) and "unknown" (M, C) of a network that
knows these classes alone, sorted as the table) by COOkeD's ensemble of all three.

Letters: N images, M unknown images, C classes, d embedding.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import parse_qsl

import numpy as np
from etils import epath

from clipmoe_jax.data.records import Records
from clipmoe_jax.evaluation import ood, probe
from clipmoe_jax.evaluation.classes import OWN_NAMES, class_table, make_prompts, templates
from clipmoe_jax.evaluation.mmvp import mmvp_accuracy, mmvp_pairs
from clipmoe_jax.evaluation.retrieval import retrieval_recall
from clipmoe_jax.evaluation.subject import Subject
from clipmoe_jax.evaluation.zero_shot import class_embeddings, classification_metrics

Numbers = dict[str, float]


class Kind(NamedTuple):
    """open: reads what an evaluation's line names and raises if it is not there; what it returns goes to
    measure with a model. options: that a line may have; required: that it must."""

    open: Callable[["Evaluation"], object]
    measure: Callable[[Subject, object], Numbers]
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A line, taken apart. Its data is opened once."""

    line: str
    kind: str
    path: str
    options: Mapping[str, str]

    @functools.cached_property
    def data(self) -> object:
        """What the line names. Raises FileNotFoundError or ValueError if it is not there or does not fit."""
        try:
            return KINDS[self.kind].open(self)
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"evaluation {self.line}: {error}") from error

    def measure(self, subject: Subject) -> Numbers:
        """{metric: value} of a model."""
        return KINDS[self.kind].measure(subject, self.data)

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """{"path" or option: fingerprint} of the prepared data sets that the line names."""
        found = {name: self.records(name) for name in ("train", "unknown") if name in self.options}
        if self.kind != "mmvp":
            found["path"] = self.records()
        return {name: records.fingerprint for name, records in found.items()}

    def records(self, option: str = "", *, whole: bool = False) -> Records:
        """The prepared data set of the path or of an option; whole: of a slice, all of its split."""
        split = self.options.get(f"{option}_split" if option else "split", "")
        path = self.options[option] if option else self.path
        return Records(path, split.partition("[")[0] if whole else split)


def parse_evaluation(line: str) -> Evaluation:
    """Takes a line apart. Raises ValueError naming what it does not know."""
    kind, colon, rest = line.partition(":")
    path, _, query = rest.partition("?")
    if not colon or not path or kind not in KINDS:
        raise ValueError(
            f"evaluation {line!r} is not KIND:PATH: choose a kind of {', '.join(KINDS)}, such as "
            "retrieval:data/coco_test"
        )
    try:  # a plus is one, as in the path
        options = dict(parse_qsl(query.replace("+", "%2B"), strict_parsing=bool(query)))
    except ValueError:
        raise ValueError(f"evaluation {line!r}: options are written ?name=value&name=value") from None
    known = KINDS[kind]
    if unknown := options.keys() - set(known.options):
        raise ValueError(
            f"evaluation {line!r}: no option {', '.join(sorted(unknown))}; {kind} has "
            f"{', '.join(known.options) or 'none'}"
        )
    if missing := set(known.required) - options.keys():
        raise ValueError(f"evaluation {line!r}: {', '.join(sorted(missing))}= must be given")
    return Evaluation(line, kind, path, options)


class _Labelled(NamedTuple):
    """records: labelled images. labels (N,) int: places in the table. names: of its classes."""

    records: Records
    labels: np.ndarray
    names: list[str]
    templates: Sequence[str]


def _open_labelled(evaluation: Evaluation, records: Records, table: Mapping[str, str]) -> _Labelled:
    place = {label: i for i, label in enumerate(table)}
    found = _labels(records)
    if unknown := sorted(set(found) - place.keys()):
        raise ValueError(f"{records.path} has labels that are no classes: {', '.join(unknown[:5])}")
    classes = evaluation.options.get("classes", OWN_NAMES)
    return _Labelled(
        records, np.array([place[label] for label in found]), list(table.values()), templates(classes)
    )


def _labels(records: Records) -> list[str]:
    """The label of each image: its only caption. Raises ValueError where there are several."""
    labels = [records[i]["captions"] for i in range(len(records))]
    if several := [i for i, of_one in enumerate(labels) if len(of_one) != 1]:
        raise ValueError(
            f"record {several[0]} of {records.path} has {len(labels[several[0]])} captions, and labelled "
            "images have one, their label: prepare them with --source=classes:DIR"
        )
    return [of_one[0] for of_one in labels]


def _open_zero_shot(evaluation: Evaluation) -> _Labelled:
    return _open_labelled(evaluation, evaluation.records(), _table(evaluation))


def _table(evaluation: Evaluation) -> dict[str, str]:
    """The classes; a slice's labels alone might be one."""
    labels = _labels(evaluation.records(whole=True))
    return class_table(evaluation.options.get("classes", OWN_NAMES), labels)


def _zero_shot(subject: Subject, data: _Labelled) -> Numbers:
    classes = _class_embeddings(subject, data)
    return classification_metrics(subject.images(data.records), classes, data.labels)


def _class_embeddings(subject: Subject, data: _Labelled) -> np.ndarray:
    prompts, class_of_prompt = make_prompts(data.names, data.templates)
    return class_embeddings(subject.texts(prompts), class_of_prompt)


def _open_trained(evaluation: Evaluation) -> tuple[_Labelled, _Labelled]:
    """Training and test images, in the classes of the training images."""
    train, test = evaluation.records("train"), evaluation.records()
    table = class_table(OWN_NAMES, _labels(train))
    return _open_labelled(evaluation, train, table), _open_labelled(evaluation, test, table)


def _linear_probe(subject: Subject, data: tuple[_Labelled, _Labelled]) -> Numbers:
    return probe.linear_probe(*_features(subject, data), len(data[0].names))[0]


def _open_knn(evaluation: Evaluation) -> tuple[_Labelled, _Labelled]:
    train, test = _open_trained(evaluation)
    if len(train.records) < probe.NEIGHBOURS:
        raise ValueError(
            f"{train.records.path} has {len(train.records)} images, and the {probe.NEIGHBOURS} nearest vote: "
            "give more, or use linear_probe"
        )
    return train, test


def _knn(subject: Subject, data: tuple[_Labelled, _Labelled]) -> Numbers:
    return probe.knn(*_features(subject, data), len(data[0].names))


def _features(subject: Subject, data: Sequence[_Labelled]) -> list[np.ndarray]:
    """Features and labels of each, one after the other."""
    return [array for part in data for array in (subject.images(part.records), part.labels)]


def _open_retrieval(evaluation: Evaluation) -> Records:
    return evaluation.records()


def _retrieval(subject: Subject, records: Records) -> Numbers:
    texts, image_of_text = subject.captions(records)
    return retrieval_recall(subject.images(records), texts, image_of_text)


def _open_mmvp(evaluation: Evaluation) -> list:
    return mmvp_pairs(evaluation.path)


def _mmvp(subject: Subject, pairs: list) -> Numbers:
    images = subject.pictures([file for pair in pairs for file in pair.images])
    texts = subject.texts([prompt for pair in pairs for prompt in pair.prompts])
    by_pair = [features.reshape(len(pairs), 2, -1) for features in (images, texts)]
    return mmvp_accuracy(*by_pair, [pair.attribute for pair in pairs])


class _KnownAndUnknown(NamedTuple):
    known: _Labelled
    unknown: Records
    train: _Labelled | None
    classifier: dict[str, np.ndarray] | None


def _open_ood(evaluation: Evaluation) -> _KnownAndUnknown:
    known, unknown, train, classifier = _open_zero_shot(evaluation), evaluation.records("unknown"), None, None
    if "train" in evaluation.options:
        train = _open_labelled(evaluation, evaluation.records("train"), _table(evaluation))
    if file := evaluation.options.get("classifier"):
        if train is None:
            raise ValueError("COOkeD's ensemble has a linear probe: give train= beside classifier=")
        with epath.Path(file).open("rb") as opened:
            classifier = dict(np.load(opened))
        shapes = {"known": len(known.records), "unknown": len(unknown)}
        for name, rows in shapes.items():
            expected = (rows, len(known.names))
            if name not in classifier or classifier[name].shape != expected:
                raise ValueError(f"{file} must have an array {name!r} of probabilities {expected}")
    return _KnownAndUnknown(known, unknown, train, classifier)


def _ood(subject: Subject, data: _KnownAndUnknown) -> Numbers:
    features = {"known": subject.images(data.known.records), "unknown": subject.images(data.unknown)}
    classes = _class_embeddings(subject, data.known)
    zero_shot = {name: ood.zero_shot_probabilities(found, classes) for name, found in features.items()}
    probabilities = {"zero_shot": zero_shot}
    if data.train is not None:
        fitted = probe.fit_linear_probe(*_features(subject, [data.train]), len(data.train.names))
        probed = {name: fitted.probabilities(found) for name, found in features.items()}
        both = {name: (zero_shot[name] + probed[name]) / 2 for name in features}
        probabilities |= {"probe": probed, "zero_shot_and_probe": both}
        if data.classifier is not None:
            probabilities["cooked"] = {
                name: ood.cooked_probabilities(data.classifier[name], probed[name], zero_shot[name])
                for name in features
            }
    numbers = {}
    for name, found in probabilities.items():
        scores = (ood.max_probability(found[part]) for part in ("known", "unknown"))
        numbers |= {f"{name}_{metric}": v for metric, v in ood.detection_metrics(*scores).items()}
    return numbers


KINDS = {
    "retrieval": Kind(_open_retrieval, _retrieval, ("split",)),
    "zero_shot": Kind(_open_zero_shot, _zero_shot, ("split", "classes")),
    "linear_probe": Kind(_open_trained, _linear_probe, ("split", "train", "train_split"), ("train",)),
    "knn": Kind(_open_knn, _knn, ("split", "train", "train_split"), ("train",)),
    "mmvp": Kind(_open_mmvp, _mmvp),
    "ood": Kind(
        _open_ood,
        _ood,
        ("split", "classes", "unknown", "unknown_split", "train", "train_split", "classifier"),
        ("unknown",),
    ),
}
