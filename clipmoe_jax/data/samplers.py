"""Samplers: the records that each step uses, pure functions of (seed, step) and the same on every host.

Letters: N records, B records of a global batch, S steps of an epoch, C clusters. Steps count on over epochs:
epoch = step // S. No order is stored: a keyed permutation gives the records of one step, so that a sampler
over a billion pairs opens at once.
"""

import numpy as np

from clipmoe_jax.data.clusters import ClusterIndex
from clipmoe_jax.data.permutation import make_key, permute


class SequentialSampler:
    """Records `first` to `num_records` once, in order; the last batch is padded with -1. For evaluation and
    embedding."""

    def __init__(self, num_records: int, global_batch: int, first: int = 0):
        _check_not_empty(num_records - first)
        self.global_batch = global_batch
        self.num_steps = -(-(num_records - first) // global_batch)
        self._num_records, self._first = num_records, first

    def indices(self, step: int) -> np.ndarray:
        """Returns int64 (B,), -1 for padding."""
        indices = self._first + np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        return np.where(indices < self._num_records, indices, -1)

    def origin(self, step: int) -> str:
        """Describes where a step's records come from."""
        return f"records from {self._first + step * self.global_batch}"


class ShuffledSampler:
    """Every record at most once an epoch, in a new order each epoch; the last N mod B are left out."""

    def __init__(self, num_records: int, global_batch: int, seed: int):
        _check_batch(num_records, global_batch)
        self.global_batch = global_batch
        self.num_steps = num_records // global_batch
        self._num_records, self._seed = num_records, seed

    def indices(self, step: int) -> np.ndarray:
        """Returns int64 (B,)."""
        epoch, k = divmod(step, self.num_steps)
        places = np.arange(k * self.global_batch, (k + 1) * self.global_batch)
        return permute(places, self._num_records, make_key(self._seed, epoch))

    def origin(self, step: int) -> str:
        """Describes where a step's records come from."""
        return f"epoch {step // self.num_steps}, shuffled"


class ClusterSampler:
    """Every global batch comes from one cluster; every record is used at most once an epoch.

    Clusters form a tree: the parent of label l is l // labels_per_stage, the root is everything. What a
    cluster leaves over, having fewer records than a batch, backs off: it joins what its siblings leave over
    in the parent, up to the root. So an epoch has N // B steps, and no more than N mod B records (new ones
    each epoch) stay out. With small_clusters="drop", as in the released code, leftovers are not used.
    """

    def __init__(
        self,
        clusters: ClusterIndex,
        global_batch: int,
        seed: int,
        *,
        labels_per_stage: int = 9,
        small_clusters: str = "backoff",
    ):
        """clusters: of accumulated pseudo-labels. Raises ValueError if no cluster fills a batch."""
        _check_batch(len(clusters), global_batch)
        if small_clusters not in ("backoff", "drop"):
            raise ValueError(f"small_clusters={small_clusters!r}: choose 'backoff' or 'drop'")
        self.global_batch = global_batch
        self._clusters, self._seed = clusters, seed
        self._levels = [_Level(clusters.labels, clusters.sizes, global_batch)]
        while small_clusters == "backoff" and self._levels[-1].nodes.any():  # the root is node 0 alone
            self._levels.append(self._levels[-1].parents(labels_per_stage, global_batch))
        self._first_batch = np.cumsum([0, *(level.num_batches for level in self._levels)])
        self.num_steps = int(self._first_batch[-1])
        if not self.num_steps:
            raise ValueError(
                f"no cluster has as many as {global_batch} pairs (the largest has {clusters.sizes.max()}): "
                "choose a smaller batch or small_clusters='backoff'"
            )

    def indices(self, step: int) -> np.ndarray:
        """Returns int64 (B,), all from one cluster."""
        epoch, level, node, batch = self._find(step)
        # A place in the node's order of this epoch -> a place in its pool -> the same one level down, where
        # each pool is what a child's own batches have left over, down to the clusters themselves.
        places = np.arange(batch * self.global_batch, (batch + 1) * self.global_batch)
        nodes = np.full(len(places), node)
        for depth in range(level, 0, -1):
            pool, below = self._pool_places(epoch, depth, nodes, places), self._levels[depth - 1]
            nodes = np.searchsorted(below.left_starts, pool, side="right") - 1
            places = below.used[nodes] + pool - below.left_starts[nodes]
        return self._clusters.records(self._pool_places(epoch, 0, nodes, places))

    def _pool_places(self, epoch: int, depth: int, nodes: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Returns places among all pools of a level, (B,), of places in the epoch's orders of its nodes."""
        level = self._levels[depth]
        keys = make_key(self._seed, epoch, depth, level.nodes[nodes])
        return level.starts[nodes] + permute(places, level.sizes[nodes], keys)

    def origin(self, step: int) -> str:
        """Describes where a step's records come from."""
        epoch, level, node, _ = self._find(step)
        label = self._levels[level].nodes[node]
        if not level:
            return f"epoch {epoch}, cluster {label}"
        return f"epoch {epoch}, what is left of the clusters under {label}, {level} level(s) up"

    def report(self) -> dict[str, int]:
        """Counts an epoch's pairs by level (0 is the clusters themselves, 1 their parents, …), unused pairs,
        and clusters."""
        counts = {k: level.num_batches * self.global_batch for k, level in enumerate(self._levels)}
        report = {f"pairs_level_{k}": count for k, count in counts.items() if count}
        report["pairs_unused"] = len(self._clusters) - self.num_steps * self.global_batch
        report["num_clusters"] = len(self._clusters.labels)
        return report

    def _find(self, step: int) -> tuple[int, int, int, int]:
        """Returns the epoch, the level, the node's index in it, and the index of the batch in the node."""
        epoch, k = divmod(step, self.num_steps)
        batch = int(permute(np.array([k]), self.num_steps, make_key(self._seed, epoch))[0])
        level = int(np.searchsorted(self._first_batch, batch, side="right")) - 1
        batch -= self._first_batch[level]
        first = self._levels[level].first_batch
        node = int(np.searchsorted(first, batch, side="right")) - 1
        return epoch, level, node, int(batch - first[node])


class _Level:
    """The nodes of one level of the tree of clusters, each with a pool of records.

    nodes (M,): their labels, ascending. sizes (M,): records in each pool; starts (M,): where it begins among
    all pools of this level. used (M,): how many of a pool fill batches; the others, in the order of nodes,
    are the pools of the next level, where those of a node begin at left_starts (M,). first_batch (M,): of a
    node, among the batches of this level.
    """

    def __init__(self, nodes: np.ndarray, sizes: np.ndarray, global_batch: int):
        self.nodes, self.sizes = nodes, sizes
        self.starts = np.cumsum(sizes) - sizes
        self.used = sizes // global_batch * global_batch
        self._left = sizes - self.used
        self.left_starts = np.cumsum(self._left) - self._left
        batches = sizes // global_batch
        self.first_batch = np.cumsum(batches) - batches
        self.num_batches = int(batches.sum())

    def parents(self, labels_per_stage: int, global_batch: int) -> "_Level":
        """Returns the level above, whose pools are what this one leaves over."""
        nodes, first = np.unique(self.nodes // labels_per_stage, return_index=True)
        return _Level(nodes, np.add.reduceat(self._left, first), global_batch)


def _check_not_empty(num_records: int) -> None:
    if not num_records:
        raise ValueError("the data set is empty")


def _check_batch(num_records: int, global_batch: int) -> None:
    _check_not_empty(num_records)
    if num_records < global_batch:
        raise ValueError(
            f"the data set has {num_records} pairs, fewer than a batch of {global_batch}: choose a smaller "
            "batch size or more data"
        )
