"""An ablation in one command and one table, on the demo's data: CLIP-MoE's recall, a row for each variant.

    python -m clipmoe_jax.main --config=configs/sweep.py:what=experts --workdir=runs/experts
    python -m clipmoe_jax.main --config=configs/sweep.py:what=selected,seeds=3 --workdir=runs/selected
    python -m clipmoe_jax.main --config=configs/sweep.py:what=clusters --workdir=runs/clusters
    python -m clipmoe_jax.main --config=configs/sweep.py:what=init_from --workdir=runs/init_from
    python -m clipmoe_jax.main --config=configs/sweep.py:what=baselines --workdir=runs/baselines

    what        what varies
    experts     E = 2, 3, 4: the base and 1 to 3 stages
    selected    K = 1 to 4 of 4 experts for each token
    clusters    k-means into 2, 3 or 5 clusters for each modality
    init_from   whether a stage starts from the base or from the stage before
    baselines   nothing: one run, in WORKDIR itself, with every baseline of published recipes beside CLIP-MoE

`seeds=3` runs seeds 1 to 3; `small` shrinks everything to a check of the machinery, whose numbers mean
nothing. Each variant is a run in WORKDIR/VARIANT (or WORKDIR/VARIANT/seed_N), with its own table; what it has
in common with another, the base for one, is copied from there. The table of variants is also in
WORKDIR/variants.txt.

A sweep of your own: `set_variants(config, {name: {dotted field: value}})` in any config file.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from clipmoe_jax.config import parse_arg, set_variants
from clipmoe_jax.dmu.recipes import OF_PAPERS

ABLATIONS = {
    "experts": {f"experts_{e}": {"mcl.num_stages": e - 1} for e in (2, 3, 4)},
    "selected": {f"selected_{k}": {"moe.num_selected_experts": k} for k in (1, 2, 3, 4)},
    "clusters": {f"clusters_{k}": {"cluster.num_clusters": k} for k in (2, 3, 5)},
    "init_from": {f"init_from_{first}": {"mcl.init_from": first} for first in ("base", "previous")},
    "baselines": {},
}


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: what, a key of ABLATIONS; seeds=N runs seeds 1 to N; small shrinks everything."""
    arg = parse_arg(arg, what="selected", seeds="", small=False)
    if arg.what not in ABLATIONS:
        raise ValueError(f"what={arg.what!r}: choose one of {', '.join(ABLATIONS)}")
    demo = runpy.run_path(str(pathlib.Path(__file__).with_name("demo.py")))
    config = demo["get_config"](f"paper,seeds={arg.seeds}" + (",small" if arg.small else ""))
    config.baselines = OF_PAPERS if arg.what == "baselines" else ()
    set_variants(config, ABLATIONS[arg.what])
    return config
