"""The demo with a natural second world: drawings of emoji by two vendors, which the base knows by name.

    npm install --prefix data/npm emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0
    python -m benchmarks.drawings --packages=data/npm/node_modules --out=data/drawings
    python -m clipmoe_jax.main --config=configs/drawings.py --workdir=runs/drawings

Towers, phases and controls are those of configs/demo.py. "old" is zero-shot accuracy over the names of
Google's drawings of every fourth name, of which the base has seen Twitter's alone.

Arguments: seeds, controls, flops and small as of configs/demo.py; new=drawings turns it round: new is
drawings with full captions, old what the base knows of the scenes; data=DIR and packages=DIR say where
the first two commands put their files.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from clipmoe_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments as above."""
    arg = parse_arg(
        arg,
        new="scenes",
        data="data/drawings",
        packages="data/npm/node_modules",
        seeds="",
        controls=False,
        flops=False,
        small=False,
    )
    if arg.new not in ("scenes", "drawings"):
        raise ValueError(f"new={arg.new!r}: choose scenes or drawings")
    demo = runpy.run_path(str(pathlib.Path(__file__).with_name("demo.py")))
    switches = ",".join(name for name in ("controls", "flops", "small") if arg[name])
    config = demo["get_config"](f"seeds={arg.seeds},{switches}")

    def drawings(table: str) -> str:
        return f"csv:{arg.data}/{table}.csv?images={arg.packages}"

    scenes = config.data.base.partition(",")[0]  # with coarse captions
    config.data.base = f"{scenes},{drawings('train')}"
    if arg.new == "scenes":
        config.data.retention, config.data.rehearsal = drawings("test"), drawings("rehearsal")
    else:
        config.data.train, config.data.test = drawings("train_full"), drawings("test_full")
        config.data.retention = "digit_scenes:test?pairs=1000&captions=coarse"
        config.data.rehearsal = "digit_scenes:train?pairs=500&captions=coarse"
        config.evaluations = ()
    return config
