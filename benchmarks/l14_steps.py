"""Compiles ViT-L/14's training steps for one device, without running them, and prints their memory.

    python -m benchmarks.l14_steps --target=v5p --remat=dots     # for a TPU that need not be here
    python -m benchmarks.l14_steps --target=h100 --remat=dots    # for a GPU that need not be here

Memory is the account of the device's compiler (`memory_analysis`), which has to be installed (`pip install
"jax[tpu]"` or `"jax[cuda13]"`): arguments, results, temporaries, and the peak of all. For a TPU it also
expects a number of cycles, the sum of its estimates for each instruction: no measurement, and without kernels
(attention, experts' products) and gathers, for which it has no estimate. For a GPU that is not there nothing
is tuned. On a CPU XLA computes products for the gradients of kernels in float32 and undoes rematerialisation:
its account there bounds no accelerator's.
"""

import argparse
import re
import time

import jax

from clipmoe_jax import config as configs
from clipmoe_jax.core import accelerators
from clipmoe_jax.dmu.phases import phases_of
from clipmoe_jax.planning.targets import PLATFORMS, compile_step

STAGES = ("mcl_1", "router")


def account(stage: str, args: argparse.Namespace) -> dict[str, float]:
    """Compiles the step of a stage and returns seconds, GiB, and for a TPU cycles."""
    config, platform = configs.default_config(), PLATFORMS[args.target]
    config.compute.dtype, config.compute.remat = args.dtype, args.remat
    config.mcl.batch_size = config.router.batch_size = args.batch
    phase = next(p for p in phases_of(config, platform, 10**6) if p.name == stage)
    began = time.perf_counter()
    compiled = compile_step(args.target, phase)
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
    accelerators.take_none()
    jax.config.update("jax_enable_compilation_cache", False)
    for stage in [args.stage] if args.stage else STAGES:
        for name, value in account(stage, args).items():
            print(f"{stage:7} {name:45} {value:8.2f}", flush=True)


if __name__ == "__main__":
    main()
