"""Damages small files of every format at random, reads them, and counts how that ends.

    python -m benchmarks.fuzz --cases=20000 --out=runs/fuzz

A case is a seed: of its format, of which files it damages and how. Its outcome is
  read      the reader returned: the damage was harmless, or counted as a bad record
  told      it raised an error made for people, which a command prints as one line
  trace     it raised any other error
  hang      it took more than 10 seconds
  blow-up   it took 2 GB more than its process had, or its process died
  escaped   it wrote outside of the case's folder, or started a process or a connection
The last four are faults. Cases run in worker processes that are used again; `cases.jsonl` in --out has a line
for each, and the same command goes on after the last one. `--first=SEED --cases=1` runs a seed again.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import os
import pathlib
import random
import re
import select
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SECONDS, GIGABYTES = 10, 2
FAULTS = ("trace", "hang", "blow-up", "escaped")
IMAGE_FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "TGA", "PCX", "PPM", "QOI"),
    *("16-bit PNG", "zstd TIFF"),
)
CAPTIONS = (("a red cube", "the cube is red"), ("café, two “tables”", "tables"), ("three", "3 | 4"))
# What stands in for a number or a string of JSON and tables.
VALUES = (
    "0",
    "-1",
    "1e308",
    "NaN",
    "null",
    '""',
    "[]",
    "{}",
    "true",
    "99999999999999999999",
    "1.5",
    '"\u202e"',
)
SIZES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


class Format(NamedTuple):
    """A row of FORMATS. write: makes a good example in a folder; read: reads a folder to the end."""

    write: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], None]


def damage(contents: bytes, rng: random.Random) -> bytes:
    """Returns a file's contents with one to four changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        is_text = b"\0" not in contents[:1000] and len(contents) < 100_000
        changes = (*_TEXT_CHANGES, *_CHANGES) if is_text else _CHANGES
        contents = rng.choice(changes)(contents, rng)
    return contents


