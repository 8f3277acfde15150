"""Which records each step of training uses: pure functions of (seed, step), the same on every host.

Letters: N records, B records of a global batch, S steps of an epoch. Steps count on over epochs:
epoch = step // S.
"""

import collections
import functools

import numpy as np


class SequentialSampler:
    """Records `first` to `num_records` once, in order; the last batch is padded with -1. For evaluation and
    embedding."""

    def __init__(self, num_records: int, global_batch: int, first: int = 0):
        _check_not_empty(num_records - first)
        self.global_batch = global_batch
        self.num_steps = -(-(num_records - first) // global_batch)
        self._num_records, self._first = num_records, first

    def indices(self, step: int) -> np.ndarray:
        """int64 (B,), -1 for padding."""
        indices = self._first + np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        return np.where(indices < self._num_records, indices, -1)

    def origin(self, step: int) -> str:
        """Where a step's records come from, in words."""
        return f"records from {self._first + step * self.global_batch}"


class ShuffledSampler:
    """Every record at most once an epoch, in a new order each epoch; the last N mod B are left out."""

    def __init__(self, num_records: int, global_batch: int, seed: int):
        _check_batch(num_records, global_batch)
        self.global_batch = global_batch
        self.num_steps = num_records // global_batch
        self._num_records, self._seed = num_records, seed

    def indices(self, step: int) -> np.ndarray:
        """int64 (B,)."""
        epoch, k = divmod(step, self.num_steps)
        order = _permutation(self._num_records, self._seed, epoch)
        return order[k * self.global_batch : (k + 1) * self.global_batch]

    def origin(self, step: int) -> str:
        """Where a step's records come from, in words."""
        return f"epoch {step // self.num_steps}, shuffled"


class ClusterSampler:
    """Every global batch comes from one cluster; every record is used at most once an epoch.

    Clusters form a tree: the parent of label l is l // labels_per_stage, the root is everything. What a
    cluster leaves over, having fewer records than a batch, backs off: it joins what its siblings leave over
    in the parent, up to the root. So an epoch has N // B steps, and no more than N mod B records (new ones
    each epoch) stay out. With small_clusters="drop", as in the released code, leftovers are not used.

    labels (N,) int, this stage's accumulated pseudo-labels.
    """

    def __init__(
        self,
        labels: np.ndarray,
        global_batch: int,
        seed: int,
        *,
        labels_per_stage: int = 9,
        small_clusters: str = "backoff",
    ):
        _check_batch(len(labels), global_batch)
        if small_clusters not in ("backoff", "drop"):
            raise ValueError(f"small_clusters={small_clusters!r}: choose 'backoff' or 'drop'")
        self.global_batch = global_batch
        self._labels, self._seed = np.asarray(labels), seed
        self._labels_per_stage, self._small_clusters = labels_per_stage, small_clusters
        _, self._levels = self._plan(0)
        self.num_steps = len(self._levels)
        if not self.num_steps:
            raise ValueError(
                f"no cluster has as many as {global_batch} pairs (the largest has "
                f"{np.bincount(self._labels).max()}): choose a smaller batch or small_clusters='backoff'"
            )

    def indices(self, step: int) -> np.ndarray:
        """int64 (B,), all from one cluster."""
        epoch, k = divmod(step, self.num_steps)
        return self._plan(epoch)[0][k]

    def origin(self, step: int) -> str:
        """Where a step's records come from, in words."""
        epoch, k = divmod(step, self.num_steps)
        batches, levels = self._plan(epoch)
        node = self._labels[batches[k][0]] // self._labels_per_stage ** levels[k]
        if not levels[k]:
            return f"epoch {epoch}, cluster {node}"
        return f"epoch {epoch}, what is left of the clusters under {node}, {levels[k]} level(s) up"

    def report(self) -> dict[str, int]:
        """How an epoch uses the records: pairs by level (0 is the clusters themselves, 1 their parents,
        …)."""
        counts = collections.Counter(self._levels.tolist())
        report = {f"pairs_level_{level}": n * self.global_batch for level, n in sorted(counts.items())}
        report["pairs_unused"] = len(self._labels) - self.num_steps * self.global_batch
        report["num_clusters"] = len(np.unique(self._labels))
        return report

    @functools.lru_cache(maxsize=2)  # noqa: B019 (samplers live as long as the program)
    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's batches (S, B) int64 and the level of each, (S,) int."""
        rng = np.random.default_rng((self._seed, epoch))
        records = rng.permutation(len(self._labels))
        nodes, level = self._labels[records], 0
        batches, levels = [], []
        while True:
            # Records of one node side by side, in random order within it.
            order = np.argsort(nodes, kind="stable")
            records, nodes = records[order], nodes[order]
            _, starts, sizes = np.unique(nodes, return_index=True, return_counts=True)
            rank = np.arange(len(nodes)) - np.repeat(starts, sizes)
            used = rank < np.repeat(sizes // self.global_batch * self.global_batch, sizes)
            batches.append(records[used].reshape(-1, self.global_batch))
            levels.append(np.full(len(batches[-1]), level))
            if self._small_clusters == "drop" or not nodes.any():  # the root has the label 0 alone
                break
            records, nodes = records[~used], nodes[~used] // self._labels_per_stage
            level += 1
            if not len(nodes):
                break
        batches, levels = np.concatenate(batches), np.concatenate(levels)
        order = rng.permutation(len(batches))
        return batches[order], levels[order]


@functools.lru_cache(maxsize=4)
def _permutation(num_records: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_records)


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
