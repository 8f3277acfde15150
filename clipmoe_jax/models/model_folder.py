"""A model on disk: a folder with `model.json` (the architecture) and `params/`.

Experts that are equal in every block are stored once: then `experts.json` has, for each expert of the model,
the number of the stored one. Letters: E experts, U stored ones.
"""

import reprlib
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from clipmoe_jax.core import artifacts, checkpoints, checksums, distributed, trees
from clipmoe_jax.core.checks import check_expansion, stored_bytes, whole_number
from clipmoe_jax.core.errors import naming
from clipmoe_jax.core.json_files import read_json
from clipmoe_jax.core.paths import absolute, check_plain_folder
from clipmoe_jax.core.sharding import replicated
from clipmoe_jax.core.stamps import named_files
from clipmoe_jax.models.clip import ClipConfig, abstract_params
from clipmoe_jax.models.expert_params import EXPERT_LEAF

MODEL_FILE, EXPERTS_FILE, PARAMS = "model.json", "experts.json", "params"


def save_model(path: epath.Path, config: ClipConfig, params: trees.Params) -> None:
    """Writes a model folder; `params` may be sharded. Overwrites what a killed run left there."""
    path = absolute(path)
    path.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(path / MODEL_FILE, config.to_dict())
    stored = _stored_experts(params)
    num_stored = len(set(stored))
    if num_stored < len(stored) and _divides(num_stored, params):
        artifacts.write_json(path / EXPERTS_FILE, stored)
        params = _take_experts(params, [stored.index(u) for u in range(num_stored)], lambda _, where: where)
    elif distributed.is_main():
        (path / EXPERTS_FILE).unlink(missing_ok=True)
    checkpoints.save_params(path / PARAMS, params)


def read_config(path: epath.Path) -> ClipConfig:
    """Returns the architecture of a model folder.

    Raises FileNotFoundError if the folder holds no model, ValueError naming what is wrong in its model.json.
    """
    if not (path / MODEL_FILE).exists():
        raise FileNotFoundError(f"{path} is not a model folder: it has no {MODEL_FILE}")
    fields = checksums.read_verified(path / MODEL_FILE)
    with naming(path / MODEL_FILE):
        return ClipConfig.from_dict(fields)


def load_model(
    path: epath.Path, place: Callable[[trees.Params], dict] | None = None
) -> tuple[ClipConfig, dict]:
    """Returns the architecture and the params of a model folder.

    place: maps a tree of ShapeDtypeStructs to shardings; None loads numpy arrays.
    Raises FileNotFoundError if the folder holds no model, ValueError if a file is damaged, and for links,
    pipes, devices and large files of holes among those of the params.
    """
    path = absolute(path)
    config = read_config(path)
    check_plain_folder(path / PARAMS)
    files = [file for _, file in named_files(path / PARAMS)]
    checksums.verify(path, EXPERTS_FILE, PARAMS)
    abstract = abstract_params(config)
    with naming(path / PARAMS):
        check_files(abstract, files)
    if not (path / EXPERTS_FILE).exists():
        return config, checkpoints.load_params(path / PARAMS, abstract, place)
    stored = _read_experts(path / EXPERTS_FILE, config)
    of_stored = jax.eval_shape(lambda tree: _taken(tree, range(len(set(stored)))), abstract)
    if place is None:
        return config, _taken(checkpoints.load_params(path / PARAMS, of_stored), stored)
    shardings = trees.flatten(place(abstract))

    def place_stored(tree: trees.Params) -> dict:
        leaves = trees.flatten(tree)
        return trees.unflatten(
            {name: _fitting(name, leaf.shape, shardings[name]) for name, leaf in leaves.items()}
        )

    params = checkpoints.load_params(path / PARAMS, of_stored, place_stored)
    return config, _take_experts(params, stored, lambda name, _: shardings[name])


def check_files(abstract: trees.Params, files: Iterable[epath.Path]) -> None:
    """Raises ValueError if params take far more memory than the files that hold them: a few kilobytes of
    zeros, or of one array under many names, would take gigabytes."""
    expanded = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    check_expansion(sum(map(stored_bytes, files)), expanded)


