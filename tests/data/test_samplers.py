"""Samplers: which records every step uses, the same on every host and after every restart."""

import collections
import pickle

import numpy as np
import pytest
from grids import quick

from clipmoe_jax.data import samplers
from clipmoe_jax.data.clusters import ClusterIndex
from clipmoe_jax.data.samplers import SequentialSampler, Shares, ShuffledSampler

LABELS_PER_STAGE = 9


def ClusterSampler(labels, global_batch, seed, **options):
    return samplers.ClusterSampler(ClusterIndex.sort(labels), global_batch, seed, **options)


def epoch_of(sampler, epoch=0):
    """All batches of one epoch, (S, B)."""
    first = epoch * sampler.num_steps
    return np.stack([sampler.indices(first + k) for k in range(sampler.num_steps)])


def test_sequential_pads_the_last_batch():
    sampler = SequentialSampler(7, 3)
    assert sampler.num_steps == 3
    np.testing.assert_array_equal(epoch_of(sampler), [[0, 1, 2], [3, 4, 5], [6, -1, -1]])


def test_sequential_without_remainder_pads_nothing():
    np.testing.assert_array_equal(epoch_of(SequentialSampler(4, 2)), [[0, 1], [2, 3]])


def test_sequential_takes_fewer_records_than_a_batch():
    np.testing.assert_array_equal(epoch_of(SequentialSampler(2, 4)), [[0, 1, -1, -1]])


def test_shuffled_uses_each_record_at_most_once_an_epoch():
    sampler = ShuffledSampler(23, 4, seed=0)
    assert sampler.num_steps == 5
    for epoch in range(3):
        used = epoch_of(sampler, epoch).ravel()
        assert len(set(used.tolist())) == 20
        assert set(used.tolist()) <= set(range(23))


def test_shuffled_leaves_different_records_out_in_different_epochs():
    sampler = ShuffledSampler(23, 4, seed=0)
    left_out = [set(range(23)) - set(epoch_of(sampler, epoch).ravel().tolist()) for epoch in range(4)]
    assert len({frozenset(records) for records in left_out}) == 4


def cluster_labels(num_records, num_clusters, seed):
    """Labels with clusters of very different sizes."""
    rng = np.random.default_rng(seed)
    return rng.choice(num_clusters, num_records, p=rng.dirichlet(np.full(num_clusters, 0.3)))


SAMPLERS = {
    "shuffled": lambda seed: ShuffledSampler(200, 16, seed),
    "cluster": lambda seed: ClusterSampler(cluster_labels(200, 81, 0), 16, seed),
    "cluster, drop": lambda seed: ClusterSampler(cluster_labels(200, 9, 0), 16, seed, small_clusters="drop"),
    "shuffled, shares": lambda seed: ShuffledSampler(200, 16, seed, Shares([150, 50], [3.5, 1])),
    "cluster, shares": lambda seed: ClusterSampler(
        cluster_labels(200, 81, 0), 16, seed, shares=Shares([150, 50], [3, 1])
    ),
}


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_the_order_changes_with_epoch_and_seed(make):
    first = epoch_of(make(0))
    assert not np.array_equal(epoch_of(make(0), 1), first)
    assert not np.array_equal(epoch_of(make(1)), first)


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_indices_are_a_function_of_the_step_alone(make):
    """Whatever was asked before: forwards, backwards, from the middle, over epoch boundaries."""
    steps = range(3 * make(0).num_steps + 2)
    forwards, backwards = make(0), make(0)
    expected = [forwards.indices(step) for step in steps]
    for step in reversed(steps):
        np.testing.assert_array_equal(backwards.indices(step), expected[step])
        np.testing.assert_array_equal(make(0).indices(step), expected[step])


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_two_hosts_join_to_the_global_batch(make):
    """Each host builds its own sampler and takes its half, whatever it was asked before."""
    alone, hosts = make(0), [make(0), make(0)]
    hosts[1].indices(2 * alone.num_steps)
    for step in range(alone.num_steps):
        halves = [np.split(host.indices(step), 2)[i] for i, host in enumerate(hosts)]
        np.testing.assert_array_equal(np.concatenate(halves), alone.indices(step))
        assert not set(halves[0].tolist()) & set(halves[1].tolist())


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_samplers_pickle(make):
    sampler = make(0)
    epoch_of(sampler)
    np.testing.assert_array_equal(epoch_of(pickle.loads(pickle.dumps(sampler)), 1), epoch_of(sampler, 1))


