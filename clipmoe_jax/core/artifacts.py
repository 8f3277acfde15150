"""Folders that a run makes: whole or absent, and recording the inputs they were made from.

A finished artifact has a `done.json`: the inputs it depends on (config fields, mostly), a hash of them,
package versions, when and on which devices it was made, and what was measured meanwhile; `checksums.json` has
the checksums of its files. Inputs that name data or files agree if the contents do, under any path. It is
built as `NAME.unfinished` and renamed once it is whole. A killed run leaves that folder, and the next run
continues in it. Its `checkpoints/` serve until then and are deleted last.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import filelock
import jax
from etils import epath

from clipmoe_jax.core import checksums, distributed
from clipmoe_jax.core.json_files import field, read_json
from clipmoe_jax.core.paths import check_plain_folder, in_bucket, written_whole
from clipmoe_jax.core.stamps import canonical

CHECKPOINTS = "checkpoints"
DONE, INPUTS, LOCK = "done.json", "inputs.json", ".lock"
NOT_COPIED = (DONE, INPUTS, LOCK, CHECKPOINTS)
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")

# An input "contents of NAME" is a hash of the data or files that the input NAME names.
CONTENTS = "contents of "

Inputs = Mapping[str, Any]
# From the inputs that an earlier version recorded to the names that this version gives them.
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]


class MissingArtifactError(FileNotFoundError):
    """An artifact that a stage reads does not exist yet. `stage` names the stage that makes it."""

    def __init__(self, path: epath.Path, stage: str):
        super().__init__(f"{path} does not exist yet: stage {stage} makes it")
        self.stage = stage


class BusyError(ValueError):
    """Another process is making the folder."""


def make(
    path: epath.Path,
    inputs: Inputs,
    build: Callable[[epath.Path], dict[str, Any]],
    upgrade: Upgrade | None = None,
) -> bool:
    """Makes an artifact unless it exists. Returns whether anything was built.

    path: the artifact's folder. inputs: {name: value} of everything it depends on. build: fills the
    unfinished folder, continuing with what it finds there, and returns measurements for done.json. upgrade:
    renames the inputs that an earlier version recorded, before they are compared.
    Raises ValueError naming the first input that differs if the folder, whole or unfinished, was made from
    others, and BusyError if another process is making it. An unfinished folder that holds nothing is no
    obstacle.
    """
    path, inputs = epath.Path(path), _as_json(inputs)
    unfinished = _unfinished(path)
    with contextlib.ExitStack() as stack:

        def begin() -> bool:
            """Returns whether there is anything to build."""
            if not is_done(path):
                stack.enter_context(_locked(unfinished))
                if is_done(unfinished) and not is_done(path):  # killed between the last lines below
                    _finish(unfinished, path)
            if is_done(path):
                _check_same(path, _recorded(path / DONE, upgrade), inputs)
                _tidy(path)
                _delete(unfinished)  # a kill may leave some of it in a bucket
                return False
            if _is_begun(unfinished):
                _check_same(unfinished, _recorded(unfinished / INPUTS, upgrade), inputs)
            else:
                _clear(unfinished)
                write_json(unfinished / INPUTS, inputs)
            (unfinished / checksums.CHECKSUMS).unlink(missing_ok=True)  # of a build that was killed behind it
            return True

        if not distributed.on_main(f"{path} begins", begin):
            return False
        began = time.monotonic()
        measurements = build(unfinished)
        distributed.barrier(f"{path} is made")
        if distributed.is_main():
            done = {
                "inputs": inputs,
                "inputs_sha256": hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
                "measured": measurements,
                "made": {
                    "finished": round(time.time()),
                    "seconds": round(time.monotonic() - began, 1),
                    "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
                },
                "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            }
            _write_done(unfinished, done)
            _finish(unfinished, path)
            _tidy(path)
    distributed.barrier(f"{path} is whole")
    return True


def difference(
    path: epath.Path, inputs: Inputs, upgrade: Upgrade | None = None, *, partial: bool = False
) -> tuple[epath.Path, str] | None:
    """Returns the folder of an artifact that `make` would refuse, whole or unfinished, and how it differs.

    Such as "was made with seed=0, the config says 1: set it back". None where nothing differs or is there.
    upgrade: as for `make`. partial: it may have been made from more inputs than these.
    """
    path, inputs = epath.Path(path), _as_json(inputs)
    if is_done(path):
        folder, file = path, DONE
    elif _is_begun(folder := _unfinished(path)):
        file = INPUTS
    else:
        return None
    recorded = _recorded(folder / file, upgrade)
    if partial:
        recorded = {name: value for name, value in recorded.items() if name in inputs}
    differs = _difference(recorded, inputs)
    return (folder, differs) if differs else None


def copy(
    path: epath.Path, inputs: Inputs, others: Sequence[epath.Path], upgrade: Upgrade | None = None
) -> epath.Path | None:
    """Copies the first of other artifacts that was made from the same inputs to `path`, unless that exists.

    Returns the artifact that was copied, or None. Only process 0 may call it. As with `make`, `path` is whole
    or absent: done.json is copied last, and a killed copy starts over. upgrade: as for `make`. Raises
    ValueError if an unfinished `path` was begun from other inputs, and BusyError if another process is making
    it.
    """
    path, inputs = epath.Path(path), _as_json(inputs)
    unfinished = _unfinished(path)
    if is_done(path) or is_done(unfinished):
        return None
    for other in map(epath.Path, others):
        if not is_done(other) or _differing(_recorded(other / DONE, upgrade), inputs):
            continue
        with _locked(unfinished):
            if _is_begun(unfinished):
                _check_same(unfinished, _recorded(unfinished / INPUTS, upgrade), inputs)
            _clear(unfinished)
            recorded = checksums.read(other)
            checksums.verify(other, *dict.fromkeys(name.partition("/")[0] for name in recorded))
            _copy_folder(other, unfinished, without=NOT_COPIED)
            done = {**read_json(other / DONE), "copied_from": str(other)}
            _write_done(unfinished, done, recorded)
            _finish(unfinished, path)
            _tidy(path)
        return other
    return None


def is_done(path: epath.Path) -> bool:
    """Returns whether the artifact is whole."""
    return (epath.Path(path) / DONE).exists()


def done_field(path: epath.Path, name: str) -> dict[str, Any]:
    """Returns "inputs", "measured" or "versions" of an artifact's done.json.

    Raises ValueError naming the file and what is wrong in it.
    """
    file = epath.Path(path) / DONE
    return field(checksums.read_verified(file), name, dict, str(file))


def measured(path: epath.Path) -> dict[str, Any]:
    """Returns the measurements that were taken while the artifact was made."""
    return done_field(path, "measured")


def made(path: epath.Path) -> dict[str, Any]:
    """Returns "finished" (seconds since 1970), "seconds" and "devices", and of a copy "copied_from", the
    folder where that was; {} of earlier versions."""
    done = checksums.read_verified(epath.Path(path) / DONE)
    made = done.get("made", {})
    return made | {"copied_from": done["copied_from"]} if "copied_from" in done else made


def require(path: epath.Path, stage: str) -> epath.Path:
    """Returns the path of an artifact that must exist.

    stage: the stage that makes it. Raises MissingArtifactError, which names it, if there is none.
    """
    if not is_done(path):
        raise MissingArtifactError(path, stage)
    return path


@contextlib.contextmanager
def new_folder(
    path: epath.Path, *, keep_failed: bool = False, inputs: Inputs | None = None, with_checksums: bool = False
) -> Iterator[epath.Path]:
    """Yields a folder to fill, `path`.unfinished, which becomes `path` when the block ends without an error.

    Deletes what a killed process left of an earlier attempt, unless it has the same `inputs`, and what an
    error leaves, unless keep_failed. with_checksums: writes checksums.json beside the files. Raises
    ValueError if `path` exists, and BusyError if another process is making it.
    """
    path = epath.Path(path)
    if path.exists() or os.path.islink(path):  # a link to nothing
        raise ValueError(f"{path} exists already: delete it or choose another folder")
    unfinished = _unfinished(path)
    made_from = unfinished / INPUTS
    with _locked(unfinished):
        if inputs is None or not made_from.exists() or read_json(made_from) != inputs:
            _clear(unfinished)
        if inputs is not None:
            write_json(made_from, dict(inputs))
        try:
            yield unfinished
        except BaseException:
            if not keep_failed:
                _delete(unfinished)
            raise
        made_from.unlink(missing_ok=True)
        if with_checksums:
            checksums.write(unfinished, checksums.of_folder(unfinished))
        unfinished.rename(path)
        (path / LOCK).unlink(missing_ok=True)


def write_json(path: epath.Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all. Only process 0 writes."""
    if not distributed.is_main():
        return
    with written_whole(path) as file:
        file.write_text(_as_text(content))


