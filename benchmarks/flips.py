"""Flips a random bit of a file and reads it as the program does: is the damage told?

    python -m benchmarks.flips --flips=200

Each row is a kind of file that a run or `prepare` writes, or that somebody else wrote. Loud: reading ended in
an error, or a record was counted as bad. Harmless: what was read is what the whole file gives, as the bit was
of no use. Silent: something else was read, and nothing was said.
"""

import argparse
import collections
import contextlib
import pathlib
import random
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]: no stub
from etils import epath
from tensorboardX.record_writer import RecordWriter

from clipmoe_jax.core import artifacts, metrics
from clipmoe_jax.core.checksums import read_verified
from clipmoe_jax.data import records
from clipmoe_jax.data.clusters import ClusterIndex
from clipmoe_jax.data.npy import map_array
from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.sources import BadRecord, open_source
from clipmoe_jax.interop import export
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.model_folder import load_model, read_config, save_model
from clipmoe_jax.reporting.read import Folder, read_curves

CONFIG = ClipConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=32, patch_size=16, width=64, num_layers=1, head_width=64),
    text=TextConfig(context_length=248, vocab_size=600, width=64, num_layers=1, head_width=64),
)


class Row(NamedTuple):
    """Files, and what reads all of them."""

    name: str
    files: Sequence[pathlib.Path]
    read: Callable[[], Any]


