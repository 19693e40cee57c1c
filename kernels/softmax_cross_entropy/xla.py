"""Softmax cross-entropy over a catalogue in plain JAX: tile after tile of embedding rows, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from kernels.triton_call import Products, products, vary_together

Carry = TypeVar("Carry")


def _walk(rows: int, tile: int, step: Callable[[Carry, Array | int, int], Carry], carry: Carry) -> Carry:
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
    precision: jax.lax.Precision | None

    def _dot(self, subscripts: str, a: Array, b: Array) -> Array:
        """Product in the dtype of hidden with sums in float32 or wider."""
        wide = jnp.promote_types(a.dtype, jnp.float32)
        return jnp.einsum(subscripts, a, b.astype(a.dtype), precision=self.precision, preferred_element_type=wide)

    def forward(self, hidden: Array, embedding: Array, targets: Array, masked: Array | None) -> tuple[Array, Array]:
        wide = jnp.promote_types(hidden.dtype, jnp.float32)

        def step(carry: tuple[Array, Array], start: Array | int, size: int) -> tuple[Array, Array]:
            largest, total = carry
            scores = self._dot("td,vd->tv", hidden, jax.lax.dynamic_slice_in_dim(embedding, start, size))
            if masked is not None:
                scores = jnp.where(jax.lax.dynamic_slice_in_dim(masked, start, size), -jnp.inf, scores)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
            # A product with ones: on CPUs a sum over the last axis is slower.
            tile_exp = jnp.exp(scores - new_largest[:, None])
            tile_total = jnp.matmul(tile_exp, jnp.ones(size, wide), precision=jax.lax.Precision.HIGHEST)
            return new_largest, total * jnp.exp(largest - new_largest) + tile_total

        # Finite, for a tile may be masked altogether and -inf less -inf is no number.
        largest = jnp.full(hidden.shape[0], jnp.finfo(wide).min, wide)
        largest, total = _walk(embedding.shape[0], self.tile_size, step, (largest, jnp.zeros_like(largest)))
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
        _, d_hidden, d_embedding = vary_together(hidden, d_hidden, jnp.zeros_like(embedding))
        return _walk(embedding.shape[0], self.tile_size, step, (d_hidden, d_embedding))


def precision_of(name: Products | None) -> jax.lax.Precision | None:
    """Returns the precision of matrix products that `name` asks for; None follows jax_default_matmul_precision."""
    if name is None:
        return None
    return jax.lax.Precision.HIGHEST if products(name) == "float32" else jax.lax.Precision.DEFAULT
