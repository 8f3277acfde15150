"""Retrieval with several right answers: precision among the first and mean average precision.

Letters: Q queries, A answers, d embedding.
"""

import numpy as np

from clipmoe_jax.evaluation.ties import first_equal_rows, inner_products

RANKS = (1, 5, 10)
CHUNK = 2**24  # scores at a time


def precision_metrics(
    queries: np.ndarray,
    answers: np.ndarray,
    group_of_query: np.ndarray,
    group_of_answer: np.ndarray,
) -> dict[str, float]:
    """Returns `p1`, `p5`, …, the share of right answers among the first k, and `map`, the mean over queries
    of the average precision: the mean over a query's right answers of the precision down to each.

    queries (Q, d), answers (A, d) float32, compared by inner product; an answer is right for the queries of
    its group, (Q,) and (A,) int. Of equal scores wrong answers stand first. Queries without a right answer
    do not count. Raises ValueError for features that are not finite, and if no query has a right answer.
    """
    if not (np.isfinite(queries).all() and np.isfinite(answers).all()):
        raise ValueError("precision: some features are not finite")
    counted = np.flatnonzero(np.isin(group_of_query, group_of_answer))
    if not len(counted):
        raise ValueError("precision: no query has a right answer")
    first = first_equal_rows(answers)
    size, found = max(1, CHUNK // len(answers)), {f"p{k}": 0.0 for k in RANKS} | {"map": 0.0}
    for start in range(0, len(counted), size):
        chunk = counted[start : start + size]
        right = group_of_query[chunk][:, None] == group_of_answer
        order = np.lexsort((right, -inner_products(queries[chunk], answers, first)))
        right = np.take_along_axis(right, order, axis=1)
        precision = np.cumsum(right, axis=1) / np.arange(1, len(answers) + 1)
        for k in RANKS:
            found[f"p{k}"] += right[:, :k].sum() / k
        found["map"] += np.sum((precision * right).sum(axis=1) / right.sum(axis=1))
    return {name: float(total / len(counted)) for name, total in found.items()}
