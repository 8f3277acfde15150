"""Position tables for longer captions (Long-CLIP, arXiv 2403.15378, section 3.1) and larger images.

Letters: L positions, D width, G patches along a side.
"""

import jax
import numpy as np
from jaxtyping import Float

KEPT_POSITIONS = 20
FACTOR = 4


def stretch_positions(positions: Float[np.ndarray, "L D"]) -> Float[np.ndarray, "stretched D"]:
    """Keeps the first 20 positions and interpolates each later one to four: (77, D) -> (248, D), same dtype.

    New rows lie at quarters between two neighbours; after the last position its slope continues. Computed in
    the table's own dtype, as the released code does in float16. Raises ValueError for fewer than 22 rows.
    """
    positions = np.asarray(positions)
    if len(positions) <= KEPT_POSITIONS + 1:
        raise ValueError(
            f"a table of {len(positions)} positions cannot be stretched: the first {KEPT_POSITIONS} are kept "
            "and at least two more are needed"
        )
    rest = positions[KEPT_POSITIONS:]
    following = np.concatenate([rest[1:], rest[-1:]])
    quarters = (np.arange(FACTOR) / FACTOR).astype(positions.dtype)[None, :, None]
    stretched = (1 - quarters) * rest[:, None] + quarters * following[:, None]
    stretched[-1] = rest[-1] + quarters[0] * (rest[-1] - rest[-2])
    return np.concatenate([positions[:KEPT_POSITIONS], stretched.reshape(-1, positions.shape[1])])


def stretched_length(context_length: int) -> int:
    """Returns the number of positions after stretching: 77 -> 248."""
    return KEPT_POSITIONS + FACTOR * (context_length - KEPT_POSITIONS)


def resize_grid(positions: Float[np.ndarray, "positions D"], side: int) -> Float[np.ndarray, "1+{side}**2 D"]:
    """Resizes a vision tower's grid of positions: (1 + G*G, D) -> (1 + side*side, D), same dtype.

    The class token's row is kept. Bicubic with antialiasing in float32, as open_clip has torch do it.
    """
    positions = np.asarray(positions)
    old_side = round((len(positions) - 1) ** 0.5)
    grid = positions[1:].astype(np.float32).reshape(old_side, old_side, -1)
    shape, precision = (side, side, grid.shape[-1]), jax.lax.Precision.HIGHEST
    resized = np.asarray(jax.image.resize(grid, shape, "cubic", precision=precision))
    return np.concatenate([positions[:1], resized.reshape(side * side, -1).astype(positions.dtype)])
