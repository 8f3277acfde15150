"""Products of rows with the kernels of their experts, as kernels for NVIDIA's Hopper GPUs (H100, H200).

Letters: R rows, T = R / ROWS tiles of rows, E experts, D width in, F width out.

Every tile belongs to one expert, because groups of rows begin and end where tiles do
(`experts.make_grouped_mlp`), as in MegaBlocks (arXiv 2211.15841). Then a product is an ordinary one whose
tile looks up its expert. A persistent kernel runs on each multiprocessor: one warpgroup loads, two multiply,
each half of the tile's columns.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

Array = jax.Array

ROWS = 128  # of a tile; a group's last tile is filled up, so E times half of it is computed for nothing
# The settings below were measured on one H100 (benchmarks/LOG.md).
WIDEST = 256  # columns of a tile; half where they do not divide F
DEPTH = 64  # of both factors, loaded at once
LOADED = 4  # steps of that depth in shared memory
SNAKE = 4  # tiles of columns that multiprocessors go through together, so that they share what they load
MULTIPROCESSORS = 132  # of an H100 SXM or H200, where a program is compiled for one that is not there
GROUPS = 2  # warpgroups that multiply
LOADING_REGISTERS = 40  # of a thread that loads

MULTIPLE = 128  # of D and F, of 16 bits


def fits(kernels: Float[Array, "E D F"]) -> bool:
    """Returns whether `grouped_dot` has kernels for these."""
    return kernels.dtype.itemsize == 2 and all(size % MULTIPLE == 0 for size in kernels.shape[1:])


@jax.custom_vjp
def grouped_dot(
    x: Float[Array, "R D"], kernels: Float[Array, "E D F"], tile_expert: Int[Array, " T"]
) -> Float[Array, "R F"]:
    """Returns each tile of rows times its expert's kernel, (R, F) in x's dtype, summed in float32.

    x and kernels: as `fits` says. tile_expert (T,) int32 in order; E is no expert: of such a tile the result
    and the gradient of x are undefined and may be NaN, and it adds nothing to the gradient of kernels.
    """
    return _product(x, kernels, tile_expert, transpose=False)


def _forward(x, kernels, tile_expert):
    return _product(x, kernels, tile_expert, transpose=False), (x, kernels, tile_expert)


def _backward(residuals, dy):
    # XLA drops the gradient of frozen kernels.
    x, kernels, tile_expert = residuals
    dx = _product(dy, kernels, tile_expert, transpose=True)
    return dx, _kernel_gradient(x, dy, tile_expert, len(kernels)), None


grouped_dot.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames="transpose")
def _product(x: Array, kernels: Array, tile_expert: Array, *, transpose: bool) -> Array:
    """Returns (R, F); transpose: kernels are (E, F, D)."""
    num_columns, num_experts = kernels.shape[1 if transpose else 2], len(kernels)
    width = _tile_width(num_columns)
    num_tiles = jnp.sum(tile_expert < num_experts, dtype=jnp.int32)[None]

    def kernel(num_tiles, tile_expert, x, kernels, y):
        def tile(place):
            row, column = plgpu.planar_snake(place, (num_tiles[0], num_columns // width), 1, SNAKE)
            rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * width, width)
            of_expert = kernels.at[tile_expert[row]]
            factors = x.at[rows, :], of_expert.at[columns, :] if transpose else of_expert.at[:, columns]
            return factors, y.at[rows, columns], x.shape[1] // DEPTH

        _run(tile, num_tiles[0] * (num_columns // width), (False, transpose), width, y.dtype)

    out_type = jax.ShapeDtypeStruct((len(x), num_columns), x.dtype)
    return _launch(kernel, out_type)(num_tiles, tile_expert, x, kernels)


@functools.partial(jax.jit, static_argnames="num_experts")
def _kernel_gradient(x: Array, dy: Array, tile_expert: Array, num_experts: int) -> Array:
    """Returns x^T dy of each expert's rows, (E, D, F)."""
    width = _tile_width(dy.shape[1])
    places = x.shape[1] // ROWS, dy.shape[1] // width
    counts = jnp.sum(tile_expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    starts = jnp.minimum(jnp.cumsum(counts) - counts, len(tile_expert) - 1)

    def kernel(starts, counts, x, dy, out):
        def tile(place):
            expert = place // (places[0] * places[1])
            row, column = plgpu.planar_snake(place % (places[0] * places[1]), places, 1, SNAKE)
            # Longer than the group, which the number of steps ends.
            of_group = pl.ds(pl.multiple_of(starts[expert] * ROWS, ROWS), len(x))
            rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * width, width)
            factors = x.at[of_group, rows], dy.at[of_group, columns]
            # An empty group takes a step too, whose result is replaced below.
            steps = jnp.maximum(counts[expert], 1) * (ROWS // DEPTH)
            return factors, out.at[expert, rows, columns], steps

        _run(tile, num_experts * places[0] * places[1], (True, False), width, out.dtype)

    out_type = jax.ShapeDtypeStruct((num_experts, x.shape[1], dy.shape[1]), x.dtype)
    gradient = _launch(kernel, out_type)(starts, counts, x, dy)
    return jnp.where(counts[:, None, None] > 0, gradient, 0)


def _tile_width(num_columns: int) -> int:
    return WIDEST if num_columns % WIDEST == 0 else WIDEST // 2


def _launch(kernel: Callable[..., None], out_type: jax.ShapeDtypeStruct) -> Callable[..., Array]:
    """Returns a kernel that runs once on each multiprocessor."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(getattr(jax.local_devices()[0], "core_count", MULTIPROCESSORS),),
        grid_names=("multiprocessor",),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _run(
    tile: Callable[[Any], Any], num_tiles: Any, transposed: tuple[bool, bool], width: int, dtype: Any
) -> None:
    """Computes, inside a kernel, the tiles (ROWS, width) of a result.

    tile(number) returns two factors, the place of their product, and the number of steps of DEPTH; the first
    factor is (ROWS, depth), the second (depth, width), and either may be transposed.
    """
    first = ((DEPTH, ROWS), lambda k: (k, 0)) if transposed[0] else ((ROWS, DEPTH), lambda k: (0, k))
    second = ((width, DEPTH), lambda k: (0, k)) if transposed[1] else ((DEPTH, width), lambda k: (k, 0))
    part = width // GROUPS
    corner = ROWS // 2, min(part, 64)  # of a part, stored at once
    group = lax.axis_index("group")

    def pipeline(num_steps, body, around):
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(num_steps,),
            in_specs=[plgpu.BlockSpec(*spec, transforms=_swizzled(spec[0][1])) for spec in (first, second)],
            wg_axis="group",
            num_compute_wgs=GROUPS,
            memory_registers=LOADING_REGISTERS,
            max_concurrent_steps=LOADED,
            compute_context=around,
        )

    def nothing(*_):
        pass

    factors, _, num_steps = tile(0)
    buffers = pipeline(num_steps, nothing, nothing).get_allocations(*factors)
    stored = plgpu.SMEM((GROUPS, 2, *corner), dtype, transforms=_swizzled(corner[1]))

    @functools.partial(pl.run_scoped, buffers=buffers, stored=stored, collective_axes="group")
    def _(buffers, stored):
        @plgpu.nd_loop((num_tiles,), collective_axes="multiprocessor")
        def _(loop):
            factors, place, num_steps = tile(loop.index[0])
            here = pl.ds(group * part, part)

            def multiply(_, a, b, sums):
                a = a.transpose((1, 0)) if transposed[0] else a
                b = b.at[here].transpose((1, 0)) if transposed[1] else b.at[:, here]
                plgpu.wgmma(sums, a, b)
                plgpu.wgmma_wait(0)
                return sums

            def around(run):
                sums = plgpu.ACC((ROWS, part), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]

                @functools.partial(pl.run_scoped, sums=sums)
                def _(sums):
                    run(sums)
                    store(sums[...].astype(dtype), place.at[:, here])

            def store(values, place):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                corners = [(i, j) for i in range(0, ROWS, corner[0]) for j in range(0, part, corner[1])]
                for number, (i, j) in enumerate(corners):
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    stored[group, number % 2] = values[i : i + corner[0], j : j + corner[1]]
                    plgpu.commit_smem()
                    target = place.at[i : i + corner[0], j : j + corner[1]]
                    plgpu.copy_smem_to_gmem(stored.at[group, number % 2], target)

            pipeline(num_steps, multiply, around)(*factors, allocations=buffers)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _swizzled(columns: int) -> tuple[Any, Any]:
    """Returns how shared memory holds 16-bit values, so that no two threads wait for one bank."""
    columns = min(columns, 64)
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)
