"""The device mesh, the shardings of parameters and batches on it, and moving arrays there and back.

Axes: `data` splits the batch; `fsdp` splits the batch and large parameters; `expert` splits the batch and the
leading axis of stacked experts. One device is a 1 x 1 x 1 mesh and runs the same code.
"""

import collections
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from clipmoe_jax.core import trees

EXPERT_AXIS = "expert"
BATCH_AXES = ("data", "fsdp", EXPERT_AXIS)

# The first match wins. fsdp splits an axis whose size is a multiple of the width in every variant. Every
# device holds the whole token embedding: if it were split, its rows would have to move to the batch in each
# step.
PARAM_RULES = (
    (r".*/moe/router/kernel", PartitionSpec()),
    (r".*/moe/\w+/kernel", PartitionSpec(EXPERT_AXIS, "fsdp", None)),
    (r".*/moe/\w+/bias", PartitionSpec(EXPERT_AXIS)),
    (r".*/(mlp|attn)/\w+/kernel", PartitionSpec("fsdp", None)),
    (r".*", PartitionSpec()),
)


def make_mesh(data: int = -1, fsdp: int = 1, expert: int = 1, *, devices: Any = None) -> Mesh:
    """Returns a mesh over all devices; `data=-1` takes what the other axes leave.

    A process's devices follow each other, as its rows of a batch do. Raises ValueError if the sizes do not
    multiply to the number of devices, if there are none, or if processes have different numbers of them.
    """
    devices = sorted(all_devices() if devices is None else devices, key=lambda one: one.process_index)
    counts = collections.Counter(one.process_index for one in devices)
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"process {process} has {count}" for process, count in counts.items())
        raise ValueError(f"processes have different numbers of devices ({numbers}): give each as many")
    sizes = _mesh_sizes(data, fsdp, expert, len(devices))
    return Mesh(np.asarray(devices).reshape(sizes), BATCH_AXES, axis_types=(AxisType.Auto,) * 3)


def all_devices() -> list[Any]:
    """Returns all devices of all processes. Raises ValueError where JAX finds none."""
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:  # the former where JAX lacks what drives such devices
        wanted, why = os.environ.get("JAX_PLATFORMS", ""), f" ({error})" if str(error) else ""
        raise ValueError(
            f"JAX_PLATFORMS={wanted}: JAX finds no such device here{why}: install JAX for it, or set cpu"
        ) from error


def make_abstract_mesh(data: int, fsdp: int, expert: int, *, num_devices: int) -> AbstractMesh:
    """Returns a mesh of devices that need not exist, to plan with."""
    sizes = _mesh_sizes(data, fsdp, expert, num_devices)
    return AbstractMesh(sizes, BATCH_AXES, axis_types=(AxisType.Auto,) * 3)


def _mesh_sizes(data: int, fsdp: int, expert: int, num_devices: int) -> tuple[int, int, int]:
    if data == -1:
        data = num_devices // (fsdp * expert)
    sizes = (data, fsdp, expert)
    if min(sizes) < 1 or data * fsdp * expert != num_devices:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x expert={expert} does not use the {num_devices} devices "
            f"exactly: choose sizes whose product is {num_devices}"
        )
    return sizes


def param_shardings(mesh: Mesh | AbstractMesh, params: trees.Params) -> dict:
    """Returns a tree of NamedShardings for a tree of arrays or ShapeDtypeStructs, by PARAM_RULES.

    Raises ValueError naming the first leaf whose axis a mesh axis does not divide.
    """
    leaves = trees.flatten(params)
    return trees.unflatten({name: param_sharding(mesh, name, leaf.shape) for name, leaf in leaves.items()})


