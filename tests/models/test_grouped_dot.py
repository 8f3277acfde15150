"""Grouped products on Hopper GPUs: interpreted where JAX can do that, lowered everywhere."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiles
from grids import grid, quick
from jax.experimental.pallas import mosaic_gpu

from clipmoe_jax.models import grouped_dot

E = 4
TILES = {  # whose expert each tile is; E is none
    "an expert without rows, a tile without expert": [0, 0, 1, 3, E],
    "no expert has rows": [E, E],
    "one expert": [2, 2, 2],
}
# Tests of kernels as JAX interprets them: from 0.11 on.
interpret = getattr(mosaic_gpu, "force_gpu_interpret_mode", None)


def arrays(num_tiles, width, hidden):
    num_rows = num_tiles * grouped_dot.ROWS
    shapes = (num_rows, width), (E, width, hidden), (num_rows, hidden)
    return [jax.random.normal(jax.random.key(i), shape, jnp.float16) for i, shape in enumerate(shapes)]


def value_and_gradients(tile_expert, x, kernels, dy):
    y, pull_back = jax.vjp(lambda *of: grouped_dot.grouped_dot(*of, tile_expert), x, kernels)
    return y, *pull_back(dy)


def test_kernels_lower_for_gpus():
    """Product, gradient of rows, gradient of kernels: one kernel each, of which frozen experts need two."""
    x, kernels, dy = arrays(3, 128, 256)
    tile_expert = jnp.array([0, 1, E])

    def num_kernels(function):
        lowered = jax.jit(function).trace(x, kernels, dy).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("custom_call @mosaic_gpu")

    assert num_kernels(lambda *of: value_and_gradients(tile_expert, *of)) == 3


def test_a_start_imports_no_kernel():
    script = "import sys, clipmoe_jax.models.clip; assert 'jax.experimental.pallas' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_kernels_fit_half_precision_and_multiples_of_their_tiles():
    shapes = {(2, 768, 3072): True, (2, 128, 640): True, (2, 64, 256): False, (2, 256, 320): False}
    for shape, fit in shapes.items():
        assert grouped_dot.fits(jax.ShapeDtypeStruct(shape, jnp.bfloat16)) == fit
        assert not grouped_dot.fits(jax.ShapeDtypeStruct(shape, jnp.float32))


if interpret:

    @pytest.mark.parametrize("name", quick(TILES, "an expert without rows, a tile without expert"))
    @pytest.mark.parametrize(
        ("width", "hidden"), grid((384, 640), rest=[(128, 256)]), ids=["columns of 128", "columns of 256"]
    )
    def test_interpreted_kernels_equal_products_written_out(monkeypatch, name, width, hidden):
        """Sizes of which the steps use each buffer more than once, and more tiles than multiprocessors."""
        monkeypatch.setattr(grouped_dot, "MULTIPROCESSORS", 2)
        tile_expert, given = jnp.array(name), arrays(len(name), width, hidden)
        with interpret():
            found = value_and_gradients(tile_expert, *given)
        tiles.write_out(monkeypatch)
        wanted = value_and_gradients(tile_expert, *(a.astype(jnp.float32) for a in given))
        used = int(np.sum(np.array(name) < E)) * 128
        for a, b, rows in zip(found, wanted, (used, used, E), strict=True):
            np.testing.assert_allclose(a[:rows], b[:rows], rtol=2e-3, atol=0.15)
        assert np.isfinite(found[2]).all()
