"""Folders that a run makes: whole or not there, and remembering what they were made from.

A finished artifact has a `done.json`: the config fields it depends on, a hash of them, versions, and what was
measured while making it. It is written as `NAME.unfinished`, which a killed run leaves and the next one goes
on with, and renamed when whole. Its `checkpoints/` serve until then and are deleted last.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from clipmoe_jax.core import distributed
from clipmoe_jax.core.paths import in_bucket, written_whole

CHECKPOINTS = "checkpoints"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")


def make(path: epath.Path, inputs: Mapping[str, Any], build: Callable[[epath.Path], dict[str, Any]]) -> bool:
    """Makes the artifact unless it is there. Returns whether anything was built.

    path: the folder. inputs: {config field: value} that it depends on. build: given the unfinished folder,
    fills it (going on with what it finds there) and returns what it measured, for done.json.
    Raises ValueError naming the first differing field if the folder, whole or unfinished, was made from
    others, and BusyError if another process is making it.
    """
    path = epath.Path(path)
    inputs = _as_json(inputs)
    unfinished = path.parent / f"{path.name}.unfinished"
    if distributed.is_main() and not is_done(path) and is_done(unfinished):
        _finish(unfinished, path)  # killed between the last lines below
    if distributed.agree(is_done(path)):
        if distributed.is_main():
            _check_same(path, json.loads((path / "done.json").read_text())["inputs"], inputs)
            _tidy(path)
            _delete(unfinished)  # in a bucket a kill may leave some of it
        return False
    if distributed.is_main():
        if (unfinished / "inputs.json").exists():
            _check_same(unfinished, json.loads((unfinished / "inputs.json").read_text()), inputs)
        else:
            _delete(unfinished)  # killed before it wrote what it is made from
            unfinished.mkdir(parents=True)
            write_json(unfinished / "inputs.json", inputs)
    with _alone(unfinished):
        distributed.barrier(f"{path} begins")
        measured = build(unfinished)
        distributed.barrier(f"{path} is made")
        if distributed.is_main():
            done = {
                "inputs": inputs,
                "inputs_sha256": hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
                "measured": measured,
                "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            }
            write_json(unfinished / "done.json", done)
            _finish(unfinished, path)
            _tidy(path)
    distributed.barrier(f"{path} is whole")
    return True


def copy(path: epath.Path, inputs: Mapping[str, Any], others: Sequence[epath.Path]) -> epath.Path | None:
    """Copies to `path`, unless it is there, the first of other artifacts that was made from the same inputs.

    Returns which, if any; process 0 copies, the others return None. As with `make` it is whole or not there:
    done.json is copied last, and what a killed copy leaves is begun again.
    Raises ValueError if an unfinished `path` was begun from other inputs.
    """
    path, inputs = epath.Path(path), _as_json(inputs)
    unfinished = path.parent / f"{path.name}.unfinished"
    if not distributed.is_main() or is_done(path) or is_done(unfinished):
        return None
    for other in map(epath.Path, others):
        if not is_done(other):
            continue
        done = json.loads((other / "done.json").read_text())
        if done["inputs"] != inputs:
            continue
        if (unfinished / "inputs.json").exists():
            _check_same(unfinished, json.loads((unfinished / "inputs.json").read_text()), inputs)
        _delete(unfinished)
        _copy_folder(other, unfinished, without=("done.json", "inputs.json", CHECKPOINTS))
        write_json(unfinished / "done.json", {**done, "copied_from": str(other)})
        _finish(unfinished, path)
        return other
    return None


def is_done(path: epath.Path) -> bool:
    """Whether the artifact is whole."""
    return (epath.Path(path) / "done.json").exists()


def measured(path: epath.Path) -> dict[str, Any]:
    """What was measured while the artifact was made."""
    return json.loads((epath.Path(path) / "done.json").read_text())["measured"]


def require(path: epath.Path, stage: str) -> epath.Path:
    """The path, or FileNotFoundError that names the stage which makes it."""
    if not is_done(path):
        raise FileNotFoundError(f"{path} is not there yet: run the same command with --stage={stage} first")
    return path


@contextlib.contextmanager
def new_folder(
    path: epath.Path, *, keep_failed: bool = False, inputs: Mapping[str, Any] | None = None
) -> Iterator[epath.Path]:
    """A folder to fill, `path`.unfinished, which becomes `path` when the block ends without an error.

    What a killed process left of an earlier attempt is thrown away, unless it was made from the same
    `inputs`; what an error leaves, unless keep_failed. Raises ValueError if `path` is there, and BusyError if
    another process is making it.
    """
    path = epath.Path(path)
    if path.exists():
        raise ValueError(f"--out={path} exists already: delete it or pick another --out.")
    unfinished = path.parent / f"{path.name}.unfinished"
    made_from = unfinished / "inputs.json"
    left = unfinished.exists()
    unfinished.mkdir(parents=True, exist_ok=True)
    with _alone(unfinished):
        same = inputs is not None and made_from.exists() and json.loads(made_from.read_text()) == inputs
        if left and not same:
            for item in unfinished.iterdir():
                item.rmtree() if item.is_dir() else item.unlink()
        if inputs is not None:
            write_json(made_from, dict(inputs))
        try:
            yield unfinished
        except BaseException:
            if not keep_failed:
                _delete(unfinished)
            raise
        made_from.unlink(missing_ok=True)
        unfinished.rename(path)


class BusyError(ValueError):
    """Another process is making the folder."""


@contextlib.contextmanager
def _alone(unfinished: epath.Path) -> Iterator[None]:
    """Nobody else makes the folder meanwhile: a lock that ends with the process, where there are such."""
    with contextlib.ExitStack() as stack:
        if distributed.is_main() and not in_bucket(unfinished):
            descriptor = os.open(unfinished, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"another process is making {unfinished}: wait until it has ended, or end it"
                raise BusyError(message) from None
            except OSError:  # NFS has none for folders
                pass
        yield


def write_json(path: epath.Path, content: Any) -> None:
    """Writes a JSON file whole or not at all; process 0 does."""
    if not distributed.is_main():
        return
    with written_whole(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n")


def _finish(unfinished: epath.Path, path: epath.Path) -> None:
    """Gives what is whole its name. A bucket copies object by object, and done.json last of all."""
    if not in_bucket(path):
        unfinished.rename(path)
        return
    _delete(path)  # what a killed copy left
    _copy_folder(unfinished, path, without=("done.json", "inputs.json", CHECKPOINTS))
    (path / "done.json").write_text((unfinished / "done.json").read_text())
    (unfinished / "done.json").unlink()  # what a kill leaves of it from here on is nothing that is done
    _delete(unfinished)


def _tidy(path: epath.Path) -> None:
    """Takes away what served only until the artifact was whole."""
    _delete(path / CHECKPOINTS)
    (path / "inputs.json").unlink(missing_ok=True)


def _copy_folder(source: epath.Path, target: epath.Path, without: Sequence[str] = ()) -> None:
    target.mkdir(parents=True)
    for item in source.iterdir():
        if item.name in without:
            continue
        if item.is_dir():
            _copy_folder(item, target / item.name)
        else:
            item.copy(target / item.name)


def _as_json(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """As they are when read from a file."""
    return json.loads(json.dumps(dict(inputs)))


def _delete(folder: epath.Path) -> None:
    if folder.exists():
        folder.rmtree()


def _check_same(path: epath.Path, made_from: dict[str, Any], inputs: dict[str, Any]) -> None:
    for name in sorted(made_from.keys() | inputs.keys()):
        before, now = made_from.get(name, "nothing"), inputs.get(name, "nothing")
        if before != now:
            raise ValueError(
                f"{path} was made with {name}={before!r}, the config says {now!r}: give another --workdir, "
                f"set it back, or delete {path} and what was made from it"
            )
