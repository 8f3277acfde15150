"""The images nearest to a query among features on disk (`evaluation.embedding`).

Letters: n images of a part, d embedding.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from clipmoe_jax.core import checksums
from clipmoe_jax.data.npy import map_array
from clipmoe_jax.data.sources.base import Pair, Source, entries_from
from clipmoe_jax.evaluation.embedding import image_of

ROUNDING = 1e-5  # that inner products of float32 unit vectors may differ by


class Hit(NamedTuple):
    """An image that was found.

    Attributes:
        similarity: the cosine to the query.
        id, caption: of its pair.
        entry: its number in the source.
    """

    similarity: float
    id: str
    caption: str
    entry: int


def nearest(folder: epath.Path, query: np.ndarray, most: int) -> list[Hit]:
    """Returns at most so many images by their similarity to a unit vector, (d,), the nearest first.

    Of equal ones the first in the source comes first. One part is in memory at a time. Raises ValueError
    naming a damaged file.
    """
    import pyarrow.parquet  # here because it is slow to import

    checksums.verify(folder, "img_emb", "metadata")
    found: list[tuple[float, int, int]] = []  # similarity, and part and row counted down
    parts, query = sorted((folder / "img_emb").glob("*.npy")), query.astype(np.float32)
    for part, file in enumerate(parts):
        features = np.asarray(map_array(file), np.float32)
        product = features @ query
        # Equal images differ in the last bit there (`evaluation.ties`): all that may be among the nearest are
        # summed up alike.
        least = np.partition(product, -most)[-most] if most < len(product) else -np.inf
        rows = np.flatnonzero(product >= least - ROUNDING)
        similarities = (features[rows] * query).sum(axis=1)
        near = zip(similarities.tolist(), rows.tolist(), strict=True)
        found = heapq.nlargest(most, found + [(similarity, -part, -row) for similarity, row in near])
    tables, hits = {}, []
    for similarity, part, row in found:
        if part not in tables:
            name = parts[-part].name.replace("img_emb", "metadata").replace(".npy", ".parquet")
            tables[part] = pyarrow.parquet.read_table(folder / "metadata" / name)
        values = [tables[part].column(name)[-row].as_py() for name in ("image_path", "caption", "entry")]
        hits.append(Hit(similarity, *values))
    return hits


def read_images(source: Source, hits: Sequence[Hit]) -> list[bytes | np.ndarray]:
    """Returns the hits' images, as `image_of`. Raises ValueError if the source has others now."""
    images = []
    for hit in hits:
        pair = next(entries_from(source, hit.entry), None)
        if not isinstance(pair, Pair) or pair.id != hit.id:
            raise ValueError(
                f"entry {hit.entry} of the source is no longer {hit.id}: it has changed, embed it again"
            )
        images.append(image_of(source, pair))
    return images
