"""Softmax cross-entropy over a catalogue by Pallas kernels on Mosaic GPU: the forward pass, and what the rule wants.

A program owns 64 rows of one side and goes along the other one 64 rows at a time, with one tile of each in shared
memory. Tensor cores of Hopper (wgmma) multiply them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.dispatch import Precision, interpreted, precision_name
from kernels.mosaic import DTYPES, INTERPRETS_PRODUCTS, Tiles, fetch, mosaic_call, operand, product, program_index
from kernels.softmax_cross_entropy.pallas_mosaic_vjp import gradient, item_ids, padded, split
from kernels.softmax_cross_entropy.rule import from_passes

_LOWEST = float(jnp.finfo(jnp.float32).min)
LARGEST_WIDTH = 256
# Of float32 factors; those of bfloat16 are exact, whatever is named.
_TF32 = (None, "default", "high", "tensorfloat32", "TF32_TF32_F32")


def _forward_kernel(
    hidden_ref: Any,
    embedding_ref: Any,
    ids_ref: Any,
    targets_ref: Any,
    lse_ref: Any,
    at_target_ref: Any,
    *,
    own: Any,
    other: Any,
    barrier: Any,
    steps: int,
    interpret: bool,
) -> None:
    """Log-sum-exp and score of the target of a block of targets, of a stretch of the catalogue."""
    tiles = Tiles(Tiles.ROWS, interpret)
    part, rows = program_index("parts"), pl.ds(program_index("blocks") * tiles.ROWS, tiles.ROWS)
    fetch([(hidden_ref.at[rows], own)], barrier)
    targets = tiles.spread(tiles.load_vector(targets_ref, rows, axis=0), 0)

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, at_target = carry
        items = pl.ds((part * steps + i) * tiles.ROWS, tiles.ROWS)
        fetch([(embedding_ref.at[items], other)], barrier)
        scores = product(own, other)
        ids = tiles.spread(tiles.load_vector(ids_ref, items, axis=1), 1)
        lowest = jnp.full_like(scores, -jnp.inf)
        at_target = jnp.maximum(at_target, jnp.max(jnp.where(ids == targets, scores, lowest), axis=1))
        scores = jnp.where(ids >= 0, scores, lowest)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
        tile_total = jnp.sum(jnp.exp(scores - tiles.spread(new_largest, 0)), axis=1)
        return new_largest, total * jnp.exp(largest - new_largest) + tile_total, at_target

    # Finite, for a tile may be masked altogether and -inf less -inf is no number.
    carry = tiles.full_vector(_LOWEST), tiles.full_vector(0.0), tiles.full_vector(-jnp.inf)
    largest, total, at_target = jax.lax.fori_loop(0, steps, step, carry)
    lse_ref[part, rows] = largest + jnp.log(total)
    at_target_ref[part, rows] = at_target


@dataclass(frozen=True)
class MosaicPasses:
    """The two passes of `rule.Passes`.

    Attributes:
      interpret: run by the interpreter.
    """

    interpret: bool

    def forward(self, hidden: Array, embedding: Array, targets: Array, masked: Array | None) -> tuple[Array, Array]:
        num_targets, items = hidden.shape[0], embedding.shape[0]
        parts, steps = split(num_targets, items)
        own = padded(hidden, Tiles.ROWS)
        other = padded(embedding.astype(hidden.dtype), parts * steps * Tiles.ROWS)
        place = operand(Tiles.ROWS, own.shape[1], own.dtype)
        shape = ((parts, own.shape[0]), jnp.float32)
        lse, at_target = mosaic_call(
            partial(_forward_kernel, steps=steps, interpret=self.interpret),
            [own, other, item_ids(items, masked, other.shape[0]), padded(jnp.maximum(targets, -1), Tiles.ROWS)],
            [shape, shape],
            grid={"blocks": own.shape[0] // Tiles.ROWS, "parts": parts},
            scratch={"own": place, "other": place, "barrier": plgpu.Barrier()},
            interpret=self.interpret,
            name="softmax_cross_entropy_forward",
        )
        return jax.nn.logsumexp(lse, axis=0)[:num_targets], jnp.max(at_target, axis=0)[:num_targets]

    def backward(
        self, hidden: Array, embedding: Array, targets: Array, masked: Array | None, lse: Array, weights: Array
    ) -> tuple[Array, Array]:
        inputs = hidden, embedding.astype(hidden.dtype), targets, masked, lse, weights
        d_hidden, d_embedding = (gradient(*inputs, by_hidden=by, interpret=self.interpret) for by in (True, False))
        return d_hidden, d_embedding


def softmax_cross_entropy_pallas_mosaic(
    hidden: Array,
    embedding: Array,
    targets: Array | None,
    masked: Array | None,
    *,
    precision: Precision = None,
    interpret: bool | None = None,
) -> Array:
    """Runs the kernels; arguments and result are those of `reference.softmax_cross_entropy_reference`.

    Raises:
      ValueError: for widths, dtypes or a precision that the kernels do not take.
    """
    width = hidden.shape[1]
    if width > LARGEST_WIDTH:
        raise ValueError(f"d={width} is more than the {LARGEST_WIDTH} that the GPU kernels take; use 'xla'")
    for name, array in (("hidden", hidden), ("embedding", embedding)):
        if array.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {array.dtype}, the GPU kernels take {DTYPES}; use 'xla'")
    configured = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    wanted = configured if precision is None else precision_name(precision)
    if hidden.dtype == jnp.float32 and wanted not in _TF32:
        raise ValueError(f"precision={wanted!r}: the kernels on Mosaic GPU offer TF32 ('default') alone; use 'xla'")
    if interpreted(interpret) and not INTERPRETS_PRODUCTS:
        raise ValueError(f"implementation='pallas_mosaic' without a GPU needs JAX 0.11, this is {jax.__version__}")
    return from_passes(MosaicPasses(interpreted(interpret)), hidden, embedding, targets, masked)
