"""Softmax cross-entropy over a catalogue on Mosaic GPU: the gradient by hidden and by embedding, one kernel for both.

The gradient of the scores, w_t (exp(s_tv - lse_t) - [v = target_t]), is made again tile by tile in each of them, put
in shared memory and multiplied by the other side. Tensor cores read float32 factors along the summed index alone, so
that the kernel is also given the other side transposed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic import Tiles, add_product, fetch, mosaic_call, operand, product, program_index

# Programs: two for each of an H100's 132 multiprocessors.
_PROGRAMS = 264
# Columns are padded to multiples of this: 128 bytes of bfloat16.
_COLUMNS = 64


def split(own_rows: int, other_rows: int) -> tuple[int, int]:
    """Returns into how many parts the loop over the other side is cut, and the tiles of each."""
    blocks, tiles = -(-own_rows // Tiles.ROWS), -(-other_rows // Tiles.ROWS)
    steps = -(-tiles // min(tiles, -(-_PROGRAMS // blocks)))
    return -(-tiles // steps), steps


def padded(array: Array, rows: int) -> Array:
    """Fills up with zeros to a multiple of rows, and a matrix to one of `_COLUMNS`."""
    more = [-size % side for size, side in zip(array.shape, (rows, _COLUMNS)[: array.ndim], strict=True)]
    return jnp.pad(array, [(0, m) for m in more]) if any(more) else array


def item_ids(items: int, masked: Array | None, size: int) -> Array:
    """Returns the items' ids, int32 [size], and -2 for those that are masked or do not exist."""
    ids = jnp.arange(size, dtype=jnp.int32)
    counts = ids < items
    if masked is not None:
        counts &= jnp.pad(~masked, (0, size - items))
    return jnp.where(counts, ids, -2)


def _kernel(
    own_ref: Any,
    other_ref: Any,
    transposed_ref: Any,
    ids_ref: Any,
    targets_ref: Any,
    lse_ref: Any,
    weights_ref: Any,
    out_ref: Any,
    *,
    own: Any,
    other: Any,
    transposed: Any,
    d_scores: Any,
    barrier: Any,
    barrier_of_two: Any,
    by_hidden: bool,
    steps: int,
    interpret: bool,
) -> None:
    """Gradient by a block of own rows, summed over a stretch of the other side."""
    tiles = Tiles(Tiles.ROWS, interpret)
    part, rows = program_index("parts"), pl.ds(program_index("blocks") * tiles.ROWS, tiles.ROWS)
    fetch([(own_ref.at[rows], own)], barrier)
    # Targets lie along the rows of a tile where they are the own side, items where those are.
    along_targets, along_items = (0, 1) if by_hidden else (1, 0)

    def run(total: Any) -> Array:
        def step(i: Array, _: None) -> None:
            others = pl.ds((part * steps + i) * tiles.ROWS, tiles.ROWS)
            fetch([(other_ref.at[others], other), (transposed_ref.at[:, others], transposed)], barrier_of_two)

            def along(ref: Any, axis: int) -> Array:
                return tiles.spread(tiles.load_vector(ref, others if axis else rows, axis=axis), axis)

            scores, ids = product(own, other), along(ids_ref, along_items)
            targets, lse, weights = (along(ref, along_targets) for ref in (targets_ref, lse_ref, weights_ref))
            power, zeros = jnp.exp(scores - lse), jnp.zeros_like(scores)
            gradient = weights * jnp.where(ids == targets, power - 1.0, power)
            d_scores[...] = jnp.where(ids >= 0, gradient, zeros).astype(d_scores.dtype)
            plgpu.commit_smem()
            add_product(total, d_scores, transposed)

        jax.lax.fori_loop(0, steps, step, None)
        return total[...]

    out_ref[part, rows, :] = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((tiles.ROWS, own_ref.shape[1]), jnp.float32))


def gradient(
    hidden: Array,
    embedding: Array,
    targets: Array,
    masked: Array | None,
    lse: Array,
    weights: Array,
    *,
    by_hidden: bool,
    interpret: bool,
) -> Array:
    """Returns the gradient of sum_t weights_t (lse_t - hidden_t . E_target) by one side, in float32.

    Args:
      hidden, embedding: [t, d] and [v, d] in one dtype.
      targets, lse, weights: [t].
      masked: bool [v], or None.
      by_hidden: by hidden, else by embedding.
      interpret: run by the interpreter.
    """
    own, other = (hidden, embedding) if by_hidden else (embedding, hidden)
    num_rows, width = own.shape
    parts, steps = split(num_rows, other.shape[0])
    own, other = padded(own, Tiles.ROWS), padded(other, parts * steps * Tiles.ROWS)
    of_targets, of_items = (own, other) if by_hidden else (other, own)
    # Beyond the last target the weight is 0.
    by_target = [padded(a, of_targets.shape[0]) for a in (jnp.maximum(targets, -1), lse, weights)]
    columns, place = own.shape[1], operand(Tiles.ROWS, own.shape[1], own.dtype)
    (sums,) = mosaic_call(
        partial(_kernel, by_hidden=by_hidden, steps=steps, interpret=interpret),
        [own, other, other.T, item_ids(embedding.shape[0], masked, of_items.shape[0]), *by_target],
        [((parts, *own.shape), jnp.float32)],
        grid={"blocks": own.shape[0] // Tiles.ROWS, "parts": parts},
        scratch={
            "own": place,
            "other": place,
            "transposed": operand(columns, Tiles.ROWS, own.dtype),
            "d_scores": operand(Tiles.ROWS, Tiles.ROWS, own.dtype),
            "barrier": plgpu.Barrier(),
            "barrier_of_two": plgpu.Barrier(num_arrivals=2),
        },
        interpret=interpret,
        name=f"softmax_cross_entropy_d_{'hidden' if by_hidden else 'embedding'}",
    )
    return jnp.sum(sums, axis=0)[:num_rows, :width]
