"""Times a loaded model beside transformers, open_clip and ONNX Runtime: random weights, on CPU.

    python -m benchmarks.features --rounds=5 --out=features.json

Three parts: "first", from the start of a process to the features of 10 JPEGs, beside open_clip, in float32;
"encode", batches that are arrays already; "files", JPEGs to features, beside open_clip with a DataLoader of 2
workers. These two compute in --dtype, and without ONNX's file, which is of float32, in another. Each round
runs all programs, one after the other.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import torchvision_operators
from benchmarks.timing import Program, Side, Worker

OURS, TRANSFORMERS, OPEN_CLIP, ONNX = "clipmoe_jax", "transformers", "open_clip", "onnxruntime"
HUGGINGFACE, LOCAL_DIR = "huggingface", "openclip"  # formats, and folders of the model in each
PARTS = ("first", "encode", "files")
OPEN_CLIPS_PRECISION = {"float32": "fp32", "bfloat16": "bf16"}
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of features, beside the largest
FIRST, NUM_WORKERS, FILES_BATCH = 10, 2, 64


def make_program(kind: str, sizes: dict[str, Any]) -> tuple[Program, dict[str, Any]]:
    """Returns the program of a kind, "image", "text" or "files", and {"features" of its first call}.

    sizes: {"program", "folder" of the models and the images, "batch", "image_size", "dtype"}.
    """
    if kind == "files":
        inputs: Any = sorted(map(str, (pathlib.Path(sizes["folder"]) / "images").iterdir()))
    else:
        inputs = arrays(kind, sizes["batch"], sizes["image_size"])
    call = ENCODERS[sizes["program"]](pathlib.Path(sizes["folder"]), kind, inputs, sizes["dtype"])
    return Program(call, lambda result: None, 0.0), {"features": np.asarray(call())[:2].tolist()}


def arrays(kind: str, batch: int, image_size: int) -> np.ndarray:
    """Returns random images, uint8 (batch, H, W, 3), or captions that fill their 77 tokens."""
    rng = np.random.default_rng(0)
    if kind == "image":
        return rng.integers(0, 256, (batch, image_size, image_size, 3), np.uint8)
    tokens = rng.integers(1, 49406, (batch, 77))
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    return tokens


Call = Callable[[], np.ndarray]


def _ours(folder: pathlib.Path, kind: str, inputs: Any, dtype: str) -> Call:
    from PIL import Image

    import clipmoe_jax

    model = clipmoe_jax.load(str(folder / HUGGINGFACE), dtype=dtype)
    if kind == "files":
        return lambda: np.asarray(model.encode_image([Image.open(file) for file in inputs]))
    encode = model.encode_image if kind == "image" else model.encode_text
    return lambda: np.asarray(encode(inputs))


def _transformers(folder: pathlib.Path, kind: str, inputs: Any, dtype: str) -> Call:
    torchvision_operators.declare()
    import torch
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder / HUGGINGFACE, dtype=getattr(torch, dtype)).eval()
    encode = model.get_image_features if kind == "image" else model.get_text_features
    tensor = _tensor(inputs, dtype)

    def call() -> np.ndarray:
        with torch.inference_mode():
            return encode(tensor).pooler_output.float().numpy()

    return call


def _open_clip(folder: pathlib.Path, kind: str, inputs: Any, dtype: str) -> Call:
    torchvision_operators.declare()
    import open_clip
    import torch
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{folder / LOCAL_DIR}", precision=OPEN_CLIPS_PRECISION[dtype]
    )
    model.eval()

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(inputs)

        def __getitem__(self, i: int) -> Any:
            return preprocess(Image.open(inputs[i]))

    def of_files() -> np.ndarray:
        loader = torch.utils.data.DataLoader(
            # "fork" is what a program that was not spawned has.
            *(Files(), FILES_BATCH),
            num_workers=NUM_WORKERS,
            multiprocessing_context="fork",
        )
        with torch.inference_mode():
            parts = [model.encode_image(batch.to(getattr(torch, dtype))).float() for batch in loader]
        return np.concatenate(parts)

    if kind == "files":
        multiprocessing.current_process().daemon = False  # or it could not have the loader's workers
        return of_files
    encode, tensor = model.encode_image if kind == "image" else model.encode_text, _tensor(inputs, dtype)

    def of_arrays() -> np.ndarray:
        with torch.inference_mode():
            return encode(tensor).float().numpy()

    return of_arrays


def _onnx(folder: pathlib.Path, kind: str, inputs: Any, dtype: str) -> Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / f"{kind}.onnx", providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: _tensor(inputs, dtype).numpy()}
    return lambda: session.run(None, given)[0]


ENCODERS: dict[str, Callable[[pathlib.Path, str, Any, str], Call]] = {
    OURS: _ours,
    TRANSFORMERS: _transformers,
    OPEN_CLIP: _open_clip,
    ONNX: _onnx,
}


def _tensor(inputs: np.ndarray, dtype: str) -> Any:
    """Returns what PyTorch's models take: images normalised already, as (B, 3, H, W) of `dtype`."""
    import torch

    from clipmoe_jax.models.inputs import MEAN, STD

    if inputs.ndim == 2:
        return torch.tensor(inputs)
    normalized = (inputs / 255 - np.array(MEAN)) / np.array(STD)
    return torch.tensor(normalized, dtype=getattr(torch, dtype)).permute(0, 3, 1, 2).contiguous()


