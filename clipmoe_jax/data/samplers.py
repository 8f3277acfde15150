"""Samplers: the records that each step uses, pure functions of (seed, step) and the same on every host.

Letters: N records, B records of a global batch, S steps of an epoch, C clusters, K sources. Steps count on
over epochs: epoch = step // S. No order is stored: a keyed permutation gives the records of one step, so that
a sampler over a billion pairs opens at once.
"""

from collections.abc import Sequence

import numpy as np

from clipmoe_jax.data.clusters import ClusterIndex
from clipmoe_jax.data.permutation import make_key, permute


class Shares:
    """The shares in which epochs draw from the sources of a data set, which follow each other in it.

    An epoch is as long as without shares. Records of a source take turns from epoch to epoch: each comes once
    before any comes again.

    Attributes:
        stops: (K,) int64, the first record after each source.
        draws: (K,) int64, how many records of each an epoch draws; N in all.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float]):
        """sizes: the records of each source, at least one. weights: positive, of any sum."""
        shares = np.cumsum(weights)
        self.stops = np.cumsum(sizes)
        self.draws = np.diff(np.rint(self.stops[-1] * (shares / shares[-1])).astype(np.int64), prepend=0)


class _Cells:
    """Draws by `Shares`: a cell is a cluster's records of one source, and all records lie in the order of
    clusters and, within one, of sources.

    Attributes:
        cluster_draws: (C,) int64, how many of each cluster.
    """

    def __init__(self, sizes: np.ndarray, shares: Shares, seed: int):
        """sizes: (C, K) int64, the records of each cell."""
        up_to = np.cumsum(sizes, axis=0)  # whole numbers: a source is drawn from as often as its share says
        draws = np.diff(shares.draws * up_to // up_to[-1], axis=0, prepend=0)
        self.cluster_draws = draws.sum(axis=1)
        self._sizes, self._draws, self._seed = sizes.ravel(), draws.ravel(), seed
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._first_draw = np.cumsum(self._draws) - self._draws

    def places(self, epoch: int, draws: np.ndarray) -> np.ndarray:
        """Returns the places among all records, (B,), of an epoch's draws, (B,) in 0 … N - 1."""
        cells, turns, places = self._find(epoch, draws)
        return self._starts[cells] + permute(places, self._sizes[cells], make_key(self._seed, cells, turns))

    def times_before(self, epoch: int, draws: np.ndarray, first_epoch: int) -> np.ndarray:
        """Returns how often the records of an epoch's draws, (B,), came before: int64 (B,). first_epoch:
        epochs before epoch 0, each with as many draws of a cell; a started turn counts as a whole one."""
        cells, turns, _ = self._find(epoch, draws)
        return turns + -(-first_epoch * self._draws[cells] // self._sizes[cells])

    def _find(self, epoch: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the cells of an epoch's draws, how often all of a cell's records came before, and the
        places in the cells' orders of that turn: (B,) each."""
        cells = np.searchsorted(self._first_draw, draws, side="right") - 1
        count = epoch * self._draws[cells] + draws - self._first_draw[cells]
        return cells, *np.divmod(count, self._sizes[cells])


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

    def times_before(self, step: int, first_epoch: int = 0) -> np.ndarray:
        """Returns int64 (B,), as of `loader.Sampler`."""
        return np.full(self.global_batch, first_epoch + step // self.num_steps)

    def origin(self, step: int) -> str:
        """Describes where a step's records come from."""
        return f"records from {self._first + step * self.global_batch}"


class ShuffledSampler:
    """Every record at most once an epoch, in a new order each epoch; the last N mod B are left out. With
    `Shares` each source as often as these say."""

    def __init__(self, num_records: int, global_batch: int, seed: int, shares: Shares | None = None):
        _check_batch(num_records, global_batch)
        self.global_batch = global_batch
        self.num_steps = num_records // global_batch
        self._num_records, self._seed = num_records, seed
        self._cells = shares and _Cells(np.diff(shares.stops, prepend=0)[None], shares, seed)

    def indices(self, step: int) -> np.ndarray:
        """Returns int64 (B,)."""
        epoch, places = self._draw(step)
        return self._cells.places(epoch, places) if self._cells else places

    def times_before(self, step: int, first_epoch: int = 0) -> np.ndarray:
        """Returns int64 (B,), as of `loader.Sampler`."""
        if not self._cells:
            return np.full(self.global_batch, first_epoch + step // self.num_steps)
        return self._cells.times_before(*self._draw(step), first_epoch)

    def _draw(self, step: int) -> tuple[int, np.ndarray]:
        """Returns the epoch, and which of its draws the step has, (B,)."""
        epoch, k = divmod(step, self.num_steps)
        places = np.arange(k * self.global_batch, (k + 1) * self.global_batch)
        return epoch, permute(places, self._num_records, make_key(self._seed, epoch))

    def origin(self, step: int) -> str:
        """Describes where a step's records come from."""
        return f"epoch {step // self.num_steps}, shuffled"


class ClusterSampler:
    """Every global batch comes from one cluster; every record is used at most once an epoch.

    Clusters form a tree: the parent of label l is l // labels_per_stage, the root is everything. What a
    cluster leaves over, having fewer records than a batch, backs off: it joins what its siblings leave over
    in the parent, up to the root. So an epoch has N // B steps, and no more than N mod B records (new ones
    each epoch) stay out. With small_clusters="drop", as in the released code, leftovers are not used. With
    `Shares` a cluster counts, and is drawn from, as often as these say of each source's records in it.
    """

    def __init__(
        self,
        clusters: ClusterIndex,
        global_batch: int,
        seed: int,
        *,
        labels_per_stage: int = 9,
        small_clusters: str = "backoff",
        shares: Shares | None = None,
    ):
        """clusters: of accumulated pseudo-labels. Raises ValueError if no cluster fills a batch."""
        _check_batch(len(clusters), global_batch)
        if small_clusters not in ("backoff", "drop"):
            raise ValueError(f"small_clusters={small_clusters!r}: choose 'backoff' or 'drop'")
        self.global_batch = global_batch
        self._clusters, self._seed = clusters, seed
        self._cells = shares and _Cells(clusters.sizes_by_range(shares.stops), shares, seed)
        sizes = self._cells.cluster_draws if self._cells else clusters.sizes
        self._levels = [_Level(clusters.labels, sizes, global_batch)]
        while small_clusters == "backoff" and self._levels[-1].nodes.any():  # the root is node 0 alone
            self._levels.append(self._levels[-1].parents(labels_per_stage, global_batch))
        self._first_batch = np.cumsum([0, *(level.num_batches for level in self._levels)])
        self.num_steps = int(self._first_batch[-1])
        if not self.num_steps:
            raise ValueError(
                f"no cluster has as many as {global_batch} pairs (the largest has {sizes.max()}): "
                "choose a smaller batch or small_clusters='backoff'"
            )

    def indices(self, step: int) -> np.ndarray:
        """Returns int64 (B,), all from one cluster."""
        epoch, places = self._draw(step)
        return self._clusters.records(self._cells.places(epoch, places) if self._cells else places)

    def times_before(self, step: int, first_epoch: int = 0) -> np.ndarray:
        """Returns int64 (B,), as of `loader.Sampler`."""
        if not self._cells:
            return np.full(self.global_batch, first_epoch + step // self.num_steps)
        return self._cells.times_before(*self._draw(step), first_epoch)

    def _draw(self, step: int) -> tuple[int, np.ndarray]:
        """Returns the epoch, and which of its draws the step has, (B,)."""
        epoch, level, node, batch = self._find(step)
        # A place in the node's order of this epoch -> a place in its pool -> the same one level down, where
        # each pool is what a child's own batches have left over, down to the clusters themselves.
        places = np.arange(batch * self.global_batch, (batch + 1) * self.global_batch)
        nodes = np.full(len(places), node)
        for depth in range(level, 0, -1):
            pool, below = self._pool_places(epoch, depth, nodes, places), self._levels[depth - 1]
            nodes = np.searchsorted(below.left_starts, pool, side="right") - 1
            places = below.used[nodes] + pool - below.left_starts[nodes]
        return epoch, self._pool_places(epoch, 0, nodes, places)

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
