"""The shape annotations of models/ and train/ hold, and are checked where a test asks for it."""

import os
import pathlib
import subprocess
import sys

from grids import exhaustive


@exhaustive
def test_models_losses_and_a_step_keep_to_their_shapes():
    script = pathlib.Path(__file__).with_name("checked_annotations.py")
    root = script.parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, str(script)], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "annotations hold" in result.stdout
