"""Class names and templates: how many, which, and as open_clip has them."""

import importlib.util
import pathlib
import runpy

import numpy as np
import pytest

from clipmoe_jax.evaluation.classes import class_table, make_prompts, templates


@pytest.mark.parametrize(
    ("name", "size", "first", "last"),
    [
        ("imagenet", 1000, ("n01440764", "tench"), ("n15075141", "toilet paper")),
        ("imagenet-v2", 1000, ("0", "tench"), ("999", "toilet paper")),
        ("imagenet-o", 200, ("n01443537", "goldfish"), ("n13052670", "hen of the woods mushroom")),
        ("cifar10", 10, ("airplane", "airplane"), ("truck", "truck")),
        ("cifar100", 100, ("apple", "apple"), ("worm", "worm")),
    ],
)
def test_tables_have_their_classes_in_order(name, size, first, last):
    table = list(class_table(name).items())
    assert len(table) == len(set(class_table(name))) == size
    assert (table[0], table[-1]) == (first, last)


def test_imagenet_is_open_clips_and_in_order():
    # The file alone: open_clip itself takes torchvision, which not every build of PyTorch goes with.
    folder = pathlib.Path(importlib.util.find_spec("open_clip").origin).parent
    reference = runpy.run_path(str(folder / "zero_shot_metadata.py"))
    table = class_table("imagenet")
    assert list(table.values()) == list(reference["IMAGENET_CLASSNAMES"])
    assert list(table) == sorted(table), "ImageNet's class indices are the order of the WordNet ids"
    assert list(class_table("imagenet-v2").values()) == list(table.values())
    sentences = templates("imagenet")
    expected = [template("cat") for template in reference["OPENAI_IMAGENET_TEMPLATES"]]
    assert [sentence.format("cat") for sentence in sentences] == expected


def test_known_ids_have_their_names():
    """Pairs that everyone knows, from all over the list."""
    table = class_table("imagenet")
    known = {"n02123045": "tabby cat", "n03126707": "construction crane", "n02012849": "crane bird"}
    assert {wnid: table[wnid] for wnid in known} == known
    assert list(table).index("n02123045") == 281
    assert class_table("imagenet-o").items() <= table.items()


def test_cifar100_labels_have_underscores():
    table = class_table("cifar100")
    assert table["aquarium_fish"] == "aquarium fish" and list(table) == sorted(table)


def test_templates_are_openais():
    sizes = {"imagenet": 80, "imagenet-v2": 80, "imagenet-o": 80, "cifar10": 18, "cifar100": 18, "none": 1}
    for name, size in sizes.items():
        assert len(set(templates(name))) == size
        assert all(sentence.count("{}") == 1 for sentence in templates(name))


def test_labels_are_their_own_names():
    assert class_table("none", ["dog", "cat", "dog"]) == {"cat": "cat", "dog": "dog"}


def test_make_prompts_by_hand():
    prompts, class_of_prompt = make_prompts(["cat", "{curly}"], ["a {}.", "the {}!"])
    assert prompts == ["a cat.", "the cat!", "a {curly}.", "the {curly}!"]
    np.testing.assert_array_equal(class_of_prompt, [0, 0, 1, 1])


def test_labels_that_a_table_lacks_are_refused():
    assert len(class_table("cifar10", ["frog"])) == 10
    with pytest.raises(
        ValueError, match=r"labels \['0', 'n1'\] are none of imagenet's, such as \['n01440764'"
    ):
        class_table("imagenet", ["n01440764", "n1", "0"])
    with pytest.raises(ValueError, match="there are no labels"):
        class_table("none")
    with pytest.raises(ValueError, match="classes='imagenet1k' is no table: choose one of"):
        class_table("imagenet1k")
