"""The cost of a model at inference: parameters, FLOPs, time and memory, on one device.

Letters: N examples, L length.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from clipmoe_jax.core import trees
from clipmoe_jax.core.metrics import progress_bar
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import Clip, ClipConfig, abstract_params
from clipmoe_jax.models.flops import count_active_parameters
from clipmoe_jax.models.transformer import ComputeConfig

BATCH_SIZES = (8, 32, 128)
COUNTED_BATCH = 8  # in which XLA counts: K of E experts' slots come out even


def costs(
    models: Mapping[str, tuple[Clip, trees.Params]],
    images: np.ndarray,
    tokens: np.ndarray,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rounds: int = 15,
) -> dict[str, dict[str, Any]]:
    """Returns {title: numbers} of models, timed in turns so that whatever slows the machine slows all.

    models: {title: (model as it is to be run, params whole in this process)}. images (N, H, W, 3) uint8 and
    tokens (N, L) int32, repeated where a batch takes more.
    Numbers: those of `counted_costs`; xla_flops_per_image (`xla_flops`); latency_ms, an image and a caption
    together, median of the rounds; pairs_per_second at best_batch, the fastest of the batch sizes; peak_bytes
    at the largest of them, the same for all models: arguments (the parameters among them), results and
    temporaries of the compiled program.
    """
    device, encoders, results = jax.local_devices()[0], {}, {}
    for title, (model, params) in models.items():
        encoders[title] = (jax.jit(_encode_pairs(model)), jax.device_put(params, device))
        results[title] = {
            **counted_costs(model.config, tokens.shape[1]),
            "xla_flops_per_image": xla_flops(model.config, "visual"),
            "pairs_per_second": 0.0,
        }
    sizes = sorted({1, *batch_sizes})
    with progress_bar("timing", len(sizes), "batch size") as progress:
        for size in sizes:
            rows = np.arange(size)
            pairs = jax.device_put((images[rows % len(images)], tokens[rows % len(tokens)]), device)
            programs = {
                title: encode.lower(params, *pairs).compile() for title, (encode, params) in encoders.items()
            }
            calls = {title: _call(programs[title], encoders[title][1], *pairs) for title in models}
            for title, seconds in interleaved_seconds(calls, rounds).items():
                median, numbers = statistics.median(seconds), results[title]
                if size == 1:
                    numbers["latency_ms"] = 1e3 * median
                if size in batch_sizes and size / median > numbers["pairs_per_second"]:
                    numbers |= {"pairs_per_second": size / median, "best_batch": size}
                numbers["peak_bytes"] = peak_bytes(programs[title])  # the last size is the largest
            progress.update(1)
    return results


def counted_costs(config: ClipConfig, length: int) -> dict[str, float]:
    """Returns what the architecture alone tells: parameters, active_parameters; flops_per_image and
    flops_per_caption (of `length` tokens) of the experts that a token visits, by hand."""
    params = abstract_params(config)
    return {
        "parameters": trees.count_parameters(params),
        "active_parameters": count_active_parameters(params, config),
        "flops_per_image": hand_flops(config, "visual"),
        "flops_per_caption": hand_flops(config, "text", length),
    }


def hand_flops(config: ClipConfig, tower: str, length: int | None = None) -> float:
    """Returns FLOPs of an image ("visual") or a caption of `length` tokens ("text"), K experts to a token."""
    return float(sum(layer.flops for layer in flops.layers(config, tower, length)))


def xla_flops(config: ClipConfig, tower: str, length: int | None = None) -> float:
    """Returns FLOPs of an image or caption, as XLA counts the compiled program: norms and softmax included.

    XLA counts what a dispatch computes. That is the active path for buffers of C = N K / E rows an expert
    ("capacity", factor 1): K products to a token, as if routing were even. "dense" computes E of them, and of
    the loops of "ragged" XLA counts one turn. Attention is XLA's, since it does not see into cuDNN's, and
    everything float32, so that no conversions are counted.
    """
    model = Clip(config, ComputeConfig(dispatch="capacity", capacity_factor=1.0))
    if tower == "visual":
        size = config.vision.image_size
        inputs = jax.ShapeDtypeStruct((COUNTED_BATCH, size, size, 3), np.uint8)
    else:
        if config.text is None:
            raise ValueError("the model has no text tower, of which to count FLOPs")
        inputs = jax.ShapeDtypeStruct((COUNTED_BATCH, length or config.text.context_length), np.int32)
    method = "encode_image" if tower == "visual" else "encode_text"
    encode = jax.jit(lambda params, inputs: model.apply({"params": params}, inputs, method=method)[0])
    counts: Any = encode.lower(abstract_params(config), inputs).compile().cost_analysis()
    return float(counts["flops"]) / COUNTED_BATCH


def interleaved_seconds(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each call in each round, one after the other, after a first one untimed."""
    seconds = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes of arguments, results and temporaries, by `memory_analysis`; an argument whose place
    a result takes counts once."""
    memory: Any = compiled.memory_analysis()  # None on no platform that we know
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _encode_pairs(model: Clip) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def encode(params, images, tokens):
        outputs: Any = model.apply({"params": params}, images, tokens)
        return outputs["image_features"], outputs["text_features"]

    return encode


def _call(program: jax.stages.Compiled, *arguments: Any) -> Callable[[], Any]:
    return lambda: program(*arguments)
