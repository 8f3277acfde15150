"""Exports models of ViT-B/32's size, runs them without this package's code, and compares the features.

    python -m benchmarks.exports --to=onnx            # and stablehlo: the tables of docs/interop.md
    python -m benchmarks.exports --to=onnx --experts=feed_forward
    python -m benchmarks.exports --model=runs/demo/moe/params --data=runs/demo/data/retention

The models are random: a dense one, or one with four experts of which each token uses two. The number is the
largest difference of unit features, over the largest of their values. An input with a token whose second and
third router logits lie within 1e-4 may go to another expert by rounding: such inputs are counted apart.
The last line tells what int8 loses: the cosine to float32 features, and zero-shot accuracy on a prepared data
set of labelled images. Letters: B batch, M MoE blocks, L length, E experts.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence

import jax
import jax.export
import numpy as np
import safetensors.numpy
from etils import epath

from clipmoe_jax.convert import WRITERS
from clipmoe_jax.core import trees
from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation.evaluations import parse_evaluation
from clipmoe_jax.interop import programs
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import METHODS, VARIANTS, Clip, ClipConfig, normalize, normalize_features
from clipmoe_jax.models.inputs import END_ID
from clipmoe_jax.models.transformer import EXPERT_LAYERS, MoeConfig

BATCHES = (1, 3, 32)
CLOSE = 1e-4  # router logits between which rounding may decide


def make_model(experts: str) -> tuple[ClipConfig, trees.Params]:
    """Returns a random model; experts: "none", or one of EXPERT_LAYERS."""
    moe = None if experts == "none" else MoeConfig(4, 2, expert_layers=experts)
    config = ClipConfig(**{**vars(VARIANTS["ViT-B/32"]), "moe": moe})
    size, length = config.vision.image_size, config.text.context_length if config.text else 0
    images, tokens = np.zeros((1, size, size, 3), np.float32), np.zeros((1, length), np.int32)
    params = jax.jit(Clip(config).init)(jax.random.key(0), images, tokens)["params"]
    return config, jax.tree.map(np.asarray, params)


def make_inputs(config: ClipConfig, count: int) -> dict[str, np.ndarray]:
    """Returns pixels uint8 (B, S, S, 3) and token ids int32 (B, L) of captions of many lengths."""
    assert config.text
    rng, size, length = np.random.default_rng(count), config.vision.image_size, config.text.context_length
    ids = rng.integers(1, END_ID - 1, (count, length)).astype(np.int32)
    ids[np.arange(count), rng.integers(2, length, count)] = END_ID
    return {"image": rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8), "text": ids}


def as_foreign(batch: np.ndarray) -> np.ndarray:
    """Returns pixels as floats (B, 3, S, S), token ids as int64."""
    is_image = batch.dtype == np.uint8
    return np.asarray(normalize(batch)).transpose(0, 3, 1, 2) if is_image else batch.astype(np.int64)


def run_onnx(folder: epath.Path, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a tower of a folder that `--to=onnx` wrote."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
    [of] = session.get_inputs()

    return lambda batch: np.asarray(session.run(None, {of.name: as_foreign(batch)})[0])


def run_stablehlo(folder: epath.Path, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a tower of a folder that `--to=stablehlo` wrote."""
    program = jax.export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    return lambda batch: np.asarray(program.call(weights, batch))


RUNNERS = {"onnx": run_onnx, "stablehlo": run_stablehlo}


def is_close(router_logits: np.ndarray, num_selected: int) -> np.ndarray:
    """Returns for which inputs rounding may choose an expert: (B, M, L, E) -> (B,) bool."""
    ordered = -np.sort(-router_logits, axis=-1)
    gaps = ordered[..., num_selected - 1] - ordered[..., num_selected]
    return (gaps < CLOSE).any(axis=(1, 2))