def _flip(contents: bytes, rng: random.Random) -> bytes:
    changed = bytearray(contents)
    for _ in range(rng.choice((1, 1, 8, 64))):
        if changed:
            changed[_place(changed, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set_size(contents: bytes, rng: random.Random) -> bytes:
    """Writes a number that a header might have as a size."""
    number = struct.pack(rng.choice(("<Q", ">Q")), rng.choice(SIZES))[: rng.choice((2, 4, 8))]
    at = _place(contents, rng)
    return contents[:at] + number + contents[at + len(number) :]


def _cut(contents: bytes, rng: random.Random) -> bytes:
    return contents[: _place(contents, rng)]


def _remove(contents: bytes, rng: random.Random) -> bytes:
    at = _place(contents, rng)
    return contents[:at] + contents[at + rng.choice((1, 4, 512)) :]


def _repeat(contents: bytes, rng: random.Random) -> bytes:
    at = _place(contents, rng)
    return contents[:at] + contents[at : at + 512] * rng.choice((2, 3, 100)) + contents[at:]


def _zero(contents: bytes, rng: random.Random) -> bytes:
    at, length = _place(contents, rng), rng.choice((1, 16, 512))
    return contents[:at] + bytes(len(contents[at : at + length])) + contents[at + length :]


def _place(contents: bytes | bytearray, rng: random.Random) -> int:
    """Returns a place, more often at either end, where headers and tables of contents are."""
    size = len(contents)
    if rng.random() < 0.5 or size < 256:
        return rng.randrange(max(size, 1))
    return rng.choice((rng.randrange(128), size - 1 - rng.randrange(128)))


def _set_value(contents: bytes, rng: random.Random) -> bytes:
    """Replaces a number or string of a text."""
    found = list(re.finditer(rb'"[^"\n]*"|-?\d+(\.\d+)?', contents))
    if not found:
        return _flip(contents, rng)
    at = rng.choice(found)
    return contents[: at.start()] + rng.choice(VALUES).encode() + contents[at.end() :]


def _nest(contents: bytes, rng: random.Random) -> bytes:
    at = _place(contents, rng)
    return contents[:at] + rng.choice((b"[", b'{"a":', b"(")) * 100_000 + contents[at:]


def _remove_line(contents: bytes, rng: random.Random) -> bytes:
    lines = contents.splitlines(keepends=True)
    if lines:
        del lines[rng.randrange(len(lines))]
    return b"".join(lines)


_CHANGES = (_flip, _flip, _set_size, _cut, _remove, _repeat, _zero)
_TEXT_CHANGES = (_set_value, _set_value, _set_value, _nest, _remove_line)


def picture(i: int, format: str = "PNG") -> bytes:
    """Returns an image file that no other number has."""
    from PIL import Image

    pixels = np.random.default_rng(i).integers(0, 256, (12 + i, 16, 3), np.uint8)
    file, image = io.BytesIO(), Image.fromarray(pixels)
    options: dict[str, Any] = {}
    if format == "16-bit PNG":
        format, image = "PNG", Image.fromarray(257 * pixels[:, :, 0].astype(np.uint16))
    if format == "zstd TIFF":
        format, options = "TIFF", {"compression": "zstd"}
    image.save(file, format, **options)
    return file.getvalue()


def write_picture(folder: pathlib.Path, format: str) -> None:
    (folder / "picture").write_bytes(picture(0, format))


def read_picture(folder: pathlib.Path) -> None:
    from clipmoe_jax.data.preprocess import preprocess_image

    preprocess_image((folder / "picture").read_bytes(), 32)


def _images(folder: pathlib.Path) -> None:
    (folder / "images").mkdir()
    for i in range(3):
        (folder / "images" / f"{i}.png").write_bytes(picture(i))


def write_sharegpt4v(folder: pathlib.Path, lines: bool) -> None:
    _images(folder)
    turns = [
        {"id": str(i), "image": f"{i}.png", "conversations": [{"from": "gpt", "value": CAPTIONS[i][0]}]}
        for i in range(3)
    ]
    text = "\n".join(map(json.dumps, turns)) if lines else json.dumps(turns, indent=1)
    (folder / f"x.{'jsonl' if lines else 'json'}").write_text(text)


def write_coco(folder: pathlib.Path) -> None:
    _images(folder)
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(3)]
    annotations = [{"image_id": i, "id": 10 + i, "caption": CAPTIONS[i][0]} for i in range(3)]
    (folder / "x.json").write_text(json.dumps({"images": images, "annotations": annotations}, indent=1))


def write_flickr30k(folder: pathlib.Path) -> None:
    _images(folder)
    lines = [f"{i}.png#{k}\t{caption}" for i in range(3) for k, caption in enumerate(CAPTIONS[i])]
    (folder / "x.token").write_text("\n".join(lines))


def write_csv(folder: pathlib.Path) -> None:
    _images(folder)
    rows = ["filepath\ttitle", *(f'{i}.png\t"{CAPTIONS[i][0]}"' for i in range(3))]
    (folder / "x.tsv").write_text("\n".join(rows))


def write_folder(folder: pathlib.Path) -> None:
    _images(folder)
    for i, captions in enumerate(CAPTIONS):
        (folder / "images" / f"{i}.txt").write_text("\n".join(captions))


def write_img2dataset(folder: pathlib.Path) -> None:
    for i, captions in enumerate(CAPTIONS):
        (folder / f"{i}.jpg").write_bytes(picture(i, "JPEG"))
        (folder / f"{i}.json").write_text(
            json.dumps({"key": str(i), "caption": captions[0], "status": "success"})
        )


def write_webdataset(folder: pathlib.Path, format: int, suffix: str) -> None:
    with tarfile.open(folder / f"00000.tar{suffix}", "w:gz" if suffix else "w", format=format) as tar:
        for i, captions in enumerate(CAPTIONS):
            for name, contents in ((f"{i}.png", picture(i)), (f"{i}.txt", captions[0].encode())):
                member = tarfile.TarInfo(name)
                member.size = len(contents)
                tar.addfile(member, io.BytesIO(contents))


def write_parquet(folder: pathlib.Path) -> None:
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(3)]
    table = pyarrow.table({"image": images, "captions": list(map(list, CAPTIONS)), "id": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, folder / "part.parquet")


def write_huggingface(folder: pathlib.Path) -> None:
    """As `datasets.Dataset.save_to_disk(folder, num_shards=2)` does."""
    import pyarrow

    folder.mkdir(exist_ok=True)
    columns = {
        "image": pyarrow.array(
            [{"bytes": picture(i), "path": f"{i}.png"} for i in range(3)],
            pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
        ),
        "captions": pyarrow.array(list(map(list, CAPTIONS)), pyarrow.list_(pyarrow.string())),
        "label": pyarrow.array([0, 1, 0], pyarrow.int64()),
    }
    features = {
        "image": {"_type": "Image"},
        "captions": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    }
    table = pyarrow.table(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (table[:2], table[2:]), strict=True):
        with (
            pyarrow.OSFile(str(folder / name), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as to,
        ):
            to.write_table(part)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "52172f4427548469",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))