def with_shares(kind, seed=0):
    """100 batches of 16 an epoch, of three sources."""
    shares = Shares([1000, 500, 100], [1, 2, 1])
    if kind == "shuffled":
        return ShuffledSampler(1600, 16, seed, shares)
    return ClusterSampler(cluster_labels(1600, 20, 0), 16, seed, shares=shares)


@pytest.mark.parametrize("kind", ["shuffled", "cluster"])
def test_an_epoch_draws_from_sources_in_their_shares(kind):
    """Exactly, and each record of a source as often as the others, but for one time."""
    sampler, stops = with_shares(kind), [1000, 1500, 1600]
    assert sampler.num_steps == 100
    times = np.zeros(1600, int)
    for epoch in range(5):
        drawn = epoch_of(sampler, epoch).ravel()
        assert np.bincount(np.searchsorted(stops, drawn, side="right")).tolist() == [400, 800, 400]
        times += np.bincount(drawn, minlength=1600)
    if kind == "cluster":
        labels = cluster_labels(1600, 20, 0)
        cells = [np.flatnonzero(labels == label) for label in range(20)]
    else:
        cells = [np.arange(1600)]
    for cell in cells:
        for source in np.split(cell, np.searchsorted(cell, stops[:-1])):
            assert not len(source) or np.ptp(times[source]) <= 1
    assert times[:1000].sum() == 2000 and times[1500:].min() >= 19


@pytest.mark.parametrize("kind", ["shuffled", "cluster"])
def test_records_of_shares_count_how_often_they_came(kind):
    """From 0 up over epochs, and in a later phase from no less than the times that they came before it."""
    sampler, before = with_shares(kind), [[] for _ in range(1600)]
    for step in range(3 * sampler.num_steps):
        for i, times in zip(sampler.indices(step), sampler.times_before(step), strict=True):
            before[i].append(int(times))
    assert all(sorted(times) == list(range(len(times))) for times in before)
    for step in range(sampler.num_steps):
        came = np.array([len(before[i]) for i in sampler.indices(step)])
        first = sampler.times_before(step, first_epoch=3) - sampler.times_before(step)
        assert ((first == came) | (first == came + 1)).all()


@pytest.mark.parametrize("kind", ["shuffled", "cluster", "cluster, drop"])
def test_without_shares_a_record_comes_once_an_epoch(kind):
    sampler = SAMPLERS[kind](0)
    for epoch in range(2):
        for step in range(epoch * sampler.num_steps, (epoch + 1) * sampler.num_steps):
            assert sampler.times_before(step, first_epoch=4).tolist() == [4 + epoch] * 16


def test_batches_of_shares_are_of_one_cluster():
    sampler, labels = with_shares("cluster"), cluster_labels(1600, 20, 0)
    for step in range(sampler.num_steps):
        if " cluster " in sampler.origin(step):
            assert len(set(labels[sampler.indices(step)])) == 1


def test_shares_like_the_sizes_of_sources_draw_every_pair_once():
    sampler = ShuffledSampler(48, 4, 0, Shares([16, 32], [0.5, 1]))
    assert sorted(epoch_of(sampler).ravel()) == list(range(48))