def write_inputs(folder: pathlib.Path, variant: str, num_files: int) -> int:
    """Writes the model in all formats, and images. Returns the model's image size."""
    from benchmarks.data import natural_image
    from benchmarks.workload import Workload
    from clipmoe_jax.convert import convert
    from clipmoe_jax.models.model_folder import save_model

    workload = Workload(variant, 1, 77, "float32", "cpu")
    config = workload.model("mcl").config
    save_model(folder / "model", config, workload.params("mcl"))
    for form in (HUGGINGFACE, LOCAL_DIR):
        convert(str(folder / "model"), form, str(folder / form))
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    different = [natural_image(rng) for _ in range(min(num_files, 50))]
    for i in range(num_files):
        (folder / "images" / f"{i:06d}.jpg").write_bytes(different[i % len(different)])
    return config.vision.image_size


def export_onnx(folder: pathlib.Path, image_size: int) -> None:
    """Writes the towers of transformers' model as ONNX files."""
    torchvision_operators.declare()
    import torch
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder / HUGGINGFACE, attn_implementation="eager").eval()

    class Tower(torch.nn.Module):
        def __init__(self, encode: Callable[..., Any]):
            super().__init__()
            self.model, self._encode = model, encode

        def forward(self, inputs: Any) -> Any:
            return self._encode(inputs).pooler_output

    for kind, encode in (("image", model.get_image_features), ("text", model.get_text_features)):
        example = _tensor(arrays(kind, 2, image_size), "float32")
        options = {"dynamic_axes": {"inputs": {0: "batch"}}, "input_names": ["inputs"], "dynamo": False}
        torch.onnx.export(Tower(encode).eval(), (example,), folder / f"{kind}.onnx", **options)


def first_features(program: str, folder: pathlib.Path) -> float:
    """Returns the seconds from the start of a process to the features of 10 JPEGs."""
    began = time.perf_counter()
    code = f"from benchmarks import features; features.first({program!r}, {str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def first(program: str, folder: str) -> None:
    """Computes the features of 10 JPEGs as a user's program does."""
    files = sorted(map(str, (pathlib.Path(folder) / "images").iterdir()))[:FIRST]
    if program == OURS:
        _ours(pathlib.Path(folder), "files", files, "float32")()
        return
    torchvision_operators.declare()
    import open_clip
    import torch
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}/{LOCAL_DIR}")
    with torch.inference_mode():
        model.eval().encode_image(torch.stack([preprocess(Image.open(file)) for file in files])).numpy()


def in_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each call, round by round."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(call())
    return seconds


def measure(kind: str, programs: list[str], sizes: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each program. Raises ValueError if their features differ."""
    side = Side("benchmarks.features", {})
    workers = {program: Worker(side, kind, sizes | {"program": program}) for program in programs}
    ours, tolerance = np.array(workers[OURS].told["features"]), TOLERANCE[sizes["dtype"]]
    for program, worker in workers.items():
        if not np.allclose(
            worker.told["features"], ours, rtol=tolerance, atol=tolerance * np.abs(ours).max()
        ):
            raise ValueError(f"{kind}: {program} has other features than {OURS}")
    seconds = in_turns({program: worker.seconds for program, worker in workers.items()}, rounds)
    for worker in workers.values():
        worker.close()
    return seconds


def main() -> None:
    """Measures, prints a line for each row, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas between")
    parser.add_argument("--variant", default="ViT-B/32")
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--dtype", default="float32", choices=TOLERANCE, help="of the parts encode and files")
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="a JSON file for the seconds of all rounds")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def add(name: str, seconds: dict[str, list[float]]) -> None:
        rows.append({"name": name, "seconds": seconds})
        for program, times in seconds.items():
            ratio = statistics.median(t / o for t, o in zip(times, seconds[OURS], strict=True))
            print(f"{name:20}{program:14}{statistics.median(times):10.3f} s{ratio:8.2f} x ours", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder, parts = pathlib.Path(name), args.parts.split(",")
        image_size = write_inputs(folder, args.variant, args.files)
        sizes = {"folder": name, "image_size": image_size, "batch": 0, "dtype": args.dtype}
        encoders = [program for program in ENCODERS if program != ONNX or args.dtype == "float32"]
        if ONNX in encoders and "encode" in parts:
            export_onnx(folder, sizes["image_size"])
        if "first" in parts:
            for cache, rounds in (("empty", 1), ("filled", args.rounds)):
                os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
                calls = {p: lambda p=p: first_features(p, folder) for p in (OURS, OPEN_CLIP)}
                add(f"first, cache {cache}", in_turns(calls, rounds))
        for batch in map(int, args.batches.split(",")) if "encode" in parts else ():
            for kind in ("image", "text"):
                of_batch = measure(kind, encoders, sizes | {"batch": batch}, args.rounds)
                add(f"{kind}, batch {batch}", of_batch)
        if "files" in parts:
            add(f"{args.files:,} files", measure("files", [OURS, OPEN_CLIP], sizes, args.rounds))
    if args.out:
        arguments = {name: value for name, value in vars(args).items() if name != "out"}
        everything = {"arguments": arguments, "cores": os.cpu_count(), "rows": rows}
        pathlib.Path(args.out).write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