def write_tfds(
    folder: pathlib.Path, features: Mapping[str, Any], examples: Iterable[Mapping[str, Any]], form: str
) -> None:
    """Writes a data set of TFDS, its split "val", without TensorFlow. folder: a new one, NAME/VERSION."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorboardX.record_writer import RecordWriter

    of_all = tfds.features.FeaturesDict(dict(features))
    serializer = tfds.core.example_serializer.ExampleSerializer(of_all.get_serialized_info())
    records = [serializer.serialize_example(of_all.encode_example(example)) for example in examples]
    folder.mkdir(parents=True)
    name = folder.parent.name
    path = str(folder / f"{name}-val.{form}-00000-of-00001")
    is_tfrecord = form == "tfrecord"
    writer = (
        RecordWriter(path) if is_tfrecord else array_record_module.ArrayRecordWriter(path, "group_size:1")
    )
    for record in records:
        writer.write(record)
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split="val", filetype_suffix=form
    )
    info = tfds.core.SplitInfo(
        name="val", shard_lengths=[len(records)], num_bytes=1, filename_template=template
    )
    tfds.folder_dataset.write_metadata(data_dir=folder, features=of_all, split_infos=[info], check_data=False)


def write_captioned(folder: pathlib.Path, form: str) -> None:
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(), "captions": tfds.features.Text()}
    examples = [{"image": io.BytesIO(picture(i)), "captions": CAPTIONS[i][0]} for i in range(3)]
    write_tfds(folder / "set" / "1.0.0", features, examples, form)


def read_source(folder: pathlib.Path, spec: str) -> None:
    """Reads a source as `prepare` does: every pair, its image and its captions."""
    from clipmoe_jax.data.preprocess import UnreadableImageError, preprocess_image
    from clipmoe_jax.data.sources import Pair, open_source
    from clipmoe_jax.data.tokenizer import Tokenizer

    source, tokenizer = open_source(spec.replace("FOLDER", str(folder))), Tokenizer(32)
    len(source)
    for pair in source:
        if isinstance(pair, Pair):
            tokenizer(list(pair.captions))
            with contextlib.suppress(UnreadableImageError):
                preprocess_image(pair.image, 32)


def write_prepared(folder: pathlib.Path) -> None:
    from clipmoe_jax.data.preparation import prepare
    from clipmoe_jax.data.sources import open_source

    prepare(open_source("glyphs:train?pairs=6"), str(folder / "set"))


def read_prepared(folder: pathlib.Path) -> None:
    from clipmoe_jax.data.loader import StreamedPairs
    from clipmoe_jax.data.records import Records
    from clipmoe_jax.data.tokenizer import Tokenizer

    pairs = StreamedPairs(Records(str(folder / "set")), Tokenizer(32), 32)
    pairs.gather(np.arange(len(pairs)))


def write_model(folder: pathlib.Path, experts: int = 0) -> None:
    import jax
    from etils import epath

    from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig, abstract_params
    from clipmoe_jax.models.model_folder import save_model
    from clipmoe_jax.models.transformer import MoeConfig

    config = ClipConfig(
        embed_dim=8,
        vision=VisionConfig(image_size=32, patch_size=16, width=64, num_layers=1),
        text=TextConfig(context_length=77, width=64, num_layers=1),
        moe=MoeConfig(experts, 2) if experts else None,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), abstract_params(config)
    )
    save_model(epath.Path(folder / "model"), config, params)


def write_exported(folder: pathlib.Path, to: str, experts: int = 0) -> None:
    from clipmoe_jax.convert import convert

    with tempfile.TemporaryDirectory() as made:
        write_model(pathlib.Path(made), experts)
        length = 248 if to == "clipmoe" else None
        convert(f"{made}/model", to, str(folder / "model"), context_length=length)


def write_pickled(folder: pathlib.Path, zipped: bool) -> None:
    import torch
    from safetensors.torch import load_file

    write_exported(folder, "huggingface")
    weights = folder / "model" / "model.safetensors"
    state = load_file(weights)
    torch.save(state, folder / "model" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    weights.unlink()


def write_sharded(folder: pathlib.Path) -> None:
    from safetensors.numpy import load_file, save_file

    write_exported(folder, "huggingface")
    weights = folder / "model" / "model.safetensors"
    state, weight_map = load_file(weights), {}
    for i, names in enumerate((list(state)[:10], list(state)[10:])):
        save_file({name: state[name] for name in names}, folder / "model" / f"{i}.safetensors")
        weight_map |= dict.fromkeys(names, f"{i}.safetensors")
    weights.unlink()
    index = folder / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))


def write_torchscript(folder: pathlib.Path) -> None:
    """Writes an archive with the tensors of an open_clip model, as OpenAI's files have them."""
    import torch
    from safetensors.torch import load_file

    write_exported(folder, "openclip")
    (weights,) = (folder / "model").glob("*.safetensors")
    root = torch.nn.Module()
    for name, tensor in load_file(weights).items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    shutil.rmtree(folder / "model")
    torch.jit.script(root).save(str(folder / "model.pt"))


