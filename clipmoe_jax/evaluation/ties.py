"""Equal scores of equal features.

A product of matrices adds up the last columns of a block in another order than the others, so that equal rows
of a factor get scores that differ in their last bit. Which of them is first would then depend on the machine.
"""

import numpy as np


def first_equal_rows(features: np.ndarray) -> np.ndarray | None:
    """Returns the first row that is equal to each, features (N, d) -> (N,) int; None where all rows differ.

    The scores of those rows, `scores[:, first]`, are the same for equal rows.
    """
    first: dict[bytes, int] = {}
    rows = [first.setdefault(row.tobytes(), i) for i, row in enumerate(np.ascontiguousarray(features))]
    return None if len(first) == len(rows) else np.array(rows)


def inner_products(queries: np.ndarray, answers: np.ndarray, first: np.ndarray | None) -> np.ndarray:
    """Returns scores (Q, A) of queries (Q, d) and answers (A, d), the same for equal answers.

    first: `first_equal_rows` of the answers.
    """
    scores = queries @ answers.T
    return scores if first is None else scores[:, first]
