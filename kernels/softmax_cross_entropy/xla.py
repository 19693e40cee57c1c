"""Softmax cross-entropy over a catalogue in plain JAX: tile after tile of embedding rows, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from kernels.dispatch import Precision, matmul_precision, precision_name, pvary_together
from kernels.softmax_cross_entropy.config import XlaConfig, xla_config
from kernels.softmax_cross_entropy.rule import from_passes

Carry = TypeVar("Carry")


def _loop(rows: int, tile: int, step: Callable[[Carry, Array | int, int], Carry], carry: Carry) -> Carry:
    """Takes `step(carry, start, size)` over all rows, the ragged tile first, so that the loop needs no masks."""
    full = (rows - 1) // tile
    ragged = rows - full * tile
    carry = step(carry, 0, ragged)
    if full == 0:
        return carry
    return jax.lax.fori_loop(0, full, lambda i, carry: step(carry, ragged + i * tile, tile), carry)


@dataclass(frozen=True)
class XlaPasses:
    """The two passes of `rule.Passes`.

    Attributes:
      tile_size: embedding rows handled at once.
      precision: how matrices are multiplied.
    """

    tile_size: int
    precision: str | None

    def _dot(self, subscripts: str, a: Array, b: Array) -> Array:
        """Product in the dtype of hidden with sums in float32 or wider."""
        accum = jnp.promote_types(a.dtype, jnp.float32)
        with matmul_precision(self.precision):
            return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=accum)

    def forward(self, hidden: Array, embedding: Array, targets: Array, masked: Array | None) -> tuple[Array, Array]:
        accum = jnp.promote_types(hidden.dtype, jnp.float32)

        def step(carry: tuple[Array, Array], start: Array | int, size: int) -> tuple[Array, Array]:
            largest, total = carry
            scores = self._dot("td,vd->tv", hidden, jax.lax.dynamic_slice_in_dim(embedding, start, size))
            if masked is not None:
                scores = jnp.where(jax.lax.dynamic_slice_in_dim(masked, start, size), -jnp.inf, scores)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
            # A product with ones: on CPUs a sum over the last axis is slower.
            tile_exp = jnp.exp(scores - new_largest[:, None])
            tile_total = jnp.matmul(tile_exp, jnp.ones(size, accum), precision=jax.lax.Precision.HIGHEST)
            return new_largest, total * jnp.exp(largest - new_largest) + tile_total

        # Finite, for a tile may be masked altogether and -inf less -inf is no number.
        largest = jnp.full(hidden.shape[0], jnp.finfo(accum).min, accum)
        largest, total = _loop(embedding.shape[0], self.tile_size, step, (largest, jnp.zeros_like(largest)))
        # A gather of t rows here costs less than a comparison with the target in every one of the t v places.
        at_target = self._dot("td,td->t", hidden, embedding.at[targets].get(mode="clip"))
        if masked is not None:
            at_target = jnp.where(masked.at[targets].get(mode="clip"), -jnp.inf, at_target)
        return largest + jnp.log(total), at_target

    def backward(
        self, hidden: Array, embedding: Array, targets: Array, masked: Array | None, lse: Array, weights: Array
    ) -> tuple[Array, Array]:
        def step(carry: tuple[Array, Array], start: Array | int, size: int) -> tuple[Array, Array]:
            d_hidden, d_embedding = carry
            tile = jax.lax.dynamic_slice_in_dim(embedding, start, size)
            # Compared, not scattered: the sums of a scatter have no fixed order on GPUs.
            is_target = targets[:, None] == start + jnp.arange(size, dtype=targets.dtype)
            d_scores = jnp.exp(self._dot("td,vd->tv", hidden, tile) - lse[:, None]) - is_target
            if masked is not None:
                d_scores = jnp.where(jax.lax.dynamic_slice_in_dim(masked, start, size), 0.0, d_scores)
            d_scores = (weights[:, None] * d_scores).astype(hidden.dtype)
            d_hidden = d_hidden + self._dot("tv,vd->td", d_scores, tile)
            d_tile = self._dot("tv,td->vd", d_scores, hidden).astype(embedding.dtype)
            return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_embedding, d_tile, start, axis=0)

        d_hidden = jnp.zeros(hidden.shape, lse.dtype)
        # Marked by hand: under shard_map every carried array must differ over the same mesh axes.
        _, d_hidden, d_embedding = pvary_together(hidden, d_hidden, jnp.zeros_like(embedding))
        return _loop(embedding.shape[0], self.tile_size, step, (d_hidden, d_embedding))


def softmax_cross_entropy_xla(
    hidden: Array,
    embedding: Array,
    targets: Array | None,
    masked: Array | None,
    *,
    precision: Precision = None,
    config: XlaConfig | None = None,
) -> Array:
    """Runs the operator in tiles; arguments and result are those of `reference.softmax_cross_entropy_reference`.

    Raises:
      ValueError: for a config of another implementation.
    """
    config = config or xla_config(hidden.shape[0])
    if not isinstance(config, XlaConfig):
        raise ValueError(f"config={config!r} is not for implementation='xla'")
    passes = XlaPasses(config.tile_size, precision_name(precision))
    return from_passes(passes, hidden, embedding, targets, masked)