def param_sharding(mesh: Mesh | AbstractMesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Returns one leaf's sharding, by PARAM_RULES.

    Raises ValueError if a mesh axis does not divide the leaf's axis that it splits.
    """
    spec = next(spec for pattern, spec in PARAM_RULES if re.fullmatch(pattern, name))
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{name} has an axis of size {size}, which mesh.{axis}={mesh.shape[axis]} does not "
                f"divide: choose mesh.{axis} among {_divisors(size)[:12]}"
            )
    return NamedSharding(mesh, spec)


def platform() -> str:
    """Returns "cpu", "tpu", "gpu", "cuda" for NVIDIA GPUs on which cuDNN's fused attention runs, "hopper" for
    those of them on which the kernels of models/grouped_dot.py run."""
    backend = jax.default_backend()
    if backend != "gpu" or "cuda" not in jax.extend.backend.get_backend().platform_version.lower():
        return backend
    capability = float(jax.local_devices()[0].compute_capability)
    if capability == 9.0:
        return "hopper"
    return "cuda" if capability >= 8.0 else "gpu"


def usable_memory() -> float:
    """Returns the bytes that JAX may take of any device of this process, infinite on CPUs, 0 if one does not
    say.
    """
    if platform() == "cpu":
        return math.inf
    return min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a batch: its leading axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def devices_in_use() -> int:
    """Returns, inside a jitted function, the number of devices of the mesh in use; 1 if there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def split_batch(x: jax.Array) -> jax.Array:
    """Constrains x, inside a jitted function, to be split over all devices along its leading axis.

    Without it XLA may give x the sharding of the parameters that it meets, and so move activations between
    devices where it should gather a parameter.
    """
    return x if devices_in_use() == 1 else jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Turns this host's slice of a batch, {name: array or tree of arrays}, into global arrays."""
    put = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return {name: jax.tree.map(put, arrays) for name, arrays in batch.items()}


def put_replicated(mesh: Mesh, value: np.ndarray) -> jax.Array:
    """Puts a value that every process has on every device."""
    return jax.make_array_from_callback(np.shape(value), replicated(mesh), lambda _: value)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts the whole of each array on every device, so that every process can read it."""
    return _replicate(mesh)(tree)


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


@dataclasses.dataclass(frozen=True)
class HostCopy:
    """This process's part of a sharded array in host memory. parts: {index of a shard: numpy array}."""

    shape: tuple[int, ...]
    sharding: jax.sharding.Sharding
    parts: dict[str, np.ndarray]


def to_host(tree: Any) -> Any:
    """Copies the shards of this process's devices to host memory. No process holds a whole sharded array."""

    def copy(array: jax.Array) -> HostCopy:
        # Devices that hold the same shard share an entry.
        parts = {str(shard.index): shard.data for shard in array.addressable_shards}
        return HostCopy(array.shape, array.sharding, jax.device_get(parts))

    return jax.tree.map(copy, tree)


def to_devices(tree: Any) -> Any:
    """Inverts `to_host`. Leaves that are on devices stay there."""

    def place(leaf: Any) -> jax.Array:
        if not isinstance(leaf, HostCopy):
            return leaf
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda i: leaf.parts[str(i)])

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, HostCopy))


def put_param(mesh: Mesh, name: str, array: np.ndarray) -> jax.Array:
    """Places one leaf that every process has read. Each device keeps only its shard."""
    leaf_sharding = param_sharding(mesh, name, array.shape)
    return jax.make_array_from_callback(array.shape, leaf_sharding, lambda index: array[index])


def init_params(mesh: Mesh, init: Callable[[jax.Array], trees.Params], key: jax.Array) -> dict:
    """Runs `init(key)` so that each device computes only its own shards."""
    shardings = param_shardings(mesh, jax.eval_shape(init, key))
    # It runs once, and optimizing it in LLVM takes longer than running it.
    options = {"xla_backend_optimization_level": 1} if platform() == "cpu" else {}
    return jax.jit(init, out_shardings=shardings, compiler_options=options)(key)


def check_batch(mesh: Mesh | AbstractMesh, global_batch: int, accumulation_steps: int = 1) -> None:
    """Raises ValueError if a batch (or a microbatch of it) cannot be split evenly over the devices."""
    parts = mesh.size * accumulation_steps
    if global_batch % parts:
        raise ValueError(
            f"batch size {global_batch} cannot be split over {mesh.size} devices x {accumulation_steps} "
            f"accumulation steps: choose a multiple of {parts}"
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
