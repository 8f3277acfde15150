"""Training state and models on disk, by orbax: the one module that reads and writes them.

A model is a folder with `model.json` (the architecture) and `params/`. Training state is kept as separate
items `trainable`, `opt_state` and `meta`.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from clipmoe_jax import artifacts, distributed, trees
from clipmoe_jax.models.clip import Clip, ClipConfig
from clipmoe_jax.paths import absolute


def save_model(path: epath.Path, config: ClipConfig, params: trees.Params) -> None:
    """Writes a model folder; `params` may be sharded. Replaces what a killed run left there."""
    path = absolute(path)
    path.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(path / "model.json", config.to_dict())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "params", params, force=True)


def read_config(path: epath.Path) -> ClipConfig:
    """The architecture of a model folder. Raises FileNotFoundError if it is none."""
    if not (path / "model.json").exists():
        raise FileNotFoundError(f"{path} is not a model folder: it has no model.json")
    return ClipConfig.from_dict(json.loads((path / "model.json").read_text()))


def load_model(
    path: epath.Path, place: Callable[[trees.Params], dict] | None = None
) -> tuple[ClipConfig, dict]:
    """Reads a model folder: config and params.

    place: from a tree of ShapeDtypeStructs to their shardings; None loads numpy arrays.
    Raises FileNotFoundError if the folder is not a model.
    """
    path = absolute(path)
    config = read_config(path)
    abstract = abstract_params(config)
    with ocp.StandardCheckpointer() as checkpointer:
        if place is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
            shardings = jax.tree.map(lambda _: device, abstract)
        else:
            shardings = place(abstract)
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            shardings,
        )
        params = checkpointer.restore(path / "params", target)
    return config, jax.tree.map(np.asarray, params) if place is None else params


@functools.lru_cache(maxsize=16)
def abstract_params(config: ClipConfig) -> dict:
    """The model's param tree as ShapeDtypeStructs, not to be changed; nothing is allocated."""
    model, size = Clip(config), config.vision.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    if config.text is None:
        init = functools.partial(model.init, method="encode_image")
        return jax.eval_shape(init, jax.random.key(0), images)["params"]
    tokens = jax.ShapeDtypeStruct((1, config.text.context_length), np.int32)
    return jax.eval_shape(model.init, jax.random.key(0), images, tokens)["params"]


def check_params(config: ClipConfig, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    """Raises ValueError naming the leaves in which {name: shape} differs from the architecture."""
    expected = {name: leaf.shape for name, leaf in trees.flatten(abstract_params(config)).items()}
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "differing": [
            f"{name} is {tuple(shapes[name])}, not {shape}"
            for name, shape in expected.items()
            if name in shapes and tuple(shapes[name]) != shape
        ],
    }
    if any(problems.values()):
        lists = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:10])}" for kind, names in problems.items() if names
        )
        raise ValueError(f"{source} does not fit the architecture: {lists}")


class _CheckpointManager(ocp.CheckpointManager):
    """Orbax's, but for one question: it asks JAX by the number of the step whether to stop, and JAX knows one
    counter alone, that of `distributed.preempted`: a SIGTERM between a save and the next step would be lost.
    """

    def reached_preemption(self, step: int) -> bool:
        """The training loop knows, and saves then."""
        del step
        return False


class Checkpointer:
    """Keeps the newest checkpoints of one training phase; saving runs in the background. A context
    manager."""

    def __init__(self, folder: epath.Path, max_to_keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep)
        self._manager = _CheckpointManager(absolute(folder), options=options)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts to write a state (`trainable`, `opt_state`) after `step` steps, and numbers to go with
        it."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(state.trainable),
                opt_state=ocp.args.StandardSave(state.opt_state),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """(newest state, shaped and placed as the given one; its meta); None if there is no checkpoint.

        One that cannot be read, truncated say, is deleted with a warning and the one before it taken. Raises
        ValueError if none can be read: they stay, as it may be the disk or the memory that is at fault.
        """
        unreadable = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found, reason = self._restore(step, like), ""
            except Exception as error:  # of tensorstore, JSON, the file system: what a broken file leads to
                found, reason = None, str(error).splitlines()[0] if str(error) else type(error).__name__
            if distributed.all_are(found is not None):
                for broken, why in unreadable.items():
                    logging.warning(
                        "the checkpoint of step %d cannot be read and is deleted: %s", broken, why
                    )
                    self._manager.delete(broken)
                return found
            unreadable[step] = reason or "another process could not"
            found = None  # or it lies on the device beside the next
        if unreadable:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in unreadable.items())
            raise ValueError(
                f"no checkpoint in {self._manager.directory} can be read ({reasons}): start the same command "
                "again if the disk was at fault, or delete that folder to begin with step 0"
            )
        return None

    def _restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(abstract.trainable),
                opt_state=ocp.args.StandardRestore(abstract.opt_state),
                meta=ocp.args.JsonRestore(),
            ),
        )
        state = like.replace(
            step=jax.device_put(np.int32(step), like.step.sharding),
            trainable=restored["trainable"],
            opt_state=restored["opt_state"],
        )
        return state, restored["meta"]

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint that is whole."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *error) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()
