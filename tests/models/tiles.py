"""The products of models/grouped_dot.py written out, of small tiles, for the layers that are made of them."""

import jax
import jax.numpy as jnp
import numpy as np

from clipmoe_jax.models import grouped_dot

ROWS = 4


def write_out(monkeypatch) -> None:
    """Puts written-out products of ROWS rows a tile, any width and any type, in place of the kernels."""
    monkeypatch.setattr(grouped_dot, "ROWS", ROWS)
    monkeypatch.setattr(grouped_dot, "fits", lambda kernels: True)
    monkeypatch.setattr(grouped_dot, "_product", product)
    monkeypatch.setattr(grouped_dot, "_kernel_gradient", kernel_gradient)


def product(x, kernels, tile_expert, *, transpose):
    """A product for each tile; NaN where a tile has no expert, as the kernels may leave there."""
    kernels = kernels.swapaxes(1, 2) if transpose else kernels
    tiles = x.reshape(len(tile_expert), -1, x.shape[1])
    y = jnp.einsum("trd,tdf->trf", tiles, kernels[tile_expert.clip(max=len(kernels) - 1)])
    y = jnp.where((tile_expert < len(kernels))[:, None, None], y, np.nan)
    return y.reshape(len(x), -1).astype(x.dtype)


def kernel_gradient(x, dy, tile_expert, num_experts):
    """A product for each tile, summed by expert."""
    tiles = (a.reshape(len(tile_expert), -1, a.shape[1]) for a in (x, dy))
    products = jnp.einsum("trd,trf->tdf", *tiles, preferred_element_type=jnp.float32)
    return jax.ops.segment_sum(products, tile_expert, num_experts).astype(x.dtype)