def write_mmvp(folder: pathlib.Path) -> None:
    images = folder / "MLLM_VLM Images" / "Colour"
    images.mkdir(parents=True)
    for i in (1, 2):
        (images / f"{i}.jpg").write_bytes(picture(i, "JPEG"))
    rows = ["Question ID,Type,Statement", "1,Colour,a red square", "2,Colour,a blue square"]
    (folder / "Questions.csv").write_text("\n".join(rows))


def read_mmvp(folder: pathlib.Path) -> None:
    from clipmoe_jax.evaluation.evaluations import parse_evaluation

    _ = parse_evaluation(f"mmvp:{folder}").data


def write_run(folder: pathlib.Path) -> None:
    """Writes what a report reads of a run that goes on."""
    from clipmoe_jax.config import default_config

    recall = {f"{way}_r{k}": 0.1 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    numbers = {"parameters": 10, "active_parameters": 8, "pairs": 100, "flops": 1e9, "expert": 0, **recall}
    results = {title: numbers for title in ("base", "stage 1 alone", "CLIP-MoE")}
    measured = {
        "time": 1.0,
        "learning_rate": 1e-3,
        "pairs_per_second": 10.0,
        "input_wait_fraction": 0.1,
        "batch_accuracy": 0.5,
    }
    lines = [{"phase": "base", "step": step, "loss": 1 / step, **measured} for step in range(1, 9)]
    (folder / "eval").mkdir()
    (folder / "eval" / "results.json").write_text(json.dumps(results, indent=1))
    (folder / "config.json").write_text(json.dumps({"seed": 0, **default_config().to_dict()}, indent=1))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_run(folder: pathlib.Path) -> None:
    from etils import epath

    from clipmoe_jax.reporting.page import render

    render(epath.Path(folder))


def read_model(folder: pathlib.Path) -> None:
    from clipmoe_jax.interop import load

    path = folder / "model"
    load.read_model(str(path if path.exists() else folder / "model.pt"))


def write_evaluation(folder: pathlib.Path) -> None:
    from clipmoe_jax.data.preparation import prepare
    from clipmoe_jax.data.sources import open_source

    for i in range(6):  # two classes, one of them with the five images that a linear probe wants
        file = folder / "images" / ("cat" if i < 5 else "dog") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
    prepare(open_source(f"classes:{folder / 'images'}"), str(folder / "set"))
    shutil.rmtree(folder / "images")
    np.savez_compressed(folder / "classifier.npz", known=np.ones((6, 2)), unknown=np.ones((6, 2)))


def read_evaluation(folder: pathlib.Path) -> None:
    from clipmoe_jax.evaluation.evaluations import parse_evaluation

    data = folder / "set"
    line = f"ood:{data}?unknown={data}&train={data}&classifier={folder / 'classifier.npz'}"
    _ = parse_evaluation(line).data


FORMATS: dict[str, Format] = {
    **{
        f"image: {name}": Format(functools.partial(write_picture, format=name), read_picture)
        for name in IMAGE_FORMATS
    },
    "sharegpt4v": Format(
        functools.partial(write_sharegpt4v, lines=False),
        functools.partial(read_source, spec="sharegpt4v:FOLDER/x.json?images=FOLDER/images"),
    ),
    "sharegpt4v, lines": Format(
        functools.partial(write_sharegpt4v, lines=True),
        functools.partial(read_source, spec="sharegpt4v:FOLDER/x.jsonl?images=FOLDER/images"),
    ),
    "coco": Format(
        write_coco, functools.partial(read_source, spec="coco:FOLDER/x.json?images=FOLDER/images")
    ),
    "flickr30k": Format(
        write_flickr30k, functools.partial(read_source, spec="flickr30k:FOLDER/x.token?images=FOLDER/images")
    ),
    "csv": Format(write_csv, functools.partial(read_source, spec="csv:FOLDER/x.tsv?images=FOLDER/images")),
    "folder": Format(write_folder, functools.partial(read_source, spec="folder:FOLDER/images")),
    "img2dataset": Format(write_img2dataset, functools.partial(read_source, spec="img2dataset:FOLDER")),
    **{
        f"webdataset{suffix}, {name}": Format(
            functools.partial(write_webdataset, format=number, suffix=suffix),
            functools.partial(read_source, spec="webdataset:FOLDER"),
        )
        for suffix in ("",)
        for name, number in (("pax", tarfile.PAX_FORMAT), ("gnu", tarfile.GNU_FORMAT))
    },
    "parquet": Format(write_parquet, functools.partial(read_source, spec="parquet:FOLDER")),
    "huggingface": Format(write_huggingface, functools.partial(read_source, spec="huggingface:FOLDER")),
    **{
        f"tfds, {form}": Format(
            functools.partial(write_captioned, form=form),
            functools.partial(read_source, spec="tfds:set?data_dir=FOLDER&split=val&caption=captions"),
        )
        for form in ("tfrecord", "array_record")
    },
    "prepared set": Format(write_prepared, read_prepared),
    "model folder": Format(write_model, read_model),
    "model folder of an MoE": Format(functools.partial(write_model, experts=3), read_model),
    "transformers": Format(functools.partial(write_exported, to="huggingface"), read_model),
    "transformers, an MoE": Format(
        functools.partial(write_exported, to="huggingface", experts=3), read_model
    ),
    "released code": Format(functools.partial(write_exported, to="clipmoe", experts=3), read_model),
    "transformers, in shards": Format(write_sharded, read_model),
    "open_clip": Format(functools.partial(write_exported, to="openclip"), read_model),
    "TorchScript": Format(write_torchscript, read_model),
    "pickle": Format(functools.partial(write_pickled, zipped=False), read_model),
    "zipped pickle": Format(functools.partial(write_pickled, zipped=True), read_model),
    "classifier": Format(write_evaluation, read_evaluation),
    "mmvp": Format(write_mmvp, read_mmvp),
    "run": Format(write_run, read_run),
}


def make_examples(folder: pathlib.Path) -> None:
    """Writes a good example of each format that is not there yet, and reads it."""
    for name, format in FORMATS.items():
        if not (example := folder / name).exists():
            example.mkdir(parents=True)
            format.write(example)
        format.read(example)


def prepare_case(seed: int, examples: pathlib.Path, case: pathlib.Path) -> str:
    """Copies a seed's example to a folder and damages it there; returns the format's name."""
    rng = random.Random(seed)
    name = rng.choice(sorted(FORMATS))
    shutil.copytree(examples / name, case)
    files = sorted(path for path in case.rglob("*") if path.is_file())
    for path in rng.sample(files, min(len(files), rng.choice((1, 1, 1, 2)))):
        path.write_bytes(damage(path.read_bytes(), rng))
    return name


def run_case(seed: int, examples: pathlib.Path) -> dict[str, Any]:
    """Runs a case in this process; returns its line for cases.jsonl. Hangs and blow-ups are not seen here."""
    from clipmoe_jax.core import cli

    with tempfile.TemporaryDirectory() as scratch:
        case = pathlib.Path(scratch) / "case"
        name = prepare_case(seed, examples, case)
        outcome, detail = "read", ""
        _Watch.start(scratch)
        try:
            FORMATS[name].read(case)
        except Exception as error:
            outcome = "told" if cli._is_for_people(error) else "trace"
            detail = str(error)[:200] if outcome == "told" else traceback.format_exc()[-2000:]
        finally:
            escaped = _Watch.stop()
        if escaped:
            outcome, detail = "escaped", escaped
    return {"seed": seed, "format": name, "outcome": outcome, "detail": detail.replace(scratch, "")}


class _Watch:
    """An audit hook, which cannot be taken away again: it looks while a case runs."""

    _folder, _escaped, _is_added = "", "", False

    @classmethod
    def start(cls, folder: str) -> None:
        if not cls._is_added:
            sys.addaudithook(cls._see)
            cls._is_added = True
        cls._folder, cls._escaped = folder, ""

    @classmethod
    def stop(cls) -> str:
        cls._folder = ""
        return cls._escaped

    @classmethod
    def _see(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if not cls._folder:
            return
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else 0
            inside = isinstance(path, int) or os.fspath(path) in (b"/dev/null", "/dev/null")
            if writes and not inside and not os.path.abspath(os.fsdecode(path)).startswith(cls._folder):
                cls._escaped = f"opened {path!r} to write"
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            cls._escaped = f"{event} {arguments!r}"[:200]


def work(examples: pathlib.Path) -> None:
    """Runs the cases whose seeds come on stdin, and answers each with a line on stdout."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import jax  # before a case could be charged with its memory

    jax.devices()
    for format in FORMATS:
        FORMATS[format].read(examples / format)
    out.write("ready\n")
    for line in sys.stdin:
        out.write(json.dumps(run_case(int(line), examples)) + "\n")


class Worker:
    """A process that runs cases, one after the other."""

    def __init__(self, command: Sequence[str]):
        """command: of a process that works as `work`."""
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self._memory_at_start = self._memory()
        self._seed, self._began = -1, 0.0

    def fileno(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def start(self, seed: int) -> None:
        assert self._process.stdin is not None
        self._seed, self._began = seed, time.monotonic()
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """Returns the line of the case that ended; a blow-up if the process did."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else self._ended("blow-up", f"exit code {self._process.wait()}")

    def check(self) -> dict[str, Any] | None:
        """Ends the process and returns a line if its case takes too long or too much."""
        if time.monotonic() - self._began > SECONDS:
            return self._ended("hang", f"more than {SECONDS} s")
        if self._memory() - self._memory_at_start > GIGABYTES * 1e9:
            return self._ended("blow-up", f"more than {GIGABYTES} GB")
        return None

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ended(self, outcome: str, detail: str) -> dict[str, Any]:
        self.end()
        name = random.Random(self._seed).choice(sorted(FORMATS))
        return {"seed": self._seed, "format": name, "outcome": outcome, "detail": detail}

    def _memory(self) -> int:
        try:
            pages = pathlib.Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        except (FileNotFoundError, IndexError):
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def run_cases(seeds: list[int], examples: pathlib.Path, num_workers: int) -> Iterator[dict[str, Any]]:
    """Yields the lines of all cases as they end."""
    waiting, busy = list(reversed(seeds)), []
    command = [sys.executable, "-m", "benchmarks.fuzz", f"--work={examples}"]
    idle = [Worker(command) for _ in range(min(num_workers, len(waiting)))]
    try:
        while waiting or busy:
            while idle and waiting:
                worker = idle.pop()
                worker.start(waiting.pop())
                busy.append(worker)
            ready, _, _ = select.select(busy, [], [], 0.02)
            for worker in list(busy):
                line = worker.result() if worker in ready else worker.check()
                if line is not None:
                    busy.remove(worker)
                    idle.append(worker if worker.is_alive() else Worker(command))
                    yield line
    finally:
        for worker in (*idle, *busy):
            worker.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/fuzz"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.work:
        work(flags.work)
        return
    make_examples(flags.out / "examples")
    file = flags.out / "cases.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {line["seed"] for line in lines}
    seeds = [seed for seed in range(flags.first, flags.first + flags.cases) if seed not in done]
    began = time.monotonic()
    with file.open("a") as log:
        for number, line in enumerate(run_cases(seeds, flags.out / "examples", flags.workers), 1):
            lines.append(line)
            log.write(json.dumps(line) + "\n")
            log.flush()
            if line["outcome"] in FAULTS:
                print(f"seed {line['seed']}: {line['format']}: {line['outcome']}: {line['detail']}")
            if number % 1000 == 0:
                print(f"{number:,} cases in {time.monotonic() - began:.0f} s", flush=True)
    counts = collections.Counter(line["outcome"] for line in lines)
    print(", ".join(f"{counts[outcome]:,} {outcome}" for outcome in ("read", "told", *FAULTS)))


if __name__ == "__main__":
    main()