def make_rows(folder: pathlib.Path, pairs: int) -> list[Row]:
    """Writes files of every kind to a folder; returns their rows."""
    model, clusters, features, data = (folder / name for name in ("model", "clusters", "features", "data"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4"), abstract_params(CONFIG))
    labels = rng.integers(0, 81, 4096).astype(np.int32)
    vectors = rng.normal(size=(256, 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def make_model(path: epath.Path) -> dict:
        save_model(path, CONFIG, params)
        return {"num_steps": 2048, "loss": 0.25}

    def make_clusters(path: epath.Path) -> dict:
        np.save(path / "pseudo_labels.npy", labels)
        ClusterIndex.sort(labels).write(path)
        return {}

    def make_features(path: epath.Path) -> dict:
        np.save(path / "image-00000.npy", vectors.astype(np.float16))
        return {}

    inputs = {"seed": 0, "mcl.learning_rate": 1e-5}
    for path, build in ((model, make_model), (clusters, make_clusters), (features, make_features)):
        artifacts.make(epath.Path(path), inputs, build)
    prepare(open_source(f"digit_scenes:train?pairs={pairs}"), str(data))
    theirs = _as_tfrecords(data / records.NAME / records.VERSION, folder / "theirs" / records.VERSION)
    export.write_openclip(_made(folder / "openclip"), CONFIG, params)
    export.write_clipmoe(_made(folder / "released"), CONFIG, params)
    run = folder / "run"
    described = [epath.Path(run / name) for name in ("config.json", "datasets.json", "eval/results.json")]
    with contextlib.closing(metrics.Metrics(epath.Path(run))) as log:
        for step in range(1, 21):
            log.log("base", step, {"loss": 1 / step, "learning_rate": 1e-3})
    for path in described:
        path.parent.mkdir(exist_ok=True)
        artifacts.write_verified_json(path, {"seed": 0, "mcl": {"batch_size": 800, "learning_rate": 1e-5}})
    shards = sorted(data.rglob("*.array_record-*"))
    told = [path for path in data.rglob("*.json") if path.name != "checksums.json"]

    def read_set() -> list[Any]:
        opened = records.Records(str(data))
        return [opened.fingerprint, opened.attribute_table, opened.image_size, len(opened), opened[0]]

    def read_theirs() -> list[Any]:
        found = list(open_source(f"tfds:{theirs}"))
        if bad := [record for record in found if isinstance(record, BadRecord)]:
            raise ValueError(bad[0].detail)
        return found

    def read_params(path: pathlib.Path) -> Any:
        return load_model(epath.Path(path))[1]

    def read_done() -> list[Any]:
        return [artifacts.done_field(epath.Path(model), name) for name in ("inputs", "measured", "versions")]

    def read_checksums() -> list[Any]:
        return [read_done(), load_model(epath.Path(model))[1]]

    def read_index() -> list[np.ndarray]:
        index = ClusterIndex.open(epath.Path(clusters))
        return [index.order, index.sizes, index.labels]

    def read_records() -> list[Any]:
        opened = records.Records(str(data))
        return [opened[i] for i in range(len(opened))]

    def read_numbers() -> Any:
        return read_curves(Folder(epath.Path(run), epath.Path(run)))

    def npy(path: pathlib.Path) -> Row:
        return Row(path.name, [path], lambda: map_array(epath.Path(path)))

    def weights(name: str, pattern: str) -> Row:
        files = _files(folder / name, pattern)
        return Row(f"somebody's {pattern[1:]} file", files, lambda: read_model(str(folder / name)).params)

    return [
        Row("a model's params", _files(model / "params"), lambda: read_params(model)),
        Row("its model.json", [model / "model.json"], lambda: read_config(epath.Path(model)).to_dict()),
        Row("its done.json", [model / "done.json"], read_done),
        Row("its checksums.json", [model / "checksums.json"], read_checksums),
        npy(clusters / "pseudo_labels.npy"),
        Row("order.npy", [clusters / "order.npy"], read_index),
        Row("sizes.npy", [clusters / "sizes.npy"], read_index),
        npy(features / "image-00000.npy"),
        Row(
            "token_counts-train.npy",
            [data / "token_counts-train.npy"],
            lambda: records.Records(str(data)).token_counts,
        ),
        Row(
            "a run's JSON files",
            list(map(pathlib.Path, described)),
            lambda: list(map(read_verified, described)),
        ),
        Row("its metrics.jsonl", [run / "metrics.jsonl"], read_numbers),
        Row("a prepared set's JSON files", told, read_set),
        Row("its ArrayRecord files", shards, read_records),
        Row("somebody's TFRecord files", _files(theirs, "*.tfrecord-*"), read_theirs),
        weights("released", "*.pt"),
        weights("openclip", "*.safetensors"),
    ]


def flip(row: Row, rng: random.Random) -> str:
    """Flips a bit of a row's files, reads them and flips it back; returns "loud", "silent" or "harmless"."""
    whole = _contents(row.read())
    path = rng.choices(row.files, [file.stat().st_size for file in row.files])[0]
    content = path.read_bytes()
    bit = rng.randrange(8 * len(content))
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        return "harmless" if _contents(row.read()) == whole else "silent"
    except Exception:  # whatever it is, it is told
        return "loud"
    finally:
        path.write_bytes(content)


def _contents(read: Any) -> list[Any]:
    """Returns what was read so that it can be compared: NaN is NaN."""
    leaves = jax.tree.leaves(read, is_leaf=lambda leaf: leaf is None)
    return [
        (leaf.dtype, leaf.shape, leaf.tobytes()) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves
    ]


def _files(folder: pathlib.Path, pattern: str = "*") -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob(pattern) if path.stat().st_size and path.is_file())


def _made(folder: pathlib.Path) -> epath.Path:
    folder.mkdir()
    return epath.Path(folder)


def _as_tfrecords(folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Writes the TFDS data set in a folder as TFRecord files, by another program's writer."""
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.suffix == ".json":
            (target / path.name).write_text(path.read_text().replace("array_record", "tfrecord"))
            continue
        writer = RecordWriter(str(target / path.name.replace("array_record", "tfrecord")))
        for record in array_record_module.ArrayRecordReader(str(path)).read_all():
            writer.write(record)
        writer.close()
    return target


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--flips", type=int, default=200, help="in each row")
    parser.add_argument("--pairs", type=int, default=200, help="of the prepared set")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    print("| file | loud | harmless | silent |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for row in make_rows(pathlib.Path(folder), arguments.pairs):
            rng = random.Random(f"{arguments.seed} {row.name}")
            counts = collections.Counter(flip(row, rng) for _ in range(arguments.flips))
            print(
                f"| {row.name} | {counts['loud']} | {counts['harmless']} | {counts['silent']} |", flush=True
            )


if __name__ == "__main__":
    main()
