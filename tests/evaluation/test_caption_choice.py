"""SugarCrepe and Winoground: small data sets of their layouts, and their scores by hand."""

import json

import numpy as np
import pytest

from clipmoe_jax.evaluation.caption_choice import (
    Choice,
    caption_accuracy,
    sugarcrepe_choices,
    winoground_choices,
    winoground_scores,
)


def features(scores):
    """Images and captions whose inner products are scores (N, images, 2): captions are unit vectors."""
    scores = np.asarray(scores, np.float32)
    return scores, np.broadcast_to(np.eye(2, dtype=np.float32), (len(scores), 2, 2))


def test_winogrounds_scores_by_hand():
    """Of (image, caption): the text score compares a row, the image score a column."""
    examples = [
        [[0.9, 0.1], [0.2, 0.8]],  # all right
        [[0.9, 0.8], [0.1, 0.2]],  # each image has its caption; caption 1 prefers image 0
        [[0.9, 0.1], [0.95, 0.99]],  # each image has its caption; caption 0 prefers image 1
        [[0.5, 0.6], [0.1, 0.7]],  # each caption has its image; image 0 prefers caption 1
        [[0.5, 0.5], [0.5, 0.5]],  # equal is wrong
    ]
    assert winoground_scores(*features(examples)) == pytest.approx(
        {"text": 3 / 5, "image": 2 / 5, "group": 1 / 5}
    )


def test_accuracy_is_averaged_over_parts():
    scores = [[[0.9, 0.1]], [[0.2, 0.3]], [[0.5, 0.5]], [[0.4, 0.3]]]
    found = caption_accuracy(*features(scores), ["add", "add", "swap", "swap"])
    assert found == {"add": 0.5, "swap": 0.5, "average": 0.5}
    found = caption_accuracy(*features(scores), ["add", "swap", "swap", "swap"])
    assert found == pytest.approx({"add": 1.0, "swap": 1 / 3, "average": 2 / 3})
    with pytest.raises(ValueError, match="caption choice: some features are not finite"):
        caption_accuracy(*features([[[np.nan, 0]]]), ["add"])


def test_files_of_sugarcrepe(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"x")
    example = {"filename": "0.jpg", "caption": "a red cube", "negative_caption": "a blue cube"}
    (tmp_path / "data").mkdir()
    for name in ("swap_att", "add_obj"):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps({"0": example}))
    image, captions = (tmp_path / "0.jpg",), ("a red cube", "a blue cube")
    both = [Choice(part, image, captions) for part in ("add_obj", "swap_att")]
    assert sugarcrepe_choices(str(tmp_path / "data"), str(tmp_path)) == both
    file = tmp_path / "data" / "add_obj.json"
    assert sugarcrepe_choices(str(file), str(tmp_path)) == both[:1]
    for content, error, message in (
        ({"0": {**example, "filename": "../0.jpg"}}, ValueError, "add_obj.json: 0: '../0.jpg' leads out of"),
        (
            {"0": {**example, "filename": "1.jpg"}},
            FileNotFoundError,
            "1 images of .* do not exist, the first .*1.jpg",
        ),
        ({"7": {"filename": "0.jpg"}}, ValueError, "add_obj.json: 7: no field 'caption'"),
        ({"7": 3}, ValueError, "add_obj.json: 7 is not an object with filename"),
        ({}, ValueError, "add_obj.json has no example"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(error, match=message):
            sugarcrepe_choices(str(file), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere is neither a JSON file of SugarCrepe nor"):
        sugarcrepe_choices(str(tmp_path / "nowhere"), str(tmp_path))


def test_folder_of_winoground(tmp_path):
    (tmp_path / "images").mkdir()
    for i in (0, 1):
        (tmp_path / "images" / f"ex_0_img_{i}.png").write_bytes(b"x")
    example = {
        "id": 0,
        "image_0": "ex_0_img_0",
        "image_1": "ex_0_img_1",
        "caption_0": "a b",
        "caption_1": "b a",
    }
    (tmp_path / "examples.jsonl").write_text(json.dumps(example) + "\n\n")
    [choice] = winoground_choices(str(tmp_path))
    assert choice.captions == ("a b", "b a") and choice.images[1] == tmp_path / "images" / "ex_0_img_1.png"
    (tmp_path / "examples.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="examples.jsonl, line 1: no field 'image_0'"):
        winoground_choices(str(tmp_path))
