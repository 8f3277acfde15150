"""Commands that have no use for an accelerator take none, whatever JAX_PLATFORMS says.

So do prepare, plan and report, whose own tests run them where it names devices that are not there.
"""

import os
import subprocess
import sys

import jax
import numpy as np
from etils import epath

from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.model_folder import save_model

TINY = ClipConfig(
    embed_dim=8,
    vision=VisionConfig(image_size=32, patch_size=16, width=16, num_layers=1, head_width=8),
    text=TextConfig(vocab_size=32, context_length=8, width=16, num_layers=1, head_width=8),
)

# Each command in a process of its own, all with the imports of one.
SCRIPT = """
import importlib, os, sys

names = ("prepare", "plan", "convert", "report", "main")
modules = {name: importlib.import_module(f"clipmoe_jax.{name}") for name in names}
from clipmoe_jax.core import cli

for line in sys.stdin.read().splitlines():
    name, *arguments = line.split()
    sys.stdout.flush()
    if not (child := os.fork()):
        sys.argv = [name, *arguments]
        modules[name]._define_flags()
        cli.run(modules[name].main)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

import jax
print(list(jax._src.xla_bridge._backends), jax.config.jax_platforms)
"""


def test_commands_without_a_use_for_devices_take_none(tmp_path):
    """A TPU, which only one process can have, stays free."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(TINY))
    save_model(epath.Path(tmp_path) / "model", TINY, params)
    lines = [
        f"convert --from={tmp_path}/model --to=huggingface --out={tmp_path}/exported",
        f"main --config=tests/pipeline/tiny_config.py --workdir={tmp_path}/run --stage=data",
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input="\n".join(lines),
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    *_, opened = done.stdout.splitlines()
    assert {"convert 0", "main 0"} <= set(done.stdout.splitlines()), done.stderr[-3000:]
    assert opened == "[] cuda"  # by the imports alone
    assert (tmp_path / "exported" / "config.json").exists() and (tmp_path / "run" / "data" / "train").exists()
