"""Features of a source as files: what is in them, whatever the source is, and what a stopped call leaves."""

import json

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from clipmoe_jax.data.preparation import TooManyBadRecordsError, prepare
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.sources import is_captioned, open_source
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation import embedding
from clipmoe_jax.evaluation.embedding import Embedder, PreparedPairs
from clipmoe_jax.evaluation.encoder import Encoder


@pytest.fixture
def folder(tmp_path):
    """Eleven images of noise with two captions each; the image 03 is broken."""
    root, rng = tmp_path / "pairs", np.random.default_rng(0)
    root.mkdir()
    for i in range(11):
        Image.fromarray(rng.integers(0, 256, (36, 40, 3), np.uint8)).save(root / f"{i:02}.png")
        (root / f"{i:02}.txt").write_text(f"the {i}\nanother\n")
    (root / "03.png").write_bytes(b"broken")
    return root


@pytest.fixture
def embed(trained):
    encoder = Encoder(trained.model, trained.params, trained.mesh, batch_size=4)

    def embed(source, out, **options):
        captioned = options.pop("captioned", True)
        embedder = Embedder(source, encoder, 32, Tokenizer(64) if captioned else None)
        return embedder.write(str(out), inputs={"model": "it"}, max_bad_fraction=0.1, **options)

    return embed


def contents(folder):
    """{path: bytes} of every file."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def features(folder, kind):
    return np.concatenate([np.load(file) for file in sorted((folder / kind).iterdir())])


def test_every_source_gives_the_same_features(folder, embed, tmp_path):
    """A folder, and what is prepared of it as files and as pixels; images alone have none of captions."""
    source = open_source(f"folder:{folder}")
    embed(source, tmp_path / "folder", num_parts=2)
    for name, pixels in (("files", None), ("pixels", 32)):
        prepare(source, f"{tmp_path}/{name}_set", pixels=pixels, max_bad_fraction=0.1)
        embed(PreparedPairs(Records(f"{tmp_path}/{name}_set"), 32), tmp_path / name)
    spec = f"images:{folder}"
    embed(open_source(spec), tmp_path / "images", captioned=is_captioned(spec))
    for kind in ("img_emb", "text_emb"):
        expected = features(tmp_path / "folder", kind)
        assert expected.dtype == np.float16 and expected.shape == (10, 64)
        np.testing.assert_allclose(np.linalg.norm(expected.astype("f4"), axis=1), 1, atol=1e-3)
        for name in ("files", "pixels"):
            np.testing.assert_allclose(features(tmp_path / name, kind), expected, atol=2e-3)
    images = features(tmp_path / "images", "img_emb")
    np.testing.assert_allclose(images, features(tmp_path / "folder", "img_emb"), atol=2e-3)
    assert not (tmp_path / "images" / "text_emb").exists()
    rows = pyarrow.parquet.read_table(tmp_path / "images" / "metadata").to_pylist()
    assert rows[3] == {"image_path": "04.png", "caption": "04", "entry": 4}
    with pytest.raises(
        ValueError, match="pixels of size 32 and the model takes 64: prepare it with pixels=64"
    ):
        PreparedPairs(Records(f"{tmp_path}/pixels_set"), 64)


def test_numbers_have_the_zeros_of_clip_retrieval(folder, embed, tmp_path):
    """One digit for up to nine parts, two for ten, as its writer.py; an entry of a bad record has no row."""
    embed(open_source(f"folder:{folder}"), tmp_path / "out", num_parts=11)
    names = sorted(file.name for file in (tmp_path / "out" / "metadata").iterdir())
    assert names == [f"metadata_{k:02}.parquet" for k in range(11)]
    assert np.load(tmp_path / "out" / "img_emb" / "img_emb_03.npy").shape == (0, 64)


def test_a_changed_source_is_encoded_anew(folder, embed, tmp_path, monkeypatch):
    """An error in the third part leaves two; then an image of the first one is another."""
    source = open_source(f"folder:{folder}")
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "_write_rows", _failing_at(3, embedding._write_rows))
        with pytest.raises(RuntimeError):
            embed(source, tmp_path / "out", num_parts=4)
    assert sorted(file.name for file in (tmp_path / "out.unfinished" / "parts").iterdir()) == [
        "0.json",
        "1.json",
    ]
    Image.new("RGB", (40, 36), "red").save(folder / "00.png")
    assert embed(source, tmp_path / "out", num_parts=4) == embed(source, tmp_path / "fresh", num_parts=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_bad_images_are_counted_and_named_and_too_many_stop_it(folder, embed, tmp_path):
    source = open_source(f"folder:{folder}")
    assert embed(source, tmp_path / "out") == {
        "model": "it",
        "images": 10,
        "bad": 1,
        "bad_by_kind": {"unreadable image": 1},
    }
    [line] = (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "03.png"
    (folder / "04.png").write_bytes(b"broken")
    with pytest.raises(TooManyBadRecordsError, match="^2 of 11 records are bad"):
        embed(source, tmp_path / "other")
    told = (tmp_path / "other.unfinished" / "bad_records.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in told] == ["03.png", "04.png"]


def _failing_at(call, function):
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise RuntimeError
        return function(*arguments)

    return failing
