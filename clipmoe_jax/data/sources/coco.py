"""COCO's caption annotations, and Karpathy's splits of COCO, Flickr8k and Flickr30k."""

import itertools
from collections import defaultdict
from collections.abc import Iterator

from clipmoe_jax.core.json_files import read_json
from clipmoe_jax.data.sources.base import (
    BadRecord,
    Entry,
    Images,
    Pair,
)
from clipmoe_jax.data.sources.files import find_file, max_annotation_bytes


class Coco:
    """All captions of an image together, in the order of "images"; captions of no image are bad records.

    COCO's own: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}. Karpathy's
    (dataset_coco.json): {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}, of which
    PATH#test takes a split, and #train takes "restval" with it, as is usual on COCO.
    """

    def __init__(self, path: str, images: str, follow_links: bool = False):
        """Raises FileNotFoundError for a wrong path, ValueError for another file or an unknown split."""
        path, _, split = path.partition("#")
        file = find_file(path, "coco")
        self._images = Images(images, follow_links)
        try:
            content = read_json(file, most=max_annotation_bytes())
            entries = content["images"]
            karpathy = any("sentences" in entry for entry in entries)
            self._entries = _karpathy(entries, split) if karpathy else _coco(content, split, path)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is neither COCO's captions nor Karpathy's splits: {error!r}") from error
        if split and not self._entries:
            raise ValueError(f"source coco:{path}#{split}: no image of {path} is of that split")

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        return self.entries_from(0)

    def entries_from(self, first: int) -> Iterator[Pair | BadRecord]:
        return self._images.pairs(
            Entry(f"entry {i}" if name is None else str(name), name, captions)
            for i, (name, captions) in enumerate(itertools.islice(self._entries, first, None), first)
        )


def _coco(content: dict, split: str, path: str) -> list[tuple[object, list]]:
    if split:
        raise ValueError(f"source coco:{path}#{split}: COCO's own file has no splits, leave #{split} out")
    captions = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation.get("caption"))
    entries = [(entry.get("file_name"), captions.pop(entry["id"], [])) for entry in content["images"]]
    return entries + [(None, orphans) for orphans in captions.values()]


def _karpathy(entries: list[dict], split: str) -> list[tuple[object, list]]:
    wanted = {"train", "restval"} if split == "train" else {split}
    return [
        ("/".join(filter(None, (entry.get("filepath"), entry["filename"]))), _raw(entry))
        for entry in entries
        if not split or entry["split"] in wanted
    ]


def _raw(entry: dict) -> list:
    return [sentence.get("raw") for sentence in entry["sentences"]]