def write_verified_json(path: epath.Path, content: Any) -> None:
    """Writes a JSON file of a whole folder, and its checksum beside the others'. Only process 0 writes."""
    if not distributed.is_main():
        return
    recorded = checksums.read(path.parent, fix="delete it")
    if recorded.pop(path.name, None):  # a kill between here and the end leaves the file without one
        checksums.write(path.parent, recorded)
    write_json(path, content)
    checksums.write(path.parent, {**recorded, path.name: checksums.of_text(_as_text(content))})


@contextlib.contextmanager
def _locked(unfinished: epath.Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it. Raises BusyError if one is at work there.

    The lock ends with this process, however that ends. Buckets and file systems without locks have none.
    Raises ValueError for a link in its place, and for one in it: what is there is deleted and written.
    """
    if not in_bucket(unfinished):
        if os.path.islink(unfinished):
            raise ValueError(f"{unfinished} is a link, and what is there would be deleted: delete the link")
        check_plain_folder(unfinished)
    unfinished.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if not in_bucket(unfinished):
            # A soft lock, which filelock falls back to, would outlive a killed process.
            lock = filelock.FileLock(os.fspath(unfinished / LOCK), timeout=0, fallback_to_soft=False)
            try:
                stack.enter_context(lock)
            except filelock.Timeout:
                message = f"another process is making {unfinished}: wait until it has ended, or end it"
                raise BusyError(message) from None
            except OSError:  # no locks here, as on some network file systems
                pass
        yield


def _unfinished(path: epath.Path) -> epath.Path:
    return path.parent / f"{path.name}.unfinished"


def _is_begun(unfinished: epath.Path) -> bool:
    """Returns whether a folder has recorded its inputs and holds any file made from them."""
    own = {unfinished / name for name in (INPUTS, LOCK)}
    return (unfinished / INPUTS).exists() and any(file not in own for file in _files(unfinished))


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _files(item)
        else:
            yield item


def _recorded(path: epath.Path, upgrade: Upgrade | None) -> dict[str, Any]:
    """Returns the inputs in a done.json or inputs.json, named as this version names them."""
    checksums.verify(path.parent, path.name)
    try:
        content = read_json(path)
        inputs = field(content, "inputs", dict, str(path)) if path.name == DONE else content
    except ValueError as error:
        advice = f"put it back, or delete {path.parent} and what was made from it"
        raise ValueError(f"{error}: {advice}") from error
    try:
        return _as_json(upgrade(inputs)) if upgrade else inputs
    except ValueError as error:
        raise ValueError(f"{path.parent}: {error}") from error


def _finish(unfinished: epath.Path, path: epath.Path) -> None:
    """Gives a whole artifact its name. In a bucket, copies its objects, done.json last of all."""
    if not in_bucket(path):
        unfinished.rename(path)
        return
    _delete(path)  # left by a killed copy
    _copy_folder(unfinished, path, without=NOT_COPIED)
    (path / DONE).write_text((unfinished / DONE).read_text())
    (unfinished / DONE).unlink()  # first, so that a kill from here on leaves nothing that looks done
    _delete(unfinished)


def _tidy(path: epath.Path) -> None:
    """Deletes what was needed only until the artifact was whole."""
    _delete(path / CHECKPOINTS)
    for name in (INPUTS, LOCK):
        (path / name).unlink(missing_ok=True)


def _copy_folder(source: epath.Path, target: epath.Path, without: Sequence[str] = ()) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        if item.name in without:
            continue
        if item.is_dir():
            _copy_folder(item, target / item.name)
        else:
            item.copy(target / item.name)


def _write_done(folder: epath.Path, done: Inputs, recorded: Mapping[str, str] | None = None) -> None:
    """Writes checksums.json, and done.json last. recorded: the files' checksums; None computes them."""
    of_files = recorded or checksums.of_folder(folder, without=(INPUTS, CHECKPOINTS))
    checksums.write(folder, {**of_files, DONE: checksums.of_text(_as_text(done))})
    write_json(folder / DONE, done)


def _as_text(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"


def _as_json(inputs: Inputs) -> dict[str, Any]:
    """Returns inputs as a file gives them back: lists for tuples."""
    return json.loads(json.dumps(dict(inputs)))


def _delete(folder: epath.Path) -> None:
    if folder.exists():
        folder.rmtree()


def _clear(unfinished: epath.Path) -> None:
    """Deletes everything in a folder but its lock."""
    for item in unfinished.iterdir():
        if item.name == LOCK:
            continue
        if item.is_dir():
            item.rmtree()
        else:
            item.unlink()


def _check_same(path: epath.Path, recorded: dict[str, Any], inputs: dict[str, Any]) -> None:
    if differs := _difference(recorded, inputs):
        advice = f"choose another workdir, or delete {path} and what was made from it"
        raise ValueError(f"{path} {differs}, {advice}")


def _difference(recorded: dict[str, Any], inputs: dict[str, Any]) -> str | None:
    name = _differing(recorded, inputs)
    if name is None:
        return None
    if name.startswith(CONTENTS):
        return f"was made from other {name} than are there now: put those back"
    before, now = recorded.get(name, "nothing"), inputs.get(name, "nothing")
    return f"was made with {name}={before!r}, the config says {now!r}: set it back"


def _differing(recorded: dict[str, Any], inputs: dict[str, Any]) -> str | None:
    """Returns the name of the first input that differs, contents last; None if none does."""
    names = sorted(recorded.keys() | inputs.keys(), key=lambda name: (name.startswith(CONTENTS), name))
    return next((name for name in names if not _agree(name, recorded, inputs)), None)


def _agree(name: str, recorded: dict[str, Any], inputs: dict[str, Any]) -> bool:
    before, now, contents = recorded.get(name), inputs.get(name), CONTENTS + name
    if name.startswith(CONTENTS) and name not in recorded:  # an earlier version did not look at them
        return True
    if before == now and (name in recorded) == (name in inputs):
        return True
    if contents in recorded and contents in inputs:
        return recorded[contents] == inputs[contents]
    if contents in inputs and isinstance(before, str) and isinstance(now, str):
        return canonical(before) == canonical(now)
    return False
