"""Compiles training steps for an accelerator that need not be here."""

import pathlib
from typing import Any

import jax
from jax.experimental import topologies

from clipmoe_jax.core import sharding
from clipmoe_jax.dmu.phases import PlannedPhase
from clipmoe_jax.planning.abstract import abstract_step

# The smallest slice of each.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
PLATFORMS = {"cpu": "cpu", **dict.fromkeys(TOPOLOGIES, "tpu"), "h100": "hopper", "h200": "hopper"}
# XLA tries kernels out on the device unless told not to, and its Triton products have no default tiling.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def compile_step(target: str, phase: PlannedPhase) -> Any:
    """Compiles the step of a phase, all of its batch, for one device of a target: `jax.stages.Compiled`.

    Raises ValueError if the target's compiler is not installed.
    """
    mesh = sharding.make_mesh(devices=[_device(target)])
    step, arguments = abstract_step(mesh, phase)
    options: dict[str, Any] = UNTUNED if PLATFORMS[target] == "hopper" else {}
    with jax.set_mesh(mesh):
        return step.lower(*arguments).compile(compiler_options=options)


def _device(target: str) -> Any:
    """Returns a device to compile for: this machine's CPU, or one that is described to its compiler."""
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
        package = {"tpu": "jax[tpu]", "hopper": "jax[cuda13]"}[platform]
        message = f'--target={target}: there is no compiler for it here: pip install "{package}" ({error})'
        raise ValueError(message) from error
