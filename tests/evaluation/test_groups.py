"""Gaps between groups, by hand, and the tables that name them."""

import numpy as np
import pytest

from clipmoe_jax.evaluation.groups import group_metrics, read_groups


def test_gap_by_hand():
    right = np.array([True, True, False, True, False, False])
    assert group_metrics(right, ["b", "b", "b", "a", "a", "c"]) == pytest.approx(
        {"worst_group": 0, "gap": 2 / 3, "group a": 1 / 2, "group b": 2 / 3, "group c": 0}
    )


def test_groups_are_looked_up_by_id(tmp_path):
    (file := tmp_path / "m.csv").write_text(
        '\ufefffile,age,"skin, tone"\nb/1.png,30,dark\na.png,20,"light"\n\nx,1,y\n'
    )
    assert read_groups(f"{file}#skin, tone", ["a.png", "b/1.png"]) == ["light", "dark"]
    assert read_groups(f"{file}#age", ["a.png"]) == ["20"]
    for named, ids, message in (
        (f"{file}#file", [], "has no column 'file' after the first, of ids"),
        (f"{file}#race", [], "has no column 'race'"),
        (f"{file}", [], "names no column: write FILE.csv#COLUMN"),
        (f"{file}#age", ["a.png", "c", "d"], "lacks 2 of 3 images, the first 'c'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_groups(named, ids)
    with pytest.raises(FileNotFoundError, match="no.csv does not exist"):
        read_groups(f"{tmp_path}/no.csv#age", [])
    file.write_text("id,n\n" + "".join(f"{i},{i}\n" for i in range(101)))
    with pytest.raises(ValueError, match="'n' has 101 groups, of which 100 may be"):
        read_groups(f"{file}#n", list(map(str, range(101))))
    file.write_bytes(b"id,n\n" + b"a,1\n" * 2**24)
    with pytest.raises(ValueError, match=f"{file} has .* bytes"):
        read_groups(f"{file}#n", [])
    file.write_text("id,n\na\n")
    with pytest.raises(ValueError, match="m.csv is no table of commas in UTF-8"):
        read_groups(f"{file}#n", [])
