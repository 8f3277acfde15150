"""Name rules, and the split of params into what trains and what does not."""

import jax
import numpy as np
import pytest

from clipmoe_jax.core import trees

PARAMS = {
    "logit_scale": np.float32(1),
    "visual": {
        "ln_pre": {"scale": np.full(3, 2.0)},
        "resblocks_0": {"mlp": {"c_fc": {"kernel": np.full((3, 12), 3.0)}}},
    },
    "text": {"resblocks_0": {"mlp": {"c_fc": {"kernel": np.full((2, 8), 4.0)}}}},
}
KERNEL = "resblocks_0/mlp/c_fc/kernel"
NAMES = ["logit_scale", f"text/{KERNEL}", "visual/ln_pre/scale", f"visual/{KERNEL}"]
MLPS_ONLY = [(".*/mlp/.*", True), (".*", False)]


def test_names_are_paths_in_sorted_order():
    assert list(trees.flatten(PARAMS)) == NAMES


def test_first_rule_that_matches_wins():
    rules = [("visual/.*kernel", "a"), (".*kernel", "b"), (".*", "c")]
    assert trees.match_rules(rules, NAMES) == dict(zip(NAMES, ["c", "b", "c", "a"], strict=True))


def test_rule_matches_whole_names():
    with pytest.raises(KeyError, match="no rule covers logit_scale"):
        trees.match_rules([("logit", 1), ("(text|visual)/.*", 2)], NAMES)


def test_leaves_that_no_rule_covers_are_named():
    with pytest.raises(KeyError, match=r"no rule covers logit_scale, visual/ln_pre/scale; .*mlp"):
        trees.match_rules([(".*/mlp/.*", True)], NAMES)


@pytest.mark.parametrize(
    "rules",
    [
        [("router/.*", 1), (".*", 2)],
        [(".*", 2), ("router/.*", 1)],
        [(".*", 2), ("router/.*", 1), ("visual.*", 3)],
    ],
    ids=["nothing has the name", "nothing is left for it", "two"],
)
def test_rule_that_no_leaf_uses_is_named(rules):
    unused = [pattern for pattern, _ in rules if pattern != ".*"]
    with pytest.raises(KeyError) as error:
        trees.match_rules(rules, NAMES)
    assert f"unused rules {unused}" in str(error.value)


def test_long_list_of_uncovered_leaves_is_cut():
    with pytest.raises(KeyError, match="no rule covers 0, 1, 2, 3 and 6 more;"):
        trees.match_rules([("x", 1)], [str(i) for i in range(10)])


def test_frozen_leaves_are_absent_from_the_trainable_tree():
    trainable, frozen = trees.partition(PARAMS, MLPS_ONLY)
    assert list(trees.flatten(trainable)) == [f"text/{KERNEL}", f"visual/{KERNEL}"]
    assert list(trees.flatten(frozen)) == ["logit_scale", "visual/ln_pre/scale"]
    assert "ln_pre" not in trainable["visual"]
    assert "text" not in frozen


def test_merge_is_the_inverse_of_partition():
    merged = trees.merge(*trees.partition(PARAMS, MLPS_ONLY))
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(PARAMS), strict=True))


@pytest.mark.parametrize("trains", [True, False])
def test_partition_may_be_empty_on_either_side(trains):
    parts = trees.partition(PARAMS, [(".*", trains)])
    assert [trees.count_parameters(part) for part in parts] == ([56, 0] if trains else [0, 56])
    assert trees.flatten(trees.merge(*parts)).keys() == trees.flatten(PARAMS).keys()


def test_count_parameters_counts_scalars():
    # A scalar, a norm of 3, kernels of 3 * 12 = 36 and 2 * 8 = 16.
    assert trees.count_parameters(PARAMS) == 1 + 3 + 36 + 16
    shapes = jax.eval_shape(lambda: jax.tree.map(np.asarray, PARAMS))
    assert trees.count_parameters(shapes) == 56


def test_description_counts_and_gives_one_example_of_a_kind():
    kernel = {"mlp": {"kernel": np.zeros((2, 3))}}
    params = {"resblocks_0": kernel, "resblocks_11": kernel, "scale": np.zeros(5)}
    assert trees.describe(MLPS_ONLY, params) == (
        "2 leaves, 12 parameters (resblocks_*/mlp/kernel); 5 are frozen"
    )


def test_cast_keeps_the_dtype_of_vectors_and_scalars():
    tree = {"kernel": np.array([[1.5]], np.float32), "scale": np.ones(3, np.float32)}
    cast = trees.cast_matrices(tree, "float16")
    assert {name: leaf.dtype for name, leaf in cast.items()} == {"kernel": np.float16, "scale": np.float32}
