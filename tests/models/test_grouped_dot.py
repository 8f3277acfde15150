"""Grouped products on Hopper GPUs: interpreted where JAX can do that, lowered everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiles
from grids import grid
from jax.experimental.pallas import mosaic_gpu

from clipmoe_jax.models import grouped_dot

E, D, F = 4, 128, 256
TILES = {  # whose expert each tile is; E is none
    "an expert without rows, a tile without expert": (0, 0, 1, 3, E),
    "no expert has rows": (E, E),
    "one expert": (2, 2, 2),
}
# Tests of kernels as JAX interprets them: from 0.11 on.
interpret = getattr(mosaic_gpu, "force_gpu_interpret_mode", None)


def arrays(num_tiles):
    shapes = (num_tiles * grouped_dot.ROWS, D), (E, D, F), (num_tiles * grouped_dot.ROWS, F)
    return [jax.random.normal(jax.random.key(i), shape, jnp.float16) for i, shape in enumerate(shapes)]


def value_and_gradients(tile_expert, x, kernels, dy):
    y, pull_back = jax.vjp(lambda *of: grouped_dot.grouped_dot(*of, tile_expert), x, kernels)
    return y, *pull_back(dy)


def test_kernels_lower_for_gpus():
    """Product, gradient of rows, gradient of kernels: one kernel each, of which frozen experts need two."""
    x, kernels, dy = arrays(3)
    tile_expert = jnp.array([0, 1, E])

    def num_kernels(function):
        lowered = jax.jit(function).trace(x, kernels, dy).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("custom_call @mosaic_gpu")

    assert num_kernels(lambda *of: value_and_gradients(tile_expert, *of)) == 3


if interpret:

    @pytest.mark.parametrize(
        "name", grid("an expert without rows, a tile without expert", rest=list(TILES)[1:])
    )
    @pytest.mark.parametrize("widest", [256, 128])
    def test_interpreted_kernels_equal_products_written_out(monkeypatch, name, widest):
        monkeypatch.setattr(grouped_dot, "MULTIPROCESSORS", 2)
        monkeypatch.setattr(grouped_dot, "WIDEST", widest)
        jax.clear_caches()
        tile_expert, given = jnp.array(TILES[name]), arrays(len(TILES[name]))
        with interpret():
            found = value_and_gradients(tile_expert, *given)
        tiles.write_out(monkeypatch)
        wanted = value_and_gradients(tile_expert, *(a.astype(jnp.float32) for a in given))
        used = int(np.sum(np.array(TILES[name]) < E)) * 128
        for a, b, rows in zip(found, wanted, (used, used, E), strict=True):
            np.testing.assert_allclose(a[:rows], b[:rows], rtol=2e-3, atol=0.1)
        assert np.isfinite(found[2]).all()
