"""ViT-L/14's training steps on one device, compiled and not run: seconds cold and from the cache, and memory.

    python -m benchmarks.l14_steps --batch=100                          # for this machine's CPU
    python -m benchmarks.l14_steps --batch=100 --target=v5p --remat=dots    # for a TPU that need not be here
    python -m benchmarks.l14_steps --batch=100 --target=h100 --remat=dots   # for a GPU that need not be here

Each step is compiled in a process of its own, twice, with a compilation cache that is empty at first. Memory
is the compiler's own account (`memory_analysis`): arguments, results, temporaries, and the peak of all. For a
TPU or GPU its compiler has to be installed (`pip install "jax[tpu]"` or `"jax[cuda13]"`). For a TPU also
printed is what the compiler expects the step to take, the sum of the cycles it estimates for each
instruction: no measurement, and without kernels (attention, experts' products) and gathers, for which it has
no estimate. For a GPU that is not there nothing is tuned. On a CPU XLA computes bfloat16 products in float32
and undoes rematerialisation: its account there bounds no accelerator's.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

KINDS = {"mcl": "mcl_1", "router": "router"}  # and the first stage that takes such steps
# The smallest slice of each.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
PLATFORMS = {"cpu": "cpu", **dict.fromkeys(TOPOLOGIES, "tpu"), "h100": "cuda"}
# XLA tries kernels out on the device unless told not to, and its Triton products have no default tiling.
UNTUNED = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def target_device(target: str):
    """A device to compile for: this machine's CPU, or one that is described to its compiler."""
    import jax
    from jax.experimental import topologies

    platform = PLATFORMS[target]
    if platform == "cpu":
        return jax.devices()[0]
    try:
        if platform == "tpu":
            return topologies.get_topology_desc(TOPOLOGIES[target], "tpu").devices[0]
        described = pathlib.Path(__file__).with_name(f"{target}.txtpb").read_text()
        found = topologies.get_topology_desc(target, "cuda", target_config=described, topology="1x1x1")
        return found.devices[0]
    except Exception as error:  # whatever a missing plugin raises
        package = {"tpu": "jax[tpu]", "cuda": "jax[cuda13]"}[platform]
        message = f'--target={target}: there is no compiler for it here: pip install "{package}" ({error})'
        raise SystemExit(message) from error


def compile_step(kind: str, args: argparse.Namespace) -> dict[str, float]:
    if PLATFORMS[args.target] == "cuda":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {UNTUNED}"
    import jax

    from clipmoe_jax import config as configs
    from clipmoe_jax.core import sharding
    from clipmoe_jax.dmu.phases import phases_of
    from clipmoe_jax.planning.abstract import abstract_step

    config, platform = configs.default_config(), PLATFORMS[args.target]
    config.compute.dtype, config.compute.remat = args.dtype, args.remat
    config.mcl.batch_size = config.router.batch_size = args.batch
    phase = next(t for t in phases_of(config, platform, 10**6) if t.name == KINDS[kind])
    mesh = sharding.make_mesh(devices=[target_device(args.target)])
    step, arguments = abstract_step(mesh, phase)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = step.lower(*arguments)
    traced = time.perf_counter() - began
    compiled = lowered.compile()
    seconds = time.perf_counter() - began - traced
    memory = compiled.memory_analysis()
    found = {
        "trace_and_lower_s": traced,
        "compile_s": seconds,
        "arguments_GiB": memory.argument_size_in_bytes / 2**30,
        "results_that_take_no_argument's_place_GiB": (
            memory.output_size_in_bytes - memory.alias_size_in_bytes
        )
        / 2**30,
        "temporaries_GiB": memory.temp_size_in_bytes / 2**30,
        "peak_GiB": memory.peak_memory_in_bytes / 2**30,
    }
    if platform == "tpu":
        program = compiled.as_text()
        entry = program[program.index("\nENTRY") :]
        cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry)))
        found["estimated_million_cycles"] = cycles / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--target", choices=PLATFORMS, default="cpu")
    parser.add_argument("--dtype", help="float32 on CPU, else bfloat16, if not given")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--kind", choices=KINDS, help="one of the steps; all if not given")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.target == "cpu" else "bfloat16")
    if args.here:
        print(json.dumps(compile_step(args.kind, args)))
        return
    with tempfile.TemporaryDirectory() as cache:
        environment = {"JAX_PLATFORMS": "cpu", **os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        for kind in [args.kind] if args.kind else KINDS:
            command = [
                sys.executable,
                "-m",
                "benchmarks.l14_steps",
                *sys.argv[1:],
                "--here",
                f"--kind={kind}",
            ]
            for name in ("cold", "cached"):
                output = subprocess.run(
                    command, env=environment, check=True, stdout=subprocess.PIPE, text=True
                )
                found = json.loads(output.stdout.splitlines()[-1])
                if name == "cached":
                    found = {key: value for key, value in found.items() if key.endswith("_s")}
                for key, value in found.items():
                    print(f"{kind:7} {name:7} {key.replace('_', ' '):45} {value:8.2f}", flush=True)


if __name__ == "__main__":
    main()
