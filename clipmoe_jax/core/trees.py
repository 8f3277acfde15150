"""Param trees by name: flatten, name rules, partition into trainable and frozen, merge.

A leaf's name is its path joined by "/": `visual/resblocks_7/moe/c_fc/kernel`. A rule is a pair
`(regex, value)`; the first rule whose regex matches the whole name gives the leaf its value. Every leaf must
be covered, and every rule must be the first match of some leaf.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

Params = Mapping[str, Any]
Rules = Sequence[tuple[str, Any]]


def flatten(tree: Params) -> dict[str, Any]:
    """Converts nested dicts to {name: leaf}, sorted by name."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def first_match(rules: Rules, name: str) -> int | None:
    """Returns the index of the first rule that matches the whole name; None if no rule does."""
    return next((i for i, (pattern, _) in enumerate(rules) if re.fullmatch(pattern, name)), None)


def match_rules(rules: Rules, names: Sequence[str]) -> dict[str, Any]:
    """Returns {name: value}, by the first rule that matches the whole name.

    Raises KeyError naming the leaves that no rule covers, or the rules that no leaf uses.
    """
    values, used = {}, [[] for _ in rules]
    for name in names:
        if (i := first_match(rules, name)) is not None:
            values[name] = rules[i][1]
            used[i].append(name)
    patterns = [pattern for pattern, _ in rules]
    if missing := [name for name in names if name not in values]:
        raise KeyError(f"no rule covers {_some(missing)}; the rules are {patterns}")
    if unused := [patterns[i] for i, matched in enumerate(used) if not matched]:
        raise KeyError(
            f"unused rules {unused}: no parameter has them as first match; names are {_some(names)}"
        )
    return values


def partition(params: Params, trainable_rules: Rules) -> tuple[dict, dict]:
    """Splits params into (trainable, frozen) by rules whose values are True or False.

    A leaf is in exactly one of the two trees, so frozen leaves get neither gradients nor optimizer moments.
    """
    leaves = flatten(params)
    trains = match_rules(trainable_rules, list(leaves))
    return (
        unflatten({name: leaf for name, leaf in leaves.items() if trains[name]}),
        unflatten({name: leaf for name, leaf in leaves.items() if not trains[name]}),
    )


def describe(trainable_rules: Rules, params: Params) -> str:
    """Returns a line: numbers of trainable leaves and parameters, and their names."""
    trainable, frozen = partition(params, trainable_rules)
    kinds = {re.sub(r"\d+", "*", name): None for name in flatten(trainable)}
    return (
        f"{len(flatten(trainable))} leaves, {count_parameters(trainable):,} parameters "
        f"({_some(list(kinds))}); {count_parameters(frozen):,} are frozen"
    )


def merge(trainable: Params, frozen: Params) -> dict:
    """Inverts `partition`."""
    return unflatten({**flatten(trainable), **flatten(frozen)})


def count_parameters(params: Params) -> int:
    """Returns the number of scalars in a tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def cast_matrices(params: Params, dtype: str) -> dict:
    """Casts leaves of two or more axes. Scalars, norms, biases and routers are small and keep their dtype."""
    return unflatten(
        {
            name: leaf.astype(dtype) if leaf.ndim >= 2 and not _is_router(name) else leaf
            for name, leaf in flatten(params).items()
        }
    )


def transpose_kernels(params: Params) -> dict:
    """Returns the tree with the axes of its matrices called kernel swapped, (D, F) to (F, D) and back."""
    return unflatten({name: transpose_kernel(name, leaf) for name, leaf in flatten(params).items()})


def transpose_kernel(name: str, leaf: Any) -> Any:
    """Returns a leaf as `transpose_kernels` has it."""
    return leaf.T if name.endswith("/kernel") and leaf.ndim == 2 else leaf


def cast_kernel(name: str, leaf: Any, dtype: str) -> Any:
    """Returns a leaf in `dtype` if it is a kernel, which products take in the dtype of the computation; not a
    router's, which is float32."""
    return leaf.astype(dtype) if name.endswith("/kernel") and not _is_router(name) else leaf


def _is_router(name: str) -> bool:
    return name.endswith("router/kernel")


def blend(base: Params, params: Params, share: float) -> dict:
    """Returns (1 - share) · base + share · params, leaf by leaf (WiSE-FT, arXiv 2109.01903)."""
    return jax.tree.map(lambda old, new: (1 - share) * old + share * new, base, params)


def _some(names: Sequence[str]) -> str:
    most = 4
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
