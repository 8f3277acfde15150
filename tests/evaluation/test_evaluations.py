"""Evaluations by their lines, on prepared data sets, with a tiny model."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from grids import exhaustive
from PIL import Image

from clipmoe_jax import evaluate
from clipmoe_jax.data.loader import DecodedPairs
from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.sources import open_source
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation import classes, corruptions, data_sets, kinds, ood, probe
from clipmoe_jax.evaluation.captions import read_captions
from clipmoe_jax.evaluation.encoder import Encoder
from clipmoe_jax.evaluation.evaluations import NotApplicableError, parse_evaluation
from clipmoe_jax.evaluation.gda import gda
from clipmoe_jax.evaluation.mmvp import mmvp_accuracy
from clipmoe_jax.evaluation.precision import precision_metrics
from clipmoe_jax.evaluation.retrieval import retrieval_features, retrieval_recall
from clipmoe_jax.evaluation.subject import EnsembleSubject, ModelSubject
from clipmoe_jax.evaluation.zero_shot import class_embeddings, classification_metrics
from clipmoe_jax.models.model_folder import save_model

COLOURS = {"red": (200, 40, 40), "sea_green": (40, 180, 120), "blue": (40, 40, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train and test: images of three colours, in a folder each, prepared; odd: noise; captions; MMVP's
    layout. The classes' order is that of their labels: blue, red, sea_green."""
    root = tmp_path_factory.mktemp("evaluations")
    rng = np.random.default_rng(0)

    def draw(path, colour):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(np.array(colour) + rng.normal(0, 60, (40, 36, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path)

    for split, count in (("train", 8), ("test", 3)):
        for name, colour in COLOURS.items():
            for i in range(count):
                draw(root / split / name / f"{i}.png", colour)
    for i in range(5):
        draw(root / "odd" / "noise" / f"{i}.png", rng.integers(0, 256, 3))
    for name in ("train", "test", "odd"):
        prepare(open_source(f"classes:{root / name}"), str(root / f"{name}_set"))
    for i, (name, colour) in enumerate(COLOURS.items()):
        draw(root / "captioned" / f"{i}.png", colour)
        (root / "captioned" / f"{i}.txt").write_text(f"a {name} square\nsomething {name}\n")
    prepare(open_source(f"folder:{root / 'captioned'}"), str(root / "captioned_set"))
    prepare(open_source("digit_scenes:test?pairs=24"), str(root / "attributes_set"))
    rows = ["Question ID,Type,Statement"]
    for i, name in enumerate(["red", "blue", "blue", "sea_green"]):
        kind = ("Colour", "Shade")[i // 2]
        draw(root / "mmvp" / "MLLM_VLM Images" / kind / f"{i + 1}.jpg", COLOURS[name])
        rows.append(f"{i + 1},{kind},a {name} square")
    (root / "mmvp" / "Questions.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def subject(trained):
    return ModelSubject(Encoder(trained.model, trained.params, trained.mesh, 4), Tokenizer(64), 32)


def images_of(root, name):
    """Features by another way, and labels: through the files themselves, in the order of their ids."""
    files = sorted((root / name).rglob("*.png"))
    pixels = np.stack([preprocess_image(file.read_bytes(), 32) for file in files])
    return pixels, [sorted(COLOURS).index(file.parent.name) if name != "odd" else -1 for file in files]


def test_zero_shot_is_classification_by_prompts(folder, subject):
    numbers = parse_evaluation(f"zero_shot:{folder}/test_set").measure(subject)
    pixels, labels = images_of(folder, "test")
    texts = subject.texts([f"a photo of a {name}." for name in sorted(COLOURS)])
    expected = classification_metrics(
        subject.encoder.images(pixels), class_embeddings(texts, range(3)), labels
    )
    assert numbers == pytest.approx(expected) and numbers["top5"] == 1.0


def test_zero_shot_takes_templates_of_a_file(folder, subject, tmp_path):
    (file := tmp_path / "own.txt").write_text("\ufeffa {} tile\r\n\n  {}, {} everywhere\n", encoding="utf-8")
    evaluation = parse_evaluation(f"zero_shot:{folder}/test_set?templates={file}")
    names = sorted(COLOURS)
    prompts = [prompt for name in names for prompt in (f"a {name} tile", f"{name}, {name} everywhere")]
    assert evaluation.data.prompts == prompts
    pixels, labels = images_of(folder, "test")
    classes = class_embeddings(subject.texts(prompts), [0, 0, 1, 1, 2, 2])
    expected = classification_metrics(subject.encoder.images(pixels), classes, labels)
    assert evaluation.measure(subject) == pytest.approx(expected)
    for content, message in (
        (b"a {} tile\na tile", "template .a tile. has no {}: put it in place of the class name$"),
        (b"\n", "templates are empty: give one or more$"),
        (b"{} \xff", "not UTF-8 at byte 3$"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"templates={file}: {message}"):
            _ = parse_evaluation(evaluation.line).data


def test_zero_shot_by_description_is_the_mean_of_similarities(folder, subject, tmp_path):
    (file := tmp_path / "descriptions.json").write_text(
        json.dumps(
            {
                "blue": ["a cold colour", "the sky's colour", "often deep"],
                "red": ["is warm"],
                "sea_green": ["used on ships", "a sea of {}"],
                "another": [],
            }
        )
    )
    evaluation = parse_evaluation(f"zero_shot:{folder}/test_set?descriptions={file}")
    prompts = {
        "blue": [
            "blue, which is a cold colour",
            "blue, which has the sky's colour",
            "blue, which often deep",
        ],
        "red": ["red, which is warm"],
        "sea_green": ["sea_green, which is used on ships", "a sea of sea_green"],
    }
    assert evaluation.data.prompts == [prompt for of_class in prompts.values() for prompt in of_class]
    pixels, labels = images_of(folder, "test")
    images = subject.encoder.images(pixels)
    scores = np.stack([(images @ subject.texts(of).T).mean(axis=1) for of in prompts.values()], axis=1)
    numbers = evaluation.measure(subject)
    assert numbers["top1"] == pytest.approx(np.mean(scores.argmax(axis=1) == labels))
    classes = evaluation.data.class_embeddings(subject)
    np.testing.assert_allclose(images @ classes.T, scores, atol=1e-6)
    for content, message in (
        ({"blue": ["x"], "red": ["y"]}, "'sea_green' must have a list of strings"),
        ({"blue": ["x"], "red": [], "sea_green": ["y"]}, "'red' has none: give it one or more"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"descriptions={file}: {message}"):
            _ = parse_evaluation(evaluation.line).data


def test_corrupted_images_are_classified_zero_shot(folder, subject, monkeypatch):
    chosen = {corruptions.contrast: (0.4, 0.3), corruptions.shot_noise: (60, 5)}
    monkeypatch.setattr(corruptions, "CORRUPTIONS", chosen)
    monkeypatch.setattr(kinds, "CORRUPTIONS", chosen)
    evaluation = parse_evaluation(f"corrupted:{folder}/test_set?severity=2")
    pixels, labels = images_of(folder, "test")
    classes = class_embeddings(subject.texts([f"a photo of a {name}." for name in sorted(COLOURS)]), range(3))
    expected = {}
    for corruption in chosen:
        changed = np.stack([corruptions.corrupt(corruption, 2, image, i) for i, image in enumerate(pixels)])
        numbers = classification_metrics(subject.encoder.images(changed), classes, labels)
        expected[corruption.__name__] = numbers["top1"]
    mean = np.mean(list(expected.values()))
    assert evaluation.measure(subject) == pytest.approx({"mean": mean, **expected})
    assert evaluation.chance == {"mean": 1 / 3, "contrast": 1 / 3, "shot_noise": 1 / 3}
    with pytest.raises(ValueError, match="severity=6 must be one of 1, 2, 3, 4, 5"):
        _ = parse_evaluation(f"corrupted:{folder}/test_set?severity=6").data


def test_groups_of_zero_shot_are_those_of_a_table(folder, subject, tmp_path):
    records = Records(f"{folder}/test_set")
    ids = [records[i]["id"] for i in range(len(records))]
    table = "id,light\n" + "".join(f"{one},{'odd' if i % 2 else 'even'}\n" for i, one in enumerate(ids))
    (tmp_path / "light.csv").write_text(table)
    line = f"zero_shot:{folder}/test_set?groups={tmp_path}/light.csv#light"
    evaluation = parse_evaluation(line)
    numbers, whole = (
        evaluation.measure(subject),
        parse_evaluation(f"zero_shot:{folder}/test_set").measure(subject),
    )
    assert {name: numbers[name] for name in whole} == whole
    assert 5 * numbers["group even"] + 4 * numbers["group odd"] == pytest.approx(9 * whole["top1"])
    assert numbers["gap"] == pytest.approx(abs(numbers["group even"] - numbers["group odd"]))
    before = evaluation.contents
    (tmp_path / "light.csv").write_text(table.replace("odd", "even", 1))
    assert parse_evaluation(line).contents["groups"] != before["groups"]


def test_subjects_may_share_decoded_images(folder, subject, trained):
    tokenizer, records = Tokenizer(64), Records(folder / "test_set")
    decoded = DecodedPairs(records, tokenizer, 32)
    encoder = Encoder(trained.model, trained.params, trained.mesh, 4)
    other = ModelSubject(encoder, tokenizer, 32, open_pairs=lambda _: decoded)
    np.testing.assert_array_equal(other.images(records), subject.images(records))


def test_similarities_of_an_ensemble_are_the_means_of_its_members(folder, subject, trained):
    """Of two models that differ in their image tower alone."""
    params = {**trained.params, "visual": jax.tree.map(lambda leaf: 1.1 * leaf, trained.params["visual"])}
    other = ModelSubject(Encoder(trained.model, params, trained.mesh, 4), Tokenizer(64), 32)
    ensemble = EnsembleSubject([subject, other])
    records, texts = Records(folder / "test_set"), ["a red square", "something green"]
    files = sorted((folder / "test").rglob("*.png"))

    def similarities(model):
        return model.images(records) @ model.texts(texts).T, model.pictures(files) @ model.texts(texts).T

    for joined, *parts in zip(*map(similarities, (ensemble, subject, other)), strict=True):
        assert not np.allclose(*parts)
        np.testing.assert_allclose(joined, np.mean(parts, axis=0), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ensemble.texts(texts), axis=1), 1, rtol=1e-6)


def test_a_slice_has_the_classes_of_its_split(folder):
    part = parse_evaluation(f"zero_shot:{folder}/test_set?split=train[3:6]")  # red alone
    whole = parse_evaluation(f"zero_shot:{folder}/test_set")
    assert part.data.images.names == whole.data.images.names
    assert part.data.images.labels.tolist() == [1, 1, 1]
    assert whole.data.images.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert part.contents != whole.contents


def test_parts_of_a_split_have_its_classes_and_their_labels(folder):
    parts = parse_evaluation(f"zero_shot:{folder}/test_set?split=train[:1]+train[4:]")
    assert parts.data.images.labels.tolist() == [0, 1, 1, 2, 2, 2]


def test_picture_of_many_rows_is_decoded_once_and_few_are_in_memory(folder, subject, monkeypatch):
    files = sorted((folder / "test").rglob("*.png"))
    decoded, encoded, images = [], [], subject.encoder.images
    monkeypatch.setattr(
        "clipmoe_jax.data.decoding.preprocess_image",
        lambda content, size: decoded.append(content) or preprocess_image(content, size),
    )
    monkeypatch.setattr(subject.encoder, "images", lambda of: encoded.append(len(of)) or images(of))
    features = subject.pictures(files[:1] + files * 2)
    np.testing.assert_array_equal(features[1:10], features[10:])
    np.testing.assert_array_equal(features[0], features[1])
    assert len(decoded) == 9 and encoded == [4, 4, 1]
    expected = images(np.stack([preprocess_image(file.read_bytes(), 32) for file in files]))
    np.testing.assert_allclose(features[1:10], expected, atol=1e-6)


def test_large_picture_is_not_read(subject, tmp_path, monkeypatch):
    monkeypatch.setattr("clipmoe_jax.data.decoding.MAX_IMAGE_BYTES", 99)
    (tmp_path / "large.jpg").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="large.jpg has 100 bytes, of which 99 may be read"):
        subject.pictures([tmp_path / "large.jpg"])


@pytest.fixture
def own_files(folder, tmp_path, monkeypatch):
    """A copy of MMVP's folder and a classifier, in the user's home."""
    shutil.copytree(folder / "mmvp", tmp_path / "mmvp")
    known, unknown = np.full((9, 3), 1 / 3), np.full((5, 3), 1 / 3)
    np.savez(tmp_path / "classifier.npz", known=known, unknown=unknown)
    (tmp_path / "templates.txt").write_text("a {}.")
    (tmp_path / "descriptions.json").write_text(json.dumps({name: ["a colour"] for name in COLOURS}))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def replace_classifier(own_files):
    np.savez(own_files / "classifier.npz", known=np.eye(9, 3), unknown=np.full((5, 3), 1 / 3))


FILES = {
    "images of MMVP": (
        "mmvp:~/mmvp",
        "path",
        lambda own: shutil.copy(*(own / "mmvp/MLLM_VLM Images" / n for n in ("Shade/3.jpg", "Colour/1.jpg"))),
    ),
    "table of MMVP": (
        "mmvp:~/mmvp",
        "path",
        lambda own: (own / "mmvp/Questions.csv").write_text(
            "\ufeff" + (own / "mmvp/Questions.csv").read_text()
        ),
    ),
    "classifier": (
        "ood:{0}/test_set?unknown={0}/odd_set&train={0}/train_set&classifier=~/classifier.npz",
        "classifier",
        replace_classifier,
    ),
    "templates": (
        "zero_shot:{0}/test_set?templates=~/templates.txt",
        "templates",
        lambda own: (own / "templates.txt").write_text("the {}."),
    ),
    "descriptions": (
        "zero_shot:{0}/test_set?descriptions=~/descriptions.json",
        "descriptions",
        lambda own: (own / "descriptions.json").write_text(json.dumps({name: ["warm"] for name in COLOURS})),
    ),
}


@pytest.mark.parametrize(("line", "name", "change"), FILES.values(), ids=FILES)
def test_contents_change_with_the_files_of_a_line(folder, own_files, line, name, change):
    def contents():
        evaluation = parse_evaluation(line.format(folder))
        _ = evaluation.data  # opens under a path that begins at home
        return evaluation.contents

    before = contents()
    assert before == contents()
    change(own_files)
    assert [other for other, value in contents().items() if value != before[other]] == [name]


def test_contents_change_with_the_table_of_classes(folder, monkeypatch):
    def contents(table):
        return parse_evaluation(f"zero_shot:{folder}/test_set?classes={table}").contents

    tables = [contents(name) for name in ("imagenet", "imagenet-v2", "cifar10", "none")]
    assert len({of_one.get("classes") for of_one in tables}) == 4 and "classes" not in tables[3]
    assert len({of_one["path"] for of_one in tables}) == 1
    monkeypatch.setattr(classes, "templates", lambda name: ("a {}",))
    assert contents("cifar10") != tables[2]


@pytest.mark.parametrize(
    ("line", "num_sets", "num_read"),
    [
        ("zero_shot:{0}/test_set", 1, 1),
        ("zero_shot:{0}/test_set?split=train[:3]", 2, 1),
        ("linear_probe:{0}/test_set?train={0}/train_set", 2, 2),
        ("ood:{0}/test_set?unknown={0}/odd_set&train={0}/train_set", 3, 2),
    ],
)
def test_data_sets_are_opened_once_and_labels_read_once(folder, monkeypatch, line, num_sets, num_read):
    opened, read = [], []
    monkeypatch.setattr(data_sets, "Records", lambda *args: opened.append(args) or Records(*args))
    original = data_sets.read_labels
    monkeypatch.setattr(data_sets, "read_labels", lambda records: read.append(records) or original(records))
    evaluation = parse_evaluation(line.format(folder))
    _ = evaluation.contents, evaluation.data, evaluation.chance
    assert (len(opened), len(read)) == (num_sets, num_read)


def test_attributes_are_told_by_a_prompt_for_each_value(folder, subject):
    evaluation = parse_evaluation(f"attributes:{folder}/attributes_set?split=train")
    numbers = evaluation.measure(subject)
    scenes = list(open_source("digit_scenes:test?pairs=24"))
    images = subject.encoder.images(np.stack([preprocess_image(pair.image, 32) for pair in scenes]))
    table = open_source("digit_scenes:test").attribute_table
    for name, (prompt, values) in table.items():
        classes = class_embeddings(
            subject.texts([prompt.format(value) for value in values]), range(len(values))
        )
        labels = [values.index(pair.attributes[name]) for pair in scenes]
        assert numbers[name] == classification_metrics(images, classes, labels)["top1"], name
    assert list(numbers) == [*table, "mean"]
    assert numbers["mean"] == pytest.approx(np.mean([numbers[name] for name in table]))
    assert len({numbers[name] for name in table}) > 2
    assert evaluation.chance["digit"] == 1 / 10 and evaluation.chance["size"] == 1 / 2
    assert evaluation.chance["mean"] == pytest.approx((3 / 6 + 2 / 4 + 1 / 2 + 1 / 3 + 1 / 10) / 8)


def test_data_without_attributes_is_not_applicable(folder):
    with pytest.raises(
        NotApplicableError, match=f"evaluation attributes:.*: {folder}/test_set has no attributes"
    ):
        _ = parse_evaluation(f"attributes:{folder}/test_set").data


def test_chance_is_that_of_the_classes_where_it_is_known(folder):
    lines = {
        f"zero_shot:{folder}/test_set": {"top1": 1 / 3},
        f"knn:{folder}/test_set?train={folder}/train_set": {"top1": 1 / 3},
        f"retrieval:{folder}/captioned_set": {},
        f"mmvp:{folder}/mmvp": {},
    }
    assert {line: parse_evaluation(line).chance for line in lines} == lines


def test_probe_and_neighbours_see_the_training_images(folder, subject):
    train, test = (images_of(folder, name) for name in ("train", "test"))
    arrays = subject.encoder.images(train[0]), train[1], subject.encoder.images(test[0]), np.array(test[1])
    line = f"{folder}/test_set?train={folder}/train_set"
    expected = probe.linear_probe(*arrays, 3)[0]
    assert parse_evaluation(f"linear_probe:{line}").measure(subject) == pytest.approx(expected)
    classes = class_embeddings(subject.texts([f"a photo of a {name}." for name in sorted(COLOURS)]), range(3))
    assert parse_evaluation(f"gda:{line}").measure(subject) == pytest.approx(gda(*arrays, classes))
    expected = probe.knn(*arrays, 3)
    assert parse_evaluation(f"knn:{line}").measure(subject) == pytest.approx(expected)


def test_retrieval_takes_every_caption(folder, subject):
    numbers = parse_evaluation(f"retrieval:{folder}/captioned_set?split=train").measure(subject)
    pixels = np.stack(
        [preprocess_image((folder / "captioned" / f"{i}.png").read_bytes(), 32) for i in range(3)]
    )
    texts = [text for name in COLOURS for text in (f"a {name} square", f"something {name}")]
    images, of_image = subject.encoder.images(pixels), np.repeat(np.arange(3), 2)
    assert numbers == pytest.approx(retrieval_recall(images, subject.texts(texts), of_image))
    records = Records(f"{folder}/captioned_set")
    features = retrieval_features(subject, records)
    np.testing.assert_allclose(features.images, images, atol=1e-6)
    np.testing.assert_allclose(features.texts, subject.texts(texts), atol=1e-6)
    assert features.image_of_text.tolist() == of_image.tolist()
    assert read_captions(records).texts == texts


def test_precision_finds_captions_of_images_and_images_of_classes(folder, subject):
    found = parse_evaluation(f"precision:{folder}/captioned_set").measure(subject)
    features = retrieval_features(subject, Records(f"{folder}/captioned_set"))
    of_image = np.repeat(np.arange(3), 2)
    assert found == precision_metrics(features.images, features.texts, np.arange(3), of_image)
    assert found["p10"] == pytest.approx(2 / 10)
    found = parse_evaluation(f"precision:{folder}/test_set?classes=none").measure(subject)
    pixels, labels = images_of(folder, "test")
    classes = class_embeddings(subject.texts([f"a photo of a {name}." for name in sorted(COLOURS)]), range(3))
    expected = precision_metrics(classes, subject.encoder.images(pixels), np.arange(3), np.array(labels))
    assert found == pytest.approx(expected)


def test_mmvp_is_measured_by_attribute(folder, subject):
    numbers = parse_evaluation(f"mmvp:{folder}/mmvp").measure(subject)
    files = [folder / "mmvp" / "MLLM_VLM Images" / k / f"{i}.jpg" for k, i in
             (("Colour", 1), ("Colour", 2), ("Shade", 3), ("Shade", 4))]  # fmt: skip
    images = subject.encoder.images(np.stack([preprocess_image(file.read_bytes(), 32) for file in files]))
    names = ["red", "blue", "blue", "sea_green"]
    texts = subject.texts([f"a photo of a {name} square" for name in names])
    expected = mmvp_accuracy(images.reshape(2, 2, -1), texts.reshape(2, 2, -1), ["Colour", "Shade"])
    assert numbers == expected and list(numbers) == ["Colour", "Shade", "average"]


def test_choice_between_captions_takes_the_files_themselves(folder, subject, tmp_path):
    names = list(COLOURS)
    images = folder / "captioned"
    examples = {
        str(i): {"filename": f"{i}.png", "caption": f"a {name}", "negative_caption": f"a {names[i - 1]}"}
        for i, name in enumerate(names)
    }
    (tmp_path / "add_att.json").write_text(json.dumps(examples))
    pixels = np.stack([preprocess_image((images / f"{i}.png").read_bytes(), 32) for i in range(3)])
    scores = subject.encoder.images(pixels) @ subject.texts([f"a {name}" for name in names]).T
    evaluation = parse_evaluation(f"sugarcrepe:{tmp_path}?images={images}")
    right = np.mean([scores[i, i] > scores[i, i - 1] for i in range(3)])
    assert evaluation.measure(subject) == pytest.approx({"add_att": right, "average": right})
    assert evaluation.chance == {"add_att": 0.5, "average": 0.5}
    before = evaluation.contents
    shutil.copytree(images, tmp_path / "images")
    lines = []
    for i in (1, 2):
        captions = {"caption_0": f"a {names[i]}", "caption_1": f"a {names[i - 1]}"}
        lines.append({"image_0": f"{i}", "image_1": f"{i - 1}", **captions})
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    numbers = parse_evaluation(f"winoground:{tmp_path}").measure(subject)
    text = [scores[i, i] > scores[i, i - 1] and scores[i - 1, i - 1] > scores[i - 1, i] for i in (1, 2)]
    assert list(numbers) == ["text", "image", "group"] and numbers["text"] == np.mean(text)
    (tmp_path / "add_att.json").write_text(json.dumps(examples | {"9": examples["0"]}))
    assert parse_evaluation(evaluation.line).contents != before


def test_unknown_images_are_told_by_each_and_by_the_ensemble(folder, subject, tmp_path):
    rng = np.random.default_rng(0)
    classifier = {"known": rng.dirichlet(np.ones(3), 9), "unknown": rng.dirichlet(np.ones(3), 5)}
    np.savez(tmp_path / "classifier.npz", **classifier)
    line = f"ood:{folder}/test_set?unknown={folder}/odd_set"
    alone = parse_evaluation(line).measure(subject)
    assert list(alone) == ["zero_shot_auroc", "zero_shot_fpr95"]
    numbers = parse_evaluation(
        f"{line}&train={folder}/train_set&classifier={tmp_path}/classifier.npz"
    ).measure(subject)
    assert {name: numbers[name] for name in alone} == alone
    known, unknown = (subject.encoder.images(images_of(folder, name)[0]) for name in ("test", "odd"))
    train = images_of(folder, "train")
    fitted = probe.fit_linear_probe(subject.encoder.images(train[0]), train[1], 3)
    classes = class_embeddings(subject.texts([f"a photo of a {name}." for name in sorted(COLOURS)]), range(3))
    scores = {}
    for name, features in (("known", known), ("unknown", unknown)):
        logits = 100 * features @ classes.T
        zero_shot = np.exp(logits - logits.max(axis=1, keepdims=True))
        zero_shot /= zero_shot.sum(axis=1, keepdims=True)
        scores[name] = (classifier[name] + fitted.probabilities(features) + zero_shot).max(axis=1) / 3
    expected = ood.detection_metrics(scores["known"], scores["unknown"])
    assert numbers["cooked_auroc"] == pytest.approx(expected["auroc"])
    assert numbers["cooked_fpr95"] == pytest.approx(expected["fpr95"])
    assert 0 <= numbers["probe_auroc"] <= 1 and "zero_shot_and_probe_auroc" in numbers


BAD_LINES = {
    "no kind": ("data/coco", "is not KIND:PATH: choose a kind of retrieval, precision, zero_shot"),
    "unknown kind": ("depth:data/x", "is not KIND:PATH"),
    "unknown option": ("knn:x?train=y&k=3", "no option k; knn has split, train, train_split"),
    "missing option": ("linear_probe:x", "train= must be given"),
    "no value": ("zero_shot:x?classes", r"options are written \?name=value"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_wrong_line_says_what_is_wrong(line, message):
    with pytest.raises(ValueError, match=message):
        parse_evaluation(line)


@pytest.mark.parametrize("path", ["data/coco", "gs://bucket/coco", "runs/a:b"])
def test_path_alone_is_for_retrieval(path):
    assert evaluate._with_kind(path) == f"retrieval:{path}"


@pytest.mark.parametrize("line", ["zeroshot:data/classes", "folder:test"])
def test_kind_that_does_not_exist_is_no_path(line):
    with pytest.raises(ValueError, match=f"evaluation '{line}' is not KIND:PATH: choose a kind of retrieval"):
        parse_evaluation(evaluate._with_kind(line))


MISSING = {
    "data set": ("retrieval:{0}/nowhere", FileNotFoundError, "nowhere is not a prepared data set"),
    "split": (
        "retrieval:{0}/test_set?split=val",
        ValueError,
        "has no split 'val': choose train .9 records., or parts",
    ),
    "MMVP": ("mmvp:{0}/test", FileNotFoundError, "Questions.csv does not exist"),
    "labels": ("zero_shot:{0}/captioned_set", ValueError, "has 2 captions, and labelled images have one"),
    "table": ("zero_shot:{0}/test_set?classes=cifar10", ValueError, "labels .* are none of cifar10's"),
    "classes": ("knn:{0}/odd_set?train={0}/train_set", ValueError, "labels that are no classes: noise"),
    "neighbours": (
        "knn:{0}/test_set?train={0}/test_set",
        ValueError,
        "has 9 images, and the 20 nearest vote",
    ),
    "probe of few images": (
        "linear_probe:{0}/test_set?train={0}/test_set",
        ValueError,
        "linear probe: no class has 5 training images",
    ),
    "probe of one class": (
        "linear_probe:{0}/odd_set?train={0}/odd_set",
        ValueError,
        "linear probe: the training images are of one class: give two or more",
    ),
    "probe of known classes": (
        "ood:{0}/test_set?unknown={0}/odd_set&train={0}/test_set",
        ValueError,
        "linear probe: no class has 5 training images",
    ),
    "GDA of few images": (
        "gda:{0}/test_set?train={0}/test_set",
        ValueError,
        "gda: no class has 5 training images",
    ),
    "GDA of a class without images": (
        "gda:{0}/train_set?train={0}/train_set&train_split=train[:16]",
        ValueError,
        "gda: class 2 of 3 has no training image: give some",
    ),
    "a plus": ("knn:{0}/test_set?train=a+b", FileNotFoundError, r"a\+b is not a prepared data set"),
    "templates": ("zero_shot:{0}/test_set?templates=no.txt", FileNotFoundError, "templates=no.txt does not"),
    "two kinds of prompts": (
        "zero_shot:{0}/test_set?templates=a.txt&descriptions=b.json",
        ValueError,
        "templates= and descriptions= both say what the prompts are: give one",
    ),
    "probe of COOkeD": (
        "ood:{0}/test_set?unknown={0}/odd_set&classifier=x.npz",
        ValueError,
        "give train= beside classifier=",
    ),
}


@pytest.mark.parametrize(("line", "error", "message"), MISSING.values(), ids=MISSING)
def test_data_that_is_missing_or_does_not_fit_is_refused(folder, line, error, message):
    with pytest.raises(error, match=f"evaluation .*{message}"):
        _ = parse_evaluation(line.format(folder)).data


@exhaustive
def test_expert_alone_is_the_dense_model_that_it_was(folder, trained, tmp_path):
    """Exactly: the same parameters, the same program."""
    evaluations = [
        parse_evaluation(f"retrieval:{folder}/captioned_set"),
        parse_evaluation(f"mmvp:{folder}/mmvp"),
        parse_evaluation(f"zero_shot:{folder}/test_set"),
    ]
    save_model(tmp_path / "moe", trained.model.config, trained.params)
    numbers = evaluate.evaluate(evaluate.read(str(tmp_path / "moe")), evaluations, experts=True, batch_size=8)
    assert list(numbers) == ["model", "expert 0", "expert 1", "expert 2", "expert 3"]
    for e, params in enumerate(trained.dense_params):
        save_model(tmp_path / f"dense_{e}", trained.dense, params)
        alone = evaluate.evaluate(evaluate.read(str(tmp_path / f"dense_{e}")), evaluations, batch_size=8)
        assert numbers[f"expert {e}"] == alone["model"]
    assert len({json.dumps(of_model) for of_model in numbers.values()}) > 1


def test_command_shows_a_table_a_line_and_writes_a_file(folder, trained, tmp_path):
    """On this one model: a table for each line, and a file; what is missing is told in one line."""
    save_model(tmp_path / "moe", trained.model.config, trained.params)
    command = [sys.executable, "-m", "clipmoe_jax.evaluate", f"--model={tmp_path / 'moe'}"]
    done = subprocess.run(
        [*command, f"--data={folder}/captioned_set", f"--data=mmvp:{folder}/mmvp", "--experts",
         f"--data=attributes:{folder}/captioned_set",
         f"--out={tmp_path / 'new' / 'numbers.json'}"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "new" / "numbers.json").read_text())
    recall = numbers["model"][f"retrieval:{folder}/captioned_set"]["image_to_text_r1"]
    lines = done.stdout.splitlines()
    skipped = f"evaluation attributes:{folder}/captioned_set: {folder}/captioned_set has no attributes"
    assert f"skipped: {skipped}, as few data sets have" in lines and len(numbers["model"]) == 2
    [row] = [i for i, line in enumerate(lines) if line.startswith("i2t_r1 ")]
    assert lines[row].split()[:2] == ["i2t_r1", f"{100 * recall:.1f}"]
    assert re.split(" {2,}", lines[row - 1].strip()) == ["model", *(f"expert {e}" for e in range(4))]
    again = [*command, f"--data={folder}/captioned_set", f"--out={tmp_path / 'new' / 'numbers.json'}"]
    refused = subprocess.run(again, capture_output=True, text=True)
    assert refused.returncode == 1 and not refused.stdout
    told = f"error: --out={tmp_path}/new/numbers.json exists already: delete it or choose another file"
    assert refused.stderr.strip() == told
    assert json.loads((tmp_path / "new" / "numbers.json").read_text()) == numbers
    missing = subprocess.run([*command, "--data=mmvp:nowhere"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert missing.stderr.strip().startswith("error: evaluation mmvp:nowhere: nowhere/Questions.csv")


def test_cost_is_measured_of_the_model_and_of_one_expert(trained, monkeypatch):
    """In turns, on inputs of the model's sizes; `tests/analysis/test_cost.py` looks at the numbers."""

    def costs(models, images, tokens):
        assert images.shape == (1, 32, 32, 3) and tokens.shape == (1, 64)
        return {name: {"moe": clip.config.moe is not None} for name, (clip, _) in models.items()}

    monkeypatch.setattr(evaluate, "costs", costs)
    model = evaluate.Loaded(trained.model.config, trained.params, "CLIP-MoE")
    assert evaluate.measure_cost(model) == {"model": {"moe": True}}
    assert evaluate.measure_cost(model, experts=True) == {"model": {"moe": True}, "expert 0": {"moe": False}}


def test_models_without_text_tower_clips_tokens_or_experts_are_refused(trained):
    dense = evaluate.Loaded(trained.dense, trained.dense_params[0], "dense CLIP")
    with pytest.raises(ValueError, match="the model is a dense CLIP and has no experts"):
        evaluate.evaluate(dense, [], experts=True)
    vision = dataclasses.replace(trained.dense, text=None)
    with pytest.raises(ValueError, match="evaluations need a text tower"):
        evaluate.evaluate(evaluate.Loaded(vision, {}, "a vision tower"), [])
    for text in ({"vocab_size": 300}, {"eos_token_id": 2}):
        other = dataclasses.replace(trained.dense, text=dataclasses.replace(trained.dense.text, **text))
        with pytest.raises(ValueError, match="a dense CLIP with tokens of its own: evaluations need CLIP's"):
            evaluate.evaluate(evaluate.Loaded(other, {}, "dense CLIP"), [])
