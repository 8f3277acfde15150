"""Prepares a source in parts, each by a process of its own, perhaps on another machine, and merges them.

Part K of N, K from 0 to N - 1, makes a range of the files of the whole data set, in OUT.parts/K-of-N. No part
waits for another. Merged they are what one process makes of the source, byte for byte: entries whose id came
in an earlier part are taken out then.
"""

import contextlib
import errno
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from clipmoe_jax.core import artifacts, checksums, metrics
from clipmoe_jax.core.errors import first_line
from clipmoe_jax.core.json_files import field, read_json
from clipmoe_jax.core.paths import check_plain_folder
from clipmoe_jax.core.terminal import shortened
from clipmoe_jax.data import records
from clipmoe_jax.data.npy import map_array
from clipmoe_jax.data.preparation import (
    BAD_RECORDS,
    PLAN,
    BadRecords,
    Layout,
    Totals,
    check_arguments,
    check_on_disk,
    make_shards,
    write_set,
)
from clipmoe_jax.data.shard_files import Encoder, beside, read_shard, reader, without_duplicates
from clipmoe_jax.data.sources.base import AttributeSpec, Source, attribute_table

PART = "part.json"
MOST_NAMED = 5  # missing parts in an error
IDS_AT_A_TIME = 1 << 25  # in memory, 24 bytes each, while those that come again are looked for
# What a file system answers that cannot give a file a second name, or not there.
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Part(NamedTuple):
    """One of the parts of a source, `number` from 0 to `total` - 1."""

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Reads "K/N". Raises ValueError."""
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text, re.ASCII)
        if not match or int(match[1]) >= int(match[2]):
            raise ValueError(f"part={text} is not K/N with K from 0 to N - 1: 64 parts are 0/64 to 63/64")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def folder(self, out: os.PathLike | str) -> epath.Path:
        """Returns where the part of a data set lies."""
        return parts_folder(out) / f"{self.number:05d}-of-{self.total:05d}"

    def shards(self, layout: Layout) -> range:
        """Returns the files of the data set that the part makes. Raises ValueError if some had none."""
        if self.total > layout.num_shards:
            raise ValueError(
                f"part={self}: {layout.entries:,} entries make {layout.num_shards:,} files, too few for "
                f"{self.total:,} parts: take at most {layout.num_shards:,} parts, or set num_shards"
            )
        return range(
            self.number * layout.num_shards // self.total, (self.number + 1) * layout.num_shards // self.total
        )


def parts_folder(out: os.PathLike | str) -> epath.Path:
    """Returns the folder of all parts of a data set."""
    return epath.Path(out).parent / f"{epath.Path(out).name}.parts"


def prepare_part(
    source: Source,
    out: str,
    part: Part,
    *,
    name: str,
    files: str = "",
    split: str = "train",
    max_bad_fraction: float = 1e-3,
    num_shards: int | None = None,
    pixels: int | None = None,
) -> dict[str, int]:
    """Makes a part of a data set, unless it is there; goes on where a killed run of the same part ended.

    Args:
        source, split, num_shards, pixels: as for `preparation.write_pairs`.
        out: the folder that the data set will be.
        name: of the source. files: a stamp of its files. Parts of another cannot be merged with this.
        max_bad_fraction: of the entries of the whole source, how many of the part's may be bad.

    Returns:
        {"pairs", "captions", "image_bytes", "bad"} of the part.

    Raises:
        ValueError: as `preparation.prepare`, for more parts than files, and if the part was made before from
            something else.
    """
    check_on_disk(out)
    check_arguments(split, max_bad_fraction, num_shards, pixels)
    _check_free(out)
    layout, table = Layout.of(source, num_shards, split, pixels), attribute_table(source)
    shards, folder = part.shards(layout), part.folder(out)
    made_from = {"source": name, "files": files, **layout._asdict(), "attributes": _as_lists(table)}
    if folder.exists():
        before = field(content := read_json(folder / PART), "made_from", dict, f"{folder / PART}")
        _check_same(folder, before, "this command", made_from, "delete it, or choose another --out")
        return field(content, "counts", dict, f"{folder / PART}")
    with artifacts.new_folder(folder, keep_failed=True, inputs=made_from, with_checksums=True) as unfinished:
        totals, bad = make_shards(
            source, unfinished, layout, shards, Encoder(pixels, table), max_bad_fraction
        )
        counts = totals.counts() | {"bad": bad.counts.total()}
        (unfinished / PLAN).unlink()
        artifacts.write_json(unfinished / PART, {"made_from": made_from, "counts": counts})
    return counts


def merge(out: str, *, max_bad_fraction: float = 1e-3) -> dict[str, Any]:
    """Makes a data set of its parts, and deletes these.

    Files get their name in the data set beside the one that they have, where the file system can, and are
    copied elsewhere. A killed merge starts again; until the data set is whole the parts stay as they are.

    Args:
        out: the folder to make.
        max_bad_fraction: of all entries, how many may be bad.

    Returns:
        The report, as `preparation.write_pairs`.

    Raises:
        FileNotFoundError: there are no parts.
        TooManyBadRecordsError: more than max_bad_fraction are bad.
        ValueError: a part is missing, not whole, damaged or made from something else; no usable pair; `out`
            exists.
    """
    check_on_disk(out)
    check_arguments("train", max_bad_fraction, None, None)
    _check_free(out)
    folders = _whole_parts(parts_folder(out))
    made_from = _made_from(folders)
    layout = Layout(*(made_from[name] for name in Layout._fields))
    table = made_from["attributes"]
    if table is not None:
        table = {name: AttributeSpec(prompt, tuple(values)) for name, (prompt, values) in table.items()}
    encoder, totals = Encoder(layout.pixels, table), Totals()
    paths = [layout.path(folder, k) for part, folder in folders.items() for k in part.shards(layout)]
    for path in paths:
        if not all(file.exists() for file in (path, *beside(path))):
            folder = path.parents[2]
            raise ValueError(
                f"{folder} has no file {path.name}, whole: delete it, and prepare that part again"
            )
    with artifacts.new_folder(epath.Path(out), with_checksums=True) as folder:
        duplicates = _duplicates(paths)
        layout.path(folder, 0).parent.mkdir(parents=True)
        progress = metrics.progress_bar("merging", len(paths), "file")
        bad_records = parts_folder(out) / BAD_RECORDS  # which an error leaves there
        with bad_records.open("w") as log, progress:
            advice = f"fix them, and delete and prepare their parts in {parts_folder(out)} again"
            bad = BadRecords(log, layout.entries, max_bad_fraction, advice)
            for k, path in enumerate(paths):
                shard, target = read_shard(path), layout.path(folder, k)
                _check_whole(path, int(np.count_nonzero(shard.entries["tokens"])))
                if k in duplicates:
                    shard = without_duplicates(path, shard, duplicates[k], target, encoder)
                else:
                    _link(path, target)
                for record in shard.bad:
                    bad.add(record)
                totals.add(shard)
                progress.update()
            bad.check()
        shutil.move(bad_records, folder / BAD_RECORDS)
        report = write_set(folder, layout, table, encoder, totals, bad)
    for part in folders:
        part.folder(out).rmtree()
    with contextlib.suppress(OSError):  # something else lies there
        os.rmdir(parts_folder(out))
    return report


def _check_free(out: os.PathLike | str) -> None:
    """Raises ValueError if a data set is there."""
    if epath.Path(out).exists():
        advice, parts = "delete it or choose another folder", parts_folder(out)
        if parts.exists():
            advice = f"delete {parts} if it was made of them; otherwise {advice}"
        raise ValueError(f"{out} exists already: {advice}")


def _whole_parts(folder: epath.Path) -> dict[Part, epath.Path]:
    """Returns the folder of each part, in order. Raises ValueError if one is missing or not whole."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: prepare parts first, --part=0/N and so on")
    check_plain_folder(folder)
    found, unfinished = {}, set()
    for item in folder.iterdir():
        if match := re.fullmatch(r"(\d{5})-of-(\d{5})(\.unfinished)?", item.name, re.ASCII):
            part = Part(int(match[1]), int(match[2]))
            found |= {} if match[3] else {part: item}
            unfinished |= {part} if match[3] else set()
    counts = sorted({part.total for part in found.keys() | unfinished})
    if not counts:
        raise FileNotFoundError(f"{folder} has no parts: prepare them first, --part=0/N and so on")
    if len(counts) > 1:
        raise ValueError(
            f"{folder} has parts of {' and of '.join(map(str, counts))}: delete those of all numbers but one"
        )
    wanted = [Part(k, counts[0]) for k in range(counts[0])]
    if lacking := [part for part in wanted if part not in found]:
        named = [f"{part} is {'not whole' if part in unfinished else 'missing'}" for part in lacking]
        more = f" and {len(named) - MOST_NAMED:,} more" if len(named) > MOST_NAMED else ""
        raise ValueError(
            f"{folder} has {len(found):,} of {counts[0]:,} parts: {', '.join(named[:MOST_NAMED])}{more}; "
            f"prepare each with --part=K/{counts[0]}"
        )
    return {part: found[part] for part in wanted}


