"""Compiles ViT-L/14's training steps for one device, without running them, and prints their memory.

    python -m benchmarks.l14_steps --target=v5p --remat=dots     # for a TPU that need not be here
    python -m benchmarks.l14_steps --target=h100 --remat=dots    # for a GPU that need not be here

Memory is the account of the device's compiler (`memory_analysis`), which has to be installed (`pip install
"jax[tpu]"` or `"jax[cuda13]"`): arguments, results, temporaries, and the peak of all. For a TPU it also
expects a number of cycles, the sum of its estimates for each instruction: no measurement, and without kernels
(attention, experts' products) and gathers, for which it has no estimate. For a GPU that is not there nothing
is tuned. On a CPU XLA computes bfloat16 products in float32 and undoes rematerialisation: its account there
bounds no accelerator's.
"""

import argparse
import os
import pathlib
import re
import time

STAGES = ("mcl_1", "router")
# The smallest slice of each.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
PLATFORMS = {"cpu": "cpu", **dict.fromkeys(TOPOLOGIES, "tpu"), "h100": "cuda"}
# XLA tries kernels out on the device unless told not to, and its Triton products have no default tiling.
UNTUNED = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def target_device(target: str):
    """Returns a device to compile for: this machine's CPU, or one that is described to its compiler."""
    import jax
    from jax.experimental import topologies

    platform = PLATFORMS[target]
    if platform == "cpu":
        return jax.devices()[0]
    try:
        if platform == "tpu":
            return topologies.get_topology_desc(TOPOLOGIES[target], "tpu").devices[0]
        described = pathlib.Path(__file__).with_name(f"{target}.txtpb").read_text()
        topology = topologies.get_topology_desc(target, "cuda", target_config=described, topology="1x1x1")
        return topology.devices[0]
    except Exception as error:  # whatever a missing plugin raises
        package = {"tpu": "jax[tpu]", "cuda": "jax[cuda13]"}[platform]
        message = f'--target={target}: there is no compiler for it here: pip install "{package}" ({error})'
        raise SystemExit(message) from error


def compile_step(stage: str, args: argparse.Namespace) -> dict[str, float]:
    """Compiles the step of a stage and returns seconds, GiB, and for a TPU cycles."""
    import jax

    from clipmoe_jax import config as configs
    from clipmoe_jax.core import sharding
    from clipmoe_jax.dmu.phases import phases_of
    from clipmoe_jax.planning.abstract import abstract_step

    config, platform = configs.default_config(), PLATFORMS[args.target]
    config.compute.dtype, config.compute.remat = args.dtype, args.remat
    config.mcl.batch_size = config.router.batch_size = args.batch
    phase = next(p for p in phases_of(config, platform, 10**6) if p.name == stage)
    mesh = sharding.make_mesh(devices=[target_device(args.target)])
    step, arguments = abstract_step(mesh, phase)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = step.lower(*arguments).compile()
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    numbers = {
        "seconds to trace and compile": seconds,
        "arguments, GiB": memory.argument_size_in_bytes / 2**30,
        "results that take no argument's place, GiB": results / 2**30,
        "temporaries, GiB": memory.temp_size_in_bytes / 2**30,
        "peak, GiB": memory.peak_memory_in_bytes / 2**30,
    }
    if platform == "tpu":
        program = compiled.as_text()
        entry = program[program.index("\nENTRY") :]
        cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry)))
        numbers["estimated million cycles"] = cycles / 1e6
    return numbers


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--target", choices=PLATFORMS, default="cpu")
    parser.add_argument("--dtype", help="float32 on CPU, else bfloat16, if not given")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--stage", choices=STAGES, help="one of the steps; all if not given")
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.target == "cpu" else "bfloat16")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if PLATFORMS[args.target] == "cuda":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {UNTUNED}"
    for stage in [args.stage] if args.stage else STAGES:
        for name, value in compile_step(stage, args).items():
            print(f"{stage:7} {name:45} {value:8.2f}", flush=True)


if __name__ == "__main__":
    main()