def compare_random(to: str, experts: str) -> None:
    """Prints a row for each tower and batch."""
    config, params = make_model(experts)
    model = Clip(config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = epath.Path(temporary)
        WRITERS[to](folder, config, params)
        for name, method in METHODS.items():
            run = RUNNERS[to](folder, name)

            @jax.jit
            def encode(params, batch, method=method):
                return model.apply({"params": params}, batch, method=method)

            for count in BATCHES:
                batch = make_inputs(config, count)[name]
                features, aux = encode(params, batch)
                expected, found = (np.asarray(normalize_features(f)) for f in (features, run(batch)))
                errors = np.abs(found - expected).max(axis=1) / np.abs(expected).max()
                close = np.zeros(count, bool)
                if config.moe:
                    close = is_close(np.asarray(aux["router_logits"]), config.moe.num_selected_experts)
                error = f"{errors[~close].max():.1e}" if not close.all() else "-"
                apart = f"; {close.sum()} apart, {errors[close].max():.1e}" if close.any() else ""
                print(f"{to}, {experts}, {name}, {count}: {error}{apart}", flush=True)


def quantized(config: ClipConfig, params: trees.Params) -> dict[str, dict[str, Callable]]:
    """Returns {way: {tower: function of a batch}} of int8 in ONNX and in PyTorch."""
    import torch

    with tempfile.TemporaryDirectory() as temporary:
        folder = epath.Path(temporary)
        WRITERS["onnx-int8"](folder, config, params)
        onnx = {name: run_onnx(folder, name) for name in METHODS}

    def run(tower: torch.nn.Module) -> Callable[[np.ndarray], np.ndarray]:
        tower = torch.ao.quantization.quantize_dynamic(tower, {torch.nn.Linear}, torch.qint8)

        def run(batch: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return tower(torch.from_numpy(as_foreign(batch))).numpy()

        return run

    towers = programs.torch_towers(config, params)
    return {"ONNX": onnx, "PyTorch": {name: run(tower) for name, tower in towers.items()}}


class Towers:
    """Functions of a batch as evaluations see a model. Keeps the features that it gave."""

    def __init__(self, towers: dict[str, Callable], config: ClipConfig):
        assert config.text
        self._towers, self._size = towers, config.vision.image_size
        self._tokenizer = Tokenizer(config.text.context_length)
        self.features = {}

    def images(self, records: Records) -> np.ndarray:
        """Returns (N, d) float32 unit features of a data set's images."""
        pixels = [preprocess_image(records[i]["image"], self._size) for i in range(len(records))]
        return self._run("image", np.stack(pixels))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (T, d) float32 unit features."""
        return self._run("text", self._tokenizer(texts))

    def _run(self, name: str, batch: np.ndarray) -> np.ndarray:
        parts = [self._towers[name](batch[i : i + 256]) for i in range(0, len(batch), 256)]
        self.features[name] = np.asarray(normalize_features(np.concatenate(parts)))
        return self.features[name]


def measure_int8(path: str, data: str) -> None:
    """Prints for each way the cosine to float32 features, mean and least, and zero-shot accuracy."""
    model = read_model(path)
    clip, evaluation, ways = Clip(model.config), parse_evaluation(f"zero_shot:{data}"), {"float32": {}}
    for name, method in METHODS.items():

        @jax.jit
        def encode(batch, method=method):
            return clip.apply({"params": model.params}, batch, method=method)[0]

        ways["float32"][name] = encode
    exact = {}
    for way, towers in (ways | quantized(model.config, model.params)).items():
        subject = Towers(towers, model.config)
        accuracy = evaluation.measure(subject)["top1"]
        exact = exact or subject.features
        cosines = {name: (exact[name] * features).sum(axis=1) for name, features in subject.features.items()}
        told = ", ".join(f"{name} {c.mean():.4f} (least {c.min():.4f})" for name, c in cosines.items())
        print(f"{way}: {told}; zero-shot {100 * accuracy:.1f} %", flush=True)


def main() -> None:
    """Prints what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", choices=RUNNERS)
    parser.add_argument("--experts", choices=("none", *EXPERT_LAYERS), default="none")
    parser.add_argument("--model")
    parser.add_argument("--data")
    arguments = parser.parse_args()
    if arguments.to:
        compare_random(arguments.to, arguments.experts)
    else:
        measure_int8(arguments.model, arguments.data)


if __name__ == "__main__":
    main()