def _made_from(folders: Mapping[Part, epath.Path]) -> dict[str, Any]:
    """Returns what all parts were made from. Raises ValueError if they differ or one is damaged."""
    first, *_ = folders.values()
    contents = {}
    for folder in folders.values():
        checksums.verify(folder, records.NAME, PART)
        contents[folder] = field(read_json(folder / PART), "made_from", dict, f"{folder / PART}")
        advice = "delete those that are wrong, and prepare them again"
        _check_same(folder, contents[folder], first, contents[first], advice)
    return contents[first]


def _check_same(
    folder: epath.Path, one: Mapping[str, Any], what: object, other: Mapping[str, Any], advice: str
) -> None:
    """Raises ValueError naming what differs, if a part in a folder and `what` are not made from the same."""
    for name in {**one, **other}:
        if (before := one.get(name)) == (now := other.get(name)):
            continue
        if name == "files":
            differs = "names, sizes or times of the source's files differ"
            raise ValueError(f"{folder} was made from other files than {what} ({differs}): {advice}")
        before, now = (shortened(str(value), 200) for value in (before, now))
        raise ValueError(f"{folder} was made with {name}={before}, {what} with {name}={now}: {advice}")


def _as_lists(table: Mapping[str, AttributeSpec] | None) -> dict[str, list] | None:
    """Returns a table of attributes as JSON gives it back."""
    if table is None:
        return None
    return {name: [prompt, list(values)] for name, (prompt, values) in table.items()}