# Batches of 4. Clusters 0 and 1 are children of 0; 9 and 10 of 1; 20 of 2.
#   level 0: cluster 0 fills one batch and leaves 2; 1 leaves 3, 9 leaves 2, 10 and 20 leave 1 each.
#   level 1: parent 0 has 2 + 3 = 5, one batch, 1 left; parent 1 has 2 + 1 = 3, parent 2 has 1.
#   level 2: the root has 1 + 3 + 1 = 5, one batch, 1 left.
BY_HAND = np.repeat([0, 1, 9, 10, 20], [6, 3, 2, 1, 1])


def test_report_by_hand():
    assert ClusterSampler(BY_HAND, 4, seed=0).report() == {
        "pairs_level_0": 4,
        "pairs_level_1": 4,
        "pairs_level_2": 4,
        "pairs_unused": 1,
        "num_clusters": 5,
    }


def test_report_of_drop_by_hand():
    sampler = ClusterSampler(BY_HAND, 4, seed=0, small_clusters="drop")
    assert sampler.report() == {"pairs_level_0": 4, "pairs_unused": 9, "num_clusters": 5}


def test_origin_by_hand():
    """Cluster 0 fills a batch; what is left of 0 and 1 fills one a level up; the rest one at the root."""
    sampler = ClusterSampler(BY_HAND, 4, seed=0)
    found = {sampler.origin(step) for step in range(sampler.num_steps)}
    assert "epoch 0, cluster 0" in found
    assert "epoch 0, what is left of the clusters under 0, 1 level(s) up" in found
    assert sampler.origin(sampler.num_steps).startswith("epoch 1, ")
    assert ShuffledSampler(20, 4, 0).origin(6) == "epoch 1, shuffled"
    assert SequentialSampler(20, 4, 8).origin(2) == "records from 16"


def test_batches_by_hand():
    """One batch inside cluster 0, one of clusters 0 and 1 (records 0 to 8), one of what is left."""
    records = {frozenset(batch.tolist()) for batch in epoch_of(ClusterSampler(BY_HAND, 4, seed=0))}
    assert len(records) == 3
    (inside,) = [batch for batch in records if batch <= set(range(6))]
    (parent,) = [batch for batch in records - {inside} if batch <= set(range(9))]
    assert len(parent & set(range(6, 9))) >= 2  # cluster 0 has only 2 left
    (root,) = records - {inside, parent}
    assert root - set(range(9)) <= set(range(9, 13))


CASES = {
    f"{clusters} clusters, {records} records, batches of {batch}": (clusters, records, batch)
    for clusters, records, batch in [
        (1, 50, 8),
        (9, 500, 16),
        (9, 100, 100),
        (81, 1000, 7),
        (729, 3000, 8),
        (729, 3000, 64),
        (729, 700, 32),
    ]
}
label_sets = pytest.mark.parametrize(
    ("num_clusters", "num_records", "global_batch"),
    quick(
        CASES,
        "1 clusters, 50 records, batches of 8",
        "9 clusters, 100 records, batches of 100",
        "81 clusters, 1000 records, batches of 7",
    ),
)


