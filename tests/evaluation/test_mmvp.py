"""MMVP-VLM: a small data set of its layout, and its score by hand."""

import csv
import os

import numpy as np
import pytest

from clipmoe_jax.evaluation.mmvp import mmvp_accuracy, mmvp_files, mmvp_pairs

ROWS = [
    ("1", "Orientation", 'a dog facing "left"'),
    ("2", "Orientation", "a dog facing right"),
    ("31", "Camera Perspective", "a cup, seen from above"),
    ("32", "Camera Perspective", "a cup {seen} from the side"),
]


def write(folder, rows, images="MLLM_VLM Images"):
    """Files as the published data set has them."""
    with (folder / "Questions.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("Question ID", "Type", "Statement"), *rows])
    for number, kind, *_ in rows:
        path = folder / images / kind / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return str(folder)


@pytest.mark.parametrize("images", ["MLLM_VLM Images", "MMVP_VLM_Images"])
def test_rows_that_follow_each_other_are_pairs(tmp_path, images):
    first, second = mmvp_pairs(write(tmp_path, ROWS, images))
    assert first.attribute == "Orientation" and second.attribute == "Camera Perspective"
    assert first.prompts == ('a photo of a dog facing "left"', "a photo of a dog facing right")
    assert second.prompts[1] == "a photo of a cup {seen} from the side"
    assert second.images == tuple(tmp_path / images / "Camera Perspective" / f"{i}.jpg" for i in (31, 32))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:3], "has 3 rows, which are not pairs"),
        (ROWS[1:3], r"rows '2' \(Orientation\) and '31' \(Camera Perspective\) are no pair"),
        ([ROWS[0], ROWS[0]], "are no pair: two numbers of one Type must follow each other"),
        (
            [("1", "Orientation", "x", "y"), ROWS[1]],
            r"\['1', 'Orientation', 'x', 'y'\] is not Question ID, Type",
        ),
        ([], "has 0 rows"),
        (
            [("1", "../Orientation", "x"), ("2", "../Orientation", "y")],
            "Type '../Orientation' names no folder",
        ),
        ([ROWS[0], ("2", "Orientation", "open\n3,x,y\n4,x,z")], "a quote in the row '2' is not closed"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(tmp_path, rows, message):
    (tmp_path / "MLLM_VLM Images").mkdir()
    write(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        mmvp_pairs(str(tmp_path))


def test_a_table_of_too_many_rows_is_refused(tmp_path):
    write(tmp_path, ROWS)
    (tmp_path / "Questions.csv").write_text("Question ID,Type,Statement\n" + "1,a,x\n2,a,y\n" * 5001)
    with pytest.raises(ValueError, match="Questions.csv has 10,002 rows, of which 10,000 may be read"):
        mmvp_pairs(str(tmp_path))


def test_a_large_table_is_refused(tmp_path):
    write(tmp_path, ROWS)
    os.truncate(tmp_path / "Questions.csv", 2**23 + 1)
    with pytest.raises(ValueError, match="Questions.csv has 8,388,609 bytes, of which 8,388,608 may be read"):
        mmvp_pairs(str(tmp_path))


def test_files_of_many_rows_are_named_once(tmp_path):
    folder = write(tmp_path, ROWS[:2] * 3)
    images = tmp_path / "MLLM_VLM Images" / "Orientation"
    assert mmvp_files(folder) == [tmp_path / "Questions.csv", images / "1.jpg", images / "2.jpg"]


def test_table_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "MLLM_VLM Images").mkdir()
    (tmp_path / "Questions.csv").write_bytes(b"a,b,c\n1,x,caf\xe9\n")
    with pytest.raises(ValueError, match="Questions.csv is not UTF-8 at byte 13"):
        mmvp_pairs(str(tmp_path))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Questions.csv does not exist"):
        mmvp_pairs(str(tmp_path))
    (tmp_path / "Questions.csv").write_text("Question ID,Type,Statement\n")
    with pytest.raises(FileNotFoundError, match="has no folder 'MLLM_VLM Images'"):
        mmvp_pairs(str(tmp_path))
    write(tmp_path, ROWS)
    (tmp_path / "MLLM_VLM Images" / "Orientation" / "2.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 4 images .* do not exist, the first .*Orientation/2.jpg"
    ):
        mmvp_pairs(str(tmp_path))


def accuracy_of_scores(scores, attributes):
    """scores (P, image, text): image features along the axes make them."""
    scores = np.asarray(scores, np.float32)
    images = np.broadcast_to(np.eye(2, dtype=np.float32), scores.shape)
    return mmvp_accuracy(images, scores.transpose(0, 2, 1), attributes)


RIGHT = [[0.6, 0.1], [0.5, 0.2]]


def test_accuracy_by_hand():
    # Rows are the images, columns the statements. RIGHT: statement 0 picks image 0 (0.6 > 0.5) and
    # statement 1 image 1 (0.2 > 0.1), though image 1 on its own would pick statement 0 (0.5 > 0.2).
    # The second: both statements pick image 0. The third: crossed.
    scores = [RIGHT, [[0.6, 0.3], [0.5, 0.2]], [[0.1, 0.6], [0.5, 0.2]], RIGHT]
    found = accuracy_of_scores(scores, ["Color", "Text", "Color", "State"])
    assert found == {"Color": 0.5, "Text": 0, "State": 1, "average": 0.5}
    assert list(found) == ["Color", "Text", "State", "average"]


def test_average_is_over_attributes():
    found = accuracy_of_scores([RIGHT, RIGHT, RIGHT, np.eye(2)[::-1]], ["a", "a", "a", "b"])
    assert found == {"a": 1, "b": 0, "average": 0.5}


@pytest.mark.parametrize("scores", [[[0.5, 0.1], [0.5, 0.2]], [[0.6, 0.2], [0.5, 0.2]], np.ones((2, 2))])
def test_ties_are_wrong(scores):
    assert accuracy_of_scores([scores], ["x"])["x"] == 0


def test_features_of_another_shape_or_not_finite_are_refused():
    good = np.ones((3, 2, 4))
    with pytest.raises(ValueError, match=r"text features have shape \(6, 4\), not \(3, 2\) and d"):
        mmvp_accuracy(good, good.reshape(6, 4), "abc")
    with pytest.raises(ValueError, match="some image features are not finite"):
        mmvp_accuracy(good * np.inf, good, "abc")
