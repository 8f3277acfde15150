"""Param trees and training state on disk. The only module that uses orbax.

Training state is stored as separate items `trainable`, `opt_state` and `meta`.
"""

import logging as python_logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from etils import epath

from clipmoe_jax.core import distributed, ocdbt, trees
from clipmoe_jax.core.checks import check_not_sparse
from clipmoe_jax.core.errors import first_line
from clipmoe_jax.core.json_files import parse_json
from clipmoe_jax.core.paths import absolute, in_bucket
from clipmoe_jax.core.stamps import named_files

# Orbax raises errors of its threads in the caller's thread. Before, it logs each with its trace, and asyncio
# logs those that come behind the first.
logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)


def save_params(path: epath.Path, params: trees.Params) -> None:
    """Writes a param tree, which may be sharded. Replaces whatever is at `path`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(absolute(path), params, force=True)


def load_params(
    path: epath.Path,
    abstract: trees.Params,
    place: Callable[[trees.Params], dict] | None = None,
) -> dict:
    """Returns the param tree that `save_params` wrote.

    abstract: the tree as ShapeDtypeStructs. place: from these to their shardings; None gives numpy arrays.
    Raises ValueError naming the folder if it is damaged, or holds another tree.
    """
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
    try:
        _check_arrays(absolute(path))
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(absolute(path), target)
    except (OSError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # a broken file raises errors of tensorstore, JSON, …
        raise ValueError(
            f"{path} is damaged or not of this model ({_reason(error)}): put it back, or delete it and make "
            "it again"
        ) from error
    return jax.tree.map(np.asarray, params) if place is None else params


def _check_arrays(path: epath.Path) -> None:
    """Raises ValueError for arrays in another format than Orbax writes here, and if an index or chunks expand
    far: a few compressed bytes would be read as gigabytes. In a bucket nothing is looked at."""
    if in_bucket(path):
        return
    if not (path / ocdbt.MANIFEST).exists():
        raise ValueError(f"it has no {ocdbt.MANIFEST}")
    for _, file in named_files(path):
        check_not_sparse(file)
    ocdbt.check_index(path)
    store = _open_store(path)
    for key in store.list().result():
        name, _, file = key.decode().rpartition("/")
        if file == "zarr.json":
            raise ValueError(f"{name} is an array of Zarr 3")
        if file == ".zarray":
            array = parse_json(store.read(key).result().value, key.decode())
            sides = zip(array["chunks"], array["shape"], strict=True)
            if any(chunk > max(1, side) for chunk, side in sides):
                raise ValueError(f"{name} has chunks larger than itself")
            if (array["compressor"] or {"id": "zstd"})["id"] != "zstd":
                raise ValueError(f"{name} is compressed as Orbax never does")


def _open_store(path: epath.Path) -> tensorstore.KvStore:
    base = {"driver": "file", "path": os.path.join(path, "")}
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()


def _reason(error: BaseException) -> str:
    """Returns the first line of the error that an error of orbax comes from."""
    while error.__cause__:
        error = error.__cause__
    return first_line(error)[:200]


class _CheckpointManager(ocp.CheckpointManager):
    """Orbax's, without its own check for preemption.

    Orbax asks JAX about each step by its number. But JAX keeps a single counter of such questions, which
    `distributed.preempted` advances: with two askers, a SIGTERM between a save and the next step would be
    lost.
    """

    def reached_preemption(self, step: int) -> bool:
        """Returns False: the training loop itself saves when SIGTERM comes."""
        del step
        return False


class Checkpointer:
    """Keeps the newest checkpoints of one training phase. A context manager that saves in the background."""

    def __init__(self, folder: epath.Path, max_to_keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep)
        self._manager = _CheckpointManager(absolute(folder), options=options)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> bool:
        """Starts to write a state (its `trainable` and `opt_state`) after `step` steps.

        meta: values to store with it, as JSON. Returns False, and writes nothing, where there is one of this
        step or a later one.
        """
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(state.trainable),
                opt_state=ocp.args.StandardSave(state.opt_state),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Returns (newest state, shaped and placed like the given one; its meta); None without a checkpoint.

        A checkpoint that cannot be read, because it is truncated for example, is deleted with a warning, and
        the one before it is taken. Raises ValueError if none can be read. None is deleted then, as the disk
        or the memory may be at fault.
        """
        unreadable = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            restored, reason = None, ""
            try:
                self._check(step)
            except Exception as error:  # a broken file raises errors of tensorstore, JSON, the file system, …
                reason = _reason(error)
            if distributed.all_are(not reason):  # Orbax waits for every process while it reads
                try:
                    restored = self._restore(step, like)
                except Exception as error:
                    reason = _reason(error)
            if distributed.all_are(restored is not None):
                for broken, why in unreadable.items():
                    logging.warning(
                        "the checkpoint of step %d cannot be read and is deleted: %s", broken, why
                    )
                    self._manager.delete(broken)
                return restored
            unreadable[step] = reason or "another process could not read it"
            restored = None  # frees device memory for the next
        if unreadable:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in unreadable.items())
            raise ValueError(
                f"no checkpoint in {self._manager.directory} can be read ({reasons}): start the same command "
                "again if the disk was at fault, or delete that folder to start from step 0"
            )
        return None

    def _check(self, step: int) -> None:
        """Raises an error for a checkpoint that cannot be read.

        Of several processes, which Orbax would leave waiting for one that fails, each reads a part of it.
        """
        for item in ("trainable", "opt_state"):
            folder = absolute(self._manager.directory) / str(step) / item
            _check_arrays(folder)
            if jax.process_count() > 1 and not in_bucket(folder):
                store = _open_store(folder)
                for key in store.list().result()[jax.process_index() :: jax.process_count()]:
                    store.read(key).result()

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
        """Returns the step of the newest whole checkpoint; None if there is none."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *error) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
