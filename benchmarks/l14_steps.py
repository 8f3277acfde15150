"""ViT-L/14's training steps on one device, compiled and not run: seconds cold and from the cache, and memory.

    python -m benchmarks.l14_steps --batch=100

Each step is compiled in a process of its own, twice, with a compilation cache that is empty at first. Memory
is XLA's own account for this platform (`memory_analysis`): arguments, results and temporaries. On a CPU XLA
computes bfloat16 products in float32 and undoes rematerialisation, so that its account there is no bound for
an accelerator; `--plan` has one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

KINDS = ("mcl", "router")


def compile_step(kind: str, batch: int, dtype: str, remat: bool) -> dict[str, float]:
    import dataclasses

    import jax
    import jax.numpy as jnp

    from clipmoe_jax import checkpoints, sharding, trees
    from clipmoe_jax import config as configs
    from clipmoe_jax.dmu.run import TRAIN_FFN, TRAIN_ROUTERS
    from clipmoe_jax.models.clip import Clip
    from clipmoe_jax.planning.plan import abstract_batch
    from clipmoe_jax.planning.trainings import models_of
    from clipmoe_jax.train.step import LossConfig, abstract_state, make_train_step

    config = configs.default_config()
    config.run.dtype, config.run.remat = dtype, remat
    dense, moe = models_of(config)
    section, model_config, rules = {
        "mcl": (config.mcl, dense, TRAIN_FFN),
        "router": (config.router, moe, TRAIN_ROUTERS),
    }[kind]
    phase = dataclasses.replace(configs.phase_config(section), batch_size=batch)
    run = configs.run_config(config, sharding.platform(), training_routers=kind == "router")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    trainable, frozen = trees.partition(checkpoints.abstract_params(model_config), rules)
    state = abstract_state(mesh, phase, trainable)
    step = make_train_step(Clip(model_config, run), LossConfig(0.1, 0.01), phase)
    rate, key = jax.ShapeDtypeStruct((), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = step.lower(state, frozen, abstract_batch(mesh, model_config, batch), rate, key)
    traced = time.perf_counter() - began
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "trace_and_lower_s": traced,
        "compile_s": time.perf_counter() - began - traced,
        "arguments_GiB": memory.argument_size_in_bytes / 2**30,
        "results_that_take_no_argument's_place_GiB": (
            memory.output_size_in_bytes - memory.alias_size_in_bytes
        )
        / 2**30,
        "temporaries_GiB": memory.temp_size_in_bytes / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(compile_step(args.kind, args.batch, args.dtype, args.remat)))
        return
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        for kind in KINDS:
            command = [sys.executable, "-m", "benchmarks.l14_steps", *sys.argv[1:], f"--kind={kind}"]
            for name in ("cold", "cached"):
                output = subprocess.run(
                    command, env=environment, check=True, stdout=subprocess.PIPE, text=True
                )
                found = json.loads(output.stdout)
                if name == "cached":
                    found = {key: value for key, value in found.items() if key.endswith("_s")}
                for key, value in found.items():
                    print(f"{kind:7} {name:7} {key.replace('_', ' '):45} {value:8.2f}", flush=True)


if __name__ == "__main__":
    main()