def pairs_by_level(labels, global_batch):
    """{level: pairs in its batches}, counted by hand from the root's depth down, without any order."""
    sizes, used, level = collections.Counter(labels.tolist()), {}, 0
    while True:
        used[level] = sum(size // global_batch * global_batch for size in sizes.values())
        if set(sizes) == {0}:
            return {level: count for level, count in used.items() if count}
        parents = collections.Counter()
        for label, size in sizes.items():
            parents[label // LABELS_PER_STAGE] += size % global_batch
        sizes, level = parents, level + 1


def level_of(batch_labels):
    """How far up the batch's first common ancestor is."""
    level = 0
    while len(set((batch_labels // LABELS_PER_STAGE**level).tolist())) > 1:
        level += 1
    return level


@label_sets
def test_each_record_is_used_at_most_once_and_only_a_remainder_is_lost(
    num_clusters, num_records, global_batch
):
    for seed in range(3):
        labels = cluster_labels(num_records, num_clusters, seed)
        sampler = ClusterSampler(labels, global_batch, seed)
        assert sampler.num_steps == num_records // global_batch
        for epoch in range(2):
            used = np.bincount(epoch_of(sampler, epoch).ravel(), minlength=num_records)
            assert used.max() == 1
            assert np.sum(used == 0) == num_records % global_batch


@label_sets
def test_every_batch_comes_from_one_cluster_or_the_nearest_ancestor_that_fills_it(
    num_clusters, num_records, global_batch
):
    """A cluster leaves over less than a batch, so what is made at level l is of one label at l, not below."""
    for seed in range(3):
        labels = cluster_labels(num_records, num_clusters, seed)
        sampler = ClusterSampler(labels, global_batch, seed)
        expected = pairs_by_level(labels, global_batch)
        for epoch in range(2):
            levels = collections.Counter(level_of(labels[batch]) for batch in epoch_of(sampler, epoch))
            assert {level: n * global_batch for level, n in levels.items()} == expected
        report = {k: v for k, v in sampler.report().items() if k.startswith("pairs_level")}
        assert report == {f"pairs_level_{level}": count for level, count in expected.items()}


@label_sets
def test_drop_uses_full_batches_of_whole_clusters_alone(num_clusters, num_records, global_batch):
    labels = cluster_labels(num_records, num_clusters, seed=0)
    sizes = np.bincount(labels)
    kept = sum(size // global_batch for size in sizes.tolist())
    if not kept:
        with pytest.raises(ValueError, match=f"the largest has {sizes.max()}"):
            ClusterSampler(labels, global_batch, 0, small_clusters="drop")
        return
    sampler = ClusterSampler(labels, global_batch, 0, small_clusters="drop")
    batches = epoch_of(sampler)
    assert len(batches) == kept
    assert all(len(set(labels[batch].tolist())) == 1 for batch in batches)
    assert len(set(batches.ravel().tolist())) == kept * global_batch
    assert sampler.report()["pairs_unused"] == num_records - kept * global_batch


def test_members_of_a_cluster_meet_in_other_batches_each_epoch():
    sampler = ClusterSampler(np.zeros(64, int), 8, seed=0)
    groups = [{frozenset(batch.tolist()) for batch in epoch_of(sampler, e)} for e in range(2)]
    assert not groups[0] & groups[1]


def test_clusters_take_turns():
    """Batches are shuffled: an epoch does not go through one cluster after the other."""
    labels = np.repeat(np.arange(4), 80)
    order = [labels[batch[0]] for batch in epoch_of(ClusterSampler(labels, 8, seed=0))]
    changes = np.count_nonzero(np.diff(order))
    assert changes > 10  # 40 batches: 3 changes if sorted, 29 expected of a shuffle


ERRORS = {
    "shuffled, small": (lambda: ShuffledSampler(3, 4, 0), "3 pairs, fewer than a batch of 4"),
    "cluster, small": (lambda: ClusterSampler(np.zeros(3, int), 4, 0), "3 pairs, fewer than a batch of 4"),
    "sequential, empty": (lambda: SequentialSampler(0, 4), "the data set is empty"),
    "shuffled, empty": (lambda: ShuffledSampler(0, 4, 0), "the data set is empty"),
    "nothing to keep": (
        lambda: ClusterSampler(np.array([0, 0, 0, 1, 1]), 4, 0, small_clusters="drop"),
        r"no cluster has as many as 4 pairs \(the largest has 3\): .*small_clusters='backoff'",
    ),
    "unknown choice": (
        lambda: ClusterSampler(np.zeros(8, int), 4, 0, small_clusters="merge"),
        "small_clusters='merge': choose 'backoff' or 'drop'",
    ),
}


@pytest.mark.parametrize(("make", "message"), ERRORS.values(), ids=ERRORS)
def test_too_few_records_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
