"""Compares ways in which tokens reach experts on other devices: bytes sent, bytes held, time, in one run.

    python -m benchmarks.expert_parallel --devices=8 --expert=4

On fake CPU devices bytes and memory are those of any platform; the time is that of their computations one
beside the other on this machine's cores, without a network between them.
"""

import argparse
import os
import statistics


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--expert", type=int, default=4, help="size of the expert axis")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--selected", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="of a device")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(args.devices)

    import jax
    import jax.numpy as jnp

    from benchmarks.collectives import sent
    from clipmoe_jax.analysis.cost import interleaved_seconds
    from clipmoe_jax.core import sharding
    from clipmoe_jax.models.feed_forward import quick_gelu
    from clipmoe_jax.models.moe import MoeMlp

    x = jax.random.normal(jax.random.key(0), (args.devices, args.tokens, args.width))
    split = (args.devices // args.expert, 1, args.expert)
    exact = args.experts / args.selected
    ways = {
        "experts on every device": ((args.devices, 1, 1), "ragged", 1.0),
        "gather, nothing dropped": (split, "ragged", 1.0),
        "all-to-all, nothing dropped": (split, "capacity", exact),
        "all-to-all, capacity 1.25": (split, "capacity", 1.25),
    }
    functions, rows = {}, {}
    for way, (sizes, dispatch, factor) in ways.items():
        mesh = sharding.make_mesh(*sizes)
        layer = MoeMlp(
            args.experts,
            args.selected,
            4 * args.width,
            quick_gelu,
            dispatch=dispatch,
            capacity_factor=factor,
        )
        params = {"visual": {"resblocks_0": {"moe": layer.init(jax.random.key(1), x)["params"]}}}
        params = jax.device_put(params, sharding.param_shardings(mesh, params))
        inputs = jax.device_put(x, sharding.batch_sharding(mesh))

        def loss(params, x, layer=layer):
            y, aux = layer.apply({"params": params["visual"]["resblocks_0"]["moe"]}, x)
            return jnp.sum(jnp.sin(y)), aux["dropped_slots"].sum()

        with jax.set_mesh(mesh):
            step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
            compiled = step.lower(params, inputs).compile()
        moved = sum(size for name, size in sent(compiled.as_text()).items() if name != "all-reduce")
        (_, dropped), _ = compiled(params, inputs)
        share = int(dropped) / (x.shape[0] * x.shape[1] * args.selected)
        rows[way] = moved, compiled.memory_analysis().temp_size_in_bytes, share
        functions[way] = lambda compiled=compiled, params=params, inputs=inputs: compiled(params, inputs)

    seconds = interleaved_seconds(functions, args.rounds)
    print(f"{args}\n{'forward and gradient, a device':<30}{'sent':>12}{'holds':>12}{'dropped':>9}{'time':>8}")
    first = seconds[next(iter(ways))]
    for way, (moved, held, share) in rows.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[way], first, strict=True))
        print(f"{way:<30}{moved / 1e6:>9.2f} MB{held / 1e6:>9.1f} MB{share:>9.1%}{ratio:>7.2f}x")


if __name__ == "__main__":
    main()