def _read_experts(path: epath.Path, config: ClipConfig) -> list[int]:
    """Returns for each expert of the model the number of the stored one.

    Raises ValueError naming the file if it is damaged.
    """
    stored = read_json(path, list)
    num_experts = config.moe.num_experts if config.moe else 0
    with naming(path):
        for number in stored:
            whole_number("an expert", number, num_experts - 1, least=0)
        if len(stored) != num_experts or set(stored) != set(range(len(set(stored)))):
            raise ValueError(f"it has {reprlib.repr(stored)} for the {num_experts} experts of the model")
    return stored


def _divides(num_stored: int, params: trees.Params) -> bool:
    """Returns whether so many experts are split evenly where experts are: else each device would hold all."""
    return all(
        _fitting(name, (num_stored,), where) == where
        for name, leaf in trees.flatten(params).items()
        if (where := getattr(leaf, "sharding", None)) is not None
    )


def _stored_experts(params: trees.Params) -> list[int]:
    """Returns, for each expert, the number of the first that equals it, counted without gaps; a dense model
    has none."""
    leaves = {name: leaf for name, leaf in trees.flatten(params).items() if EXPERT_LEAF.fullmatch(name)}
    if not leaves:
        return []
    first = next(iter(leaves.values()))
    num_experts, where = first.shape[0], getattr(first, "sharding", None)

    def equal(leaves: dict[str, jax.Array]) -> jax.Array:
        """Returns which experts are the same, (E, E) bool; the lower triangle alone."""
        rows = [
            [jnp.all(jnp.stack([jnp.all(a[e] == a[f]) for a in leaves.values()])) for f in range(e)]
            for e in range(num_experts)
        ]
        return jnp.stack([jnp.stack(row + [jnp.bool_(False)] * (num_experts - len(row))) for row in rows])

    everywhere = replicated(where.mesh) if isinstance(where, NamedSharding) else None
    same, stored = np.asarray(jax.jit(equal, out_shardings=everywhere)(leaves)), []
    for e in range(num_experts):
        before = np.flatnonzero(same[e])
        stored.append(stored[before[0]] if len(before) else len(set(stored)))
    return stored


def _taken(params: trees.Params, experts: Sequence[int]) -> dict:
    """Returns the params with these experts; numpy arrays stay such."""
    index = np.asarray(experts)
    leaves = trees.flatten(params)
    return trees.unflatten(
        {name: leaf[index] if EXPERT_LEAF.fullmatch(name) else leaf for name, leaf in leaves.items()}
    )


def _take_experts(
    params: trees.Params, experts: Sequence[int], place: Callable[[str, Sharding], Sharding]
) -> dict:
    """Returns the params with these experts, on the devices; all other leaves are the same arrays.

    place: from a leaf's name and sharding to that of the result.
    """
    leaves = trees.flatten(params)
    of_experts = {name: leaf for name, leaf in leaves.items() if EXPERT_LEAF.fullmatch(name)}
    if not all(isinstance(leaf, jax.Array) for leaf in of_experts.values()):
        return _taken(params, experts)
    where = {name: place(name, leaf.sharding) for name, leaf in of_experts.items()}
    index = np.asarray(experts)
    take = jax.jit(lambda tree: {name: leaf[index] for name, leaf in tree.items()}, out_shardings=where)
    return trees.unflatten(leaves | take(of_experts))


def _fitting(name: str, shape: tuple[int, ...], where: Sharding) -> Sharding:
    """Returns a leaf's sharding; one that does not split experts if their number does not divide."""
    if not EXPERT_LEAF.fullmatch(name) or not isinstance(where, NamedSharding) or not where.spec:
        return where
    axis = where.spec[0]
    if axis is None or shape[0] % where.mesh.shape[axis] == 0:
        return where
    return NamedSharding(where.mesh, PartitionSpec(None, *where.spec[1:]))
