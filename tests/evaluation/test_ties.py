"""Of features that are equal no score is higher, whatever place a product of matrices has them in."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from etils import epath

from clipmoe_jax.evaluation import search
from clipmoe_jax.evaluation.precision import precision_metrics
from clipmoe_jax.evaluation.retrieval import retrieval_recall
from clipmoe_jax.evaluation.subject import ModelSubject
from clipmoe_jax.evaluation.ties import first_equal_rows, inner_products
from clipmoe_jax.evaluation.zero_shot import nearest_ranks

# (N, d), of which BLAS or XLA sums up some as no other on most CPUs.
SHAPES = [(10, 64), (13, 512), (17, 512), (51, 512), (103, 768), (261, 107), (1000, 768)]


@pytest.fixture(params=SHAPES, ids=str)
def unit(request):
    rows = np.random.default_rng(0).normal(size=request.param).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_first_equal_rows_by_hand():
    rows = np.array([[1, 2], [3, 4], [1, 2], [3, 5], [3, 4]], np.float32)
    assert first_equal_rows(rows).tolist() == [0, 1, 0, 3, 1]
    assert first_equal_rows(rows[1:4]) is None
    found = inner_products(rows, rows, first_equal_rows(rows))
    np.testing.assert_array_equal(found, rows @ rows.T)


def test_of_equal_classes_the_lower_one_comes_first(unit):
    images = np.random.default_rng(1).normal(size=(100, unit.shape[1])).astype(np.float32)
    twice = np.concatenate([unit, unit])
    assert not nearest_ranks(images, twice, np.argmax(images @ unit.T, axis=1)).any()


def test_wrong_answers_that_equal_the_right_one_stand_before_it(unit):
    twice = np.concatenate([unit, unit])
    ids = np.arange(len(twice))
    recall = retrieval_recall(twice, twice, ids, ranks=(1,))
    assert recall["image_to_text_r1"] == recall["text_to_image_r1"] == 0
    assert precision_metrics(twice, twice, ids, ids)["p1"] == 0


def test_of_equal_images_the_first_in_the_source_is_found_first(unit, tmp_path):
    """In two files, each with the same images twice."""
    twice = np.concatenate([unit, unit])
    for part in range(2):
        (tmp_path / "img_emb").mkdir(exist_ok=True)
        (tmp_path / "metadata").mkdir(exist_ok=True)
        np.save(tmp_path / "img_emb" / f"img_emb_{part}.npy", twice)
        entries = list(range(part * len(twice), (part + 1) * len(twice)))
        names = [f"{i}.png" for i in entries]
        table = pa.table({"image_path": names, "caption": names, "entry": entries})
        pyarrow.parquet.write_table(table, tmp_path / "metadata" / f"metadata_{part}.parquet")
    for row in range(min(len(unit), 20)):
        hits = search.nearest(epath.Path(tmp_path), unit[row], 4)
        assert [hit.entry % len(unit) for hit in hits] == 4 * [row]
        assert [hit.entry for hit in hits] == sorted(hit.entry for hit in hits)
        assert len({hit.similarity for hit in hits}) == 1


def test_equal_texts_are_encoded_once():
    class Encoder:
        def texts(self, tokens):
            encoded.append(len(tokens))
            return np.arange(len(tokens), dtype=np.float32)[:, None]

    encoded = []
    subject = ModelSubject(Encoder(), tokenizer=np.array, image_size=32)
    assert subject.texts(["b", "a", "b", "c", "a"]).ravel().tolist() == [0, 1, 0, 2, 1]
    assert encoded == [3]
