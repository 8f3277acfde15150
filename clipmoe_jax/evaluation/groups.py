"""Gaps between groups of images: a metric by a column of metadata.

Letters: N images, G groups.
"""

import csv
import io
import os
from collections.abc import Sequence

import numpy as np

from clipmoe_jax.core.checks import read_bytes
from clipmoe_jax.evaluation.scores import GROUP

MOST_GROUPS = 100


def read_groups(table: str, ids: Sequence[str]) -> list[str]:
    """Returns the group of each image by its id.

    table: "FILE.csv#COLUMN", a table with a header whose first column has the ids of the data set's records.
    Raises FileNotFoundError, and ValueError for another table, a column or an image that it lacks, and more
    than 100 groups.
    """
    file, _, column = table.rpartition("#")
    if not file:
        raise ValueError(f"groups={table} names no column: write FILE.csv#COLUMN")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"groups={file} does not exist")
    content = read_bytes(file)
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"))) if row] or [[]]
        if column not in header[1:]:
            raise ValueError(f"groups={file} has no column {column!r} after the first, of ids")
        place = header.index(column, 1)
        group_of = {row[0]: row[place] for row in rows}
    except (UnicodeDecodeError, csv.Error, IndexError) as error:
        raise ValueError(f"groups={file} is no table of commas in UTF-8: {error}") from error
    if missing := [one for one in ids if one not in group_of]:
        raise ValueError(
            f"groups={file} lacks {len(missing):,} of {len(ids):,} images, the first {missing[0]!r}"
        )
    groups = [group_of[one] for one in ids]
    if (count := len(set(groups))) > MOST_GROUPS:
        raise ValueError(f"groups={file}: {column!r} has {count:,} groups, of which {MOST_GROUPS} may be")
    return groups


def group_metrics(right: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """Returns `worst_group`, the least share of right images of a group, `gap`, how much more the best group
    has, and the share of each group under its name, `group NAME`. right (N,) bool, groups (N,).
    """
    of_image = np.asarray(groups)
    shares = {f"{GROUP}{name}": float(right[of_image == name].mean()) for name in sorted(set(groups))}
    worst, best = min(shares.values()), max(shares.values())
    return {"worst_group": worst, "gap": best - worst} | shares