def _check_whole(path: epath.Path, num_records: int) -> None:
    """Raises ValueError unless a file has so many records."""
    advice = f"copy it again, or delete {path.parents[2]} and prepare that part again"
    try:
        with reader(path) as opened:
            found = opened.num_records()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({first_line(error)}): {advice}") from error
    if found != num_records:
        raise ValueError(f"{path} has {found:,} records, and had {num_records:,}: {advice}")


def _duplicates(paths: Sequence[epath.Path]) -> dict[int, list[int]]:
    """Returns {number of a file: numbers of its entries} of all entries whose id came in an earlier one.

    As many ids are in memory as `IDS_AT_A_TIME`: the tables of all files are read once for each so many.
    """
    tables = [beside(path)[0] for path in paths]
    starts = np.cumsum([0, *(len(map_array(table, verify=False)) for table in tables)])
    found = defaultdict(list)
    num_passes = -(-int(starts[-1]) // IDS_AT_A_TIME)
    with metrics.progress_bar("comparing ids", num_passes, "pass", delay=5) as progress:
        for number in range(num_passes):
            for entry in _repeated(tables, starts, number, num_passes):
                k = int(np.searchsorted(starts, entry, side="right")) - 1
                found[k].append(entry - int(starts[k]))
            progress.update()
    return found


def _repeated(
    tables: Sequence[epath.Path], starts: np.ndarray, number: int, num_passes: int
) -> Iterator[int]:
    """Yields the entries, counted over all tables, whose id came before: of the ids of one pass."""
    ids, entries = [], []
    for table, start in zip(tables, starts, strict=False):
        of_file = map_array(table, verify=False)["id"]
        chosen = np.flatnonzero((of_file[:, 0] % np.uint64(num_passes) == number) & of_file.any(axis=1))
        ids.append(of_file[chosen])
        entries.append(chosen + start)
    ids, entries = np.concatenate(ids), np.concatenate(entries)
    order = np.argsort(ids[:, 0], kind="stable")
    same = ids[order[1:], 0] == ids[order[:-1], 0]
    seen = set()
    for place in order[np.append(same, False) | np.insert(same, 0, False)].tolist():
        if (key := tuple(ids[place].tolist())) in seen:
            yield int(entries[place])
        seen.add(key)


def _link(path: epath.Path, target: epath.Path) -> None:
    """Gives a file a second name, or copies it where the file system cannot."""
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(path, target)
