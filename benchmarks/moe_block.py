"""The MoE block against a dense feed-forward layer: time of each dispatch, as ratios within one run.

    python -m benchmarks.moe_block                       # the sizes of the README's table
    python -m benchmarks.moe_block --tokens=25700 --width=1024 --hidden=4096 --dtype=bfloat16

Two ratios: forward, and forward plus the gradient for inputs and router (the experts are frozen, as in router
fine-tuning). Runs are interleaved, so that a change of the machine's speed reaches all alike; the ratio is
the median of the ratios of each round.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp

from clipmoe_jax.models.moe import MoeMlp
from clipmoe_jax.models.transformer import Mlp, quick_gelu


def measure(functions: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, after a warm-up call."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1600)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--selected", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    dtype = jnp.dtype(args.dtype)
    x = jax.random.normal(jax.random.key(0), (1, args.tokens, args.width), dtype)
    target = jax.random.normal(jax.random.key(1), x.shape, dtype)

    mlp = Mlp(args.hidden, quick_gelu, dtype)
    layers = {"dense FFN": (lambda params, x: mlp.apply(params, x), mlp.init(jax.random.key(2), x))}
    for dispatch in ("ragged", "capacity", "dense"):
        moe = MoeMlp(args.experts, args.selected, args.hidden, quick_gelu, dispatch=dispatch, dtype=dtype)
        layers[dispatch] = (
            lambda params, x, moe=moe: moe.apply(params, x)[0],
            moe.init(jax.random.key(2), x),
        )

    def gradient_function(apply, params):
        """Gradient for the inputs and, in a MoE, the router."""
        router = params["params"].get("router", {})

        def outputs_and_gradients(x, router):
            def forward(x, router):
                merged = {**params["params"], **({"router": router} if router else {})}
                return apply({"params": merged}, x)

            y, pullback = jax.vjp(forward, x, router)
            return y, pullback(target)

        compiled = jax.jit(outputs_and_gradients)
        return lambda: compiled(x, router)

    forward, backward = {}, {}
    for name, (apply, params) in layers.items():
        compiled = jax.jit(apply)
        forward[name] = lambda compiled=compiled, params=params: compiled(params, x)
        backward[name] = gradient_function(apply, params)

    device = jax.devices()[0]
    print(
        f"{device.device_kind}: N={args.tokens} D={args.width} F={args.hidden} E={args.experts} "
        f"K={args.selected} {args.dtype}"
    )
    print(f"{'':12}{'forward':>12}{'ratio':>8}{'forward+gradient':>20}{'ratio':>8}")
    results = {}
    timings = measure(forward, args.rounds), measure(backward, args.rounds)
    for name in layers:
        row = []
        for seconds in timings:
            ratios = [a / b for a, b in zip(seconds[name], seconds["dense FFN"], strict=True)]
            row += [statistics.median(seconds[name]) * 1e3, statistics.median(ratios)]
        results[name] = row
        print(f"{name:12}{row[0]:>9.1f} ms{row[1]:>7.2f}x{row[2]:>17.1f} ms{row[3]:>7.2f}x")
    print(json.dumps({"args": vars(args), "device": device.device_kind, "results": results}))


if __name__ == "__main__":
    main()
