"""Times the MoE block with each dispatch against a dense feed-forward layer, as ratios within one run.

    python -m benchmarks.moe_block                       # the sizes of docs/benchmarks.md
    python -m benchmarks.moe_block --tokens=25700 --width=1024 --hidden=4096 --dtype=bfloat16

Two ratios: forward, and forward plus the gradient for inputs and router (the experts are frozen, as in router
fine-tuning). Runs are interleaved, so that a change of the machine's speed reaches all alike; the ratio is
the median of the ratios of each round.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from clipmoe_jax import config as configs
from clipmoe_jax.analysis.cost import interleaved_seconds
from clipmoe_jax.core import sharding
from clipmoe_jax.models.feed_forward import Mlp, quick_gelu
from clipmoe_jax.models.moe import MoeMlp

DENSE = "dense FFN"
LAYERS = (DENSE, "ragged", "capacity", "dense")  # the others are dispatches
Calls = dict[str, Callable[[], Any]]


def make_calls(
    tokens: int, width: int, hidden: int, experts: int, selected: int, dtype: str
) -> tuple[Calls, Calls]:
    """Returns {layer: call} of the forward pass, and of the forward pass with the gradient."""
    dtype = jnp.dtype(dtype)
    x = jax.random.normal(jax.random.key(0), (1, tokens, width), dtype)
    target = jax.random.normal(jax.random.key(1), x.shape, dtype)

    def apply_function(layer):
        """Returns a layer's function and its params."""
        if layer == DENSE:
            mlp = Mlp(hidden, quick_gelu, dtype)
            return mlp.apply, mlp.init(jax.random.key(2), x)
        grouped_mlp = configs.compute_config(configs.default_config(), sharding.platform()).grouped_mlp
        moe = MoeMlp(
            experts, selected, hidden, quick_gelu, dispatch=layer, grouped_mlp=grouped_mlp, dtype=dtype
        )
        return (lambda params, x: moe.apply(params, x)[0]), moe.init(jax.random.key(2), x)

    def gradient_function(apply, params):
        """Returns the call for the gradient of the inputs and, in a MoE, the router."""
        router = params["params"].get("router", {})

        def outputs_and_gradients(params, x, router, target):
            def forward(x, router):
                merged = {**params["params"], **({"router": router} if router else {})}
                return apply({"params": merged}, x)

            y, pullback = jax.vjp(forward, x, router)
            return y, pullback(target)

        compiled = jax.jit(outputs_and_gradients)
        return lambda: compiled(params, x, router, target)

    forward, backward = {}, {}
    for name in LAYERS:
        apply, params = apply_function(name)
        compiled = jax.jit(apply)
        forward[name] = lambda compiled=compiled, params=params: compiled(params, x)
        backward[name] = gradient_function(apply, params)
    return forward, backward


def main() -> None:
    """Measures and prints the table of docs/benchmarks.md."""
    parser = timing.moe_parser(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    forward, backward = make_calls(
        args.tokens, args.width, args.hidden, args.experts, args.selected, args.dtype
    )

    device = jax.devices()[0]
    print(
        f"{device.device_kind}: N={args.tokens} D={args.width} F={args.hidden} E={args.experts} "
        f"K={args.selected} {args.dtype}"
    )
    print(f"{'':12}{'forward':>12}{'ratio':>8}{'forward+gradient':>20}{'ratio':>8}")
    timings = [interleaved_seconds(calls, args.rounds) for calls in (forward, backward)]
    for name in forward:
        row = []
        for seconds in timings:
            ratios = [a / b for a, b in zip(seconds[name], seconds[DENSE], strict=True)]
            row += [statistics.median(seconds[name]) * 1e3, statistics.median(ratios)]
        print(f"{name:12}{row[0]:>9.1f} ms{row[1]:>7.2f}x{row[2]:>17.1f} ms{row[3]:>7.2f}x")


if __name__ == "__main__":
    main()
