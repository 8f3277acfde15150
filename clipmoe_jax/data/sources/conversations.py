"""ShareGPT4V's captions: conversations about images."""

import itertools
import json
from collections.abc import Iterator

from clipmoe_jax.core.json_files import read_json
from clipmoe_jax.data.sources.base import (
    BadRecord,
    Entry,
    Images,
    Pair,
    parse_json,
)
from clipmoe_jax.data.sources.files import find_file, max_annotation_bytes


class ShareGPT4V:
    """A JSON list of conversations about images, as ShareGPT4V publishes its captions, or JSONL.

    An entry is {"id": str, "image": path under the image folder, "conversations": [{"from":
    "human", "value": …}, {"from": "gpt", "value": caption}]}; the caption is the first "gpt" turn.
    """

    def __init__(self, path: str, images: str, follow_links: bool = False):
        """Raises FileNotFoundError for a wrong path and ValueError for a malformed file."""
        file = find_file(path, "sharegpt4v")
        self._images = Images(images, follow_links)
        if file.suffix == ".jsonl":
            # A line that is cut off is one bad record; in a list it would be the end of all.
            lines = filter(bytes.strip, file.read_bytes().splitlines())
            self._entries = [entry for i, line in enumerate(lines) for entry in _entries_of(i, line)]
            return
        self._entries = read_json(file, list, max_annotation_bytes())

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        return self.entries_from(0)

    def entries_from(self, first: int) -> Iterator[Pair | BadRecord]:
        entries = enumerate(itertools.islice(self._entries, first, None), first)
        return self._images.pairs(self._read(i, entry) for i, entry in entries)

    def _read(self, i: int, entry: object) -> Entry | BadRecord:
        if isinstance(entry, BadRecord):
            return entry
        if not isinstance(entry, dict):
            return BadRecord(f"entry {i}", "malformed entry", f"a {type(entry).__name__}")
        name = entry.get("image")
        record_id = str(entry.get("id") or name or f"entry {i}")
        try:
            caption = _first_answer(entry["conversations"])
        except (KeyError, TypeError, AttributeError):
            return BadRecord(record_id, "malformed entry", f'entry {i} has malformed "conversations"')
        return Entry(record_id, name, [caption])


def _entries_of(i: int, line: bytes) -> Iterator[object]:
    """Yields the entries of a line: more than one where joined files lack the end of a line between them."""
    rest = line.decode("utf-8-sig", "surrogateescape").strip()
    while rest:
        try:
            entry, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            yield parse_json(f"entry {i}", rest.encode("utf-8", "surrogateescape"))
            return
        yield entry
        rest = rest[end:].lstrip()


def _first_answer(conversations: list[dict]) -> object:
    return next((turn["value"] for turn in conversations if turn.get("from") == "gpt"), None)
