"""Dropout whose mask depends on the example and the position only, not on how a batch is laid out."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

_WORDS_PER_HASH = 4
_LEVELS = 2**16


def _hash_4d(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array, Array, Array]:
    """The hash pcg4d (Jarzynski & Olano 2020, "Hash functions for GPU rendering"): four words in, four words out.

    About two dozen operations, which fuse with what uses them; JAX's Threefry takes over a hundred a pair of words, and
    on a CPU a loop of passes over memory.
    """
    a, b, c, d = (v * jnp.uint32(1664525) + jnp.uint32(1013904223) for v in (a, b, c, d))

    def mix(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array, Array, Array]:
        a = a + b * d
        b = b + c * a
        c = c + a * b
        d = d + b * c
        return a, b, c, d

    return mix(*(v ^ (v >> jnp.uint32(16)) for v in mix(a, b, c, d)))


def keep_mask(keys: Array, positions: Array, width: int, rate: float) -> Array:
    """Draws a Bernoulli mask from the counter (position, channel) under each row's own key.

    Two rows with the same key have the same mask at the same position, whatever the batch, the padding or the device.

    Args:
      keys: uint32 [b, 2], one key a row.
      positions: int [b, m] or [m].
      width: channels.
      rate: share of dropped values, resolved to 1/65536.

    Returns:
      bool [b, m, width], true where a value is kept.
    """
    positions = jnp.broadcast_to(positions, (keys.shape[0], positions.shape[-1])).astype(jnp.uint32)
    # The four words of a hash go to channels a quarter of the width apart, which needs no interleaving.
    quarter = -(-width // _WORDS_PER_HASH)
    shape = (*positions.shape, quarter)
    counters = (positions[:, :, None], jax.lax.broadcasted_iota(jnp.uint32, shape, 2))
    words = _hash_4d(*(jnp.broadcast_to(v, shape) for v in (keys[:, 0, None, None], keys[:, 1, None, None], *counters)))
    # The upper half of a word is the better mixed one.
    draws = jnp.concatenate([word >> jnp.uint32(16) for word in words], axis=-1)
    return draws[..., :width] >= jnp.uint32(round(rate * _LEVELS))


def row_keys(key: Array, example_ids: Array) -> Array:
    """Derives a key for every row from its example id alone.

    Args:
      key: typed PRNG key of the place in the model where values are dropped.
      example_ids: int [b].

    Returns:
      uint32 [b, 2], for `keep_mask`.
    """
    words = jax.random.key_data(key).ravel()
    shape = example_ids.shape
    ids = example_ids.astype(jnp.uint32)
    inputs = (jnp.broadcast_to(words[0], shape), jnp.broadcast_to(words[-1], shape), ids, jnp.zeros(shape, jnp.uint32))
    return jnp.stack(_hash_4d(*inputs)[:2], axis=-1)


class Dropout(nn.Module):
    """Zeroes values at a rate and scales the rest by 1 / (1 - rate).

    Attributes:
      rate: share of dropped values; 0 is the identity.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, example_ids: Array, *, deterministic: bool, positions: Array | None = None) -> Array:
        """Drops values of x [b, m, w]; the mask of a row follows from its example id [b] and the positions [b, m].

        Args:
          x: [b, m, w].
          example_ids: int [b].
          deterministic: return x as it is.
          positions: int [b, m] or [m]; None counts from 0.
        """
        if deterministic or round(self.rate * _LEVELS) == 0:
            return x
        keys = row_keys(self.make_rng("dropout"), example_ids)
        positions = jnp.arange(x.shape[1]) if positions is None else positions
        keep = keep_mask(keys, positions, x.shape[2], self.rate)
        scale = _LEVELS / (_LEVELS - round(self.rate * _LEVELS))
        return jnp.where(keep, x * jnp.asarray(scale, x.dtype), jnp.zeros((), x.dtype))
