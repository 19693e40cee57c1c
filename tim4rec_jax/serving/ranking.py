"""The best columns of a matrix of scores, on the device: what is excluded leaves before anything is ranked."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Scores of one device call. A processor is several times faster on what its cache holds.
SCORE_TILE_BYTES = {"cpu": 16 * 2**20}
_ELSEWHERE = 64 * 2**20
# Columns whose greatest score stands for them in the first round.
_BLOCK = 64


def score_rows(columns: int) -> int:
    """Returns how many rows of scores one device call makes: a power of two."""
    rows = SCORE_TILE_BYTES.get(jax.default_backend(), _ELSEWHERE) // (4 * columns)
    return 1 << (max(1, rows).bit_length() - 1)


def best_columns(
    scores: jax.Array, excluded: jax.Array, k: int, allowed: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Picks the k best columns a row, best first, never column 0, the padding; equal scores in order of index.

    Args:
      scores: [b, v].
      excluded: int [b, s] columns to leave out as well; 0 for none.
      k: columns a row.
      allowed: bool [v], the only columns to pick from; None for all.

    Returns:
      Scores [b, k], indices [b, k], and whether all scores of a row are finite [b]. Where nothing is left the score is
      -inf and the index means nothing, see `items_left`.
    """
    finite = jnp.isfinite(scores).all(axis=1)
    scores = scores.at[jnp.arange(scores.shape[0])[:, None], excluded].set(-jnp.inf)
    left = jnp.arange(scores.shape[1]) > 0
    scores = jnp.where(left if allowed is None else left & allowed, scores, -jnp.inf)
    return *_top_columns(scores, k), finite


def _top_columns(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of many columns: only the k blocks with the greatest scores can hold one of the k best.

    Blocks and, within them, columns stay in order of index, which decides between equal scores. Columns after the last
    whole block are all looked at.
    """
    b, v = scores.shape
    blocks = v // _BLOCK
    if 4 * k > blocks:
        return jax.lax.top_k(scores, k)
    # In two steps, of which the first runs along the vectors of a processor.
    parts = scores[:, : blocks * _BLOCK].reshape(b, blocks, _BLOCK // 8, 8)
    _, chosen = jax.lax.top_k(parts.max(axis=2).max(axis=2), k)
    columns = (jnp.sort(chosen, axis=1)[:, :, None] * _BLOCK + jnp.arange(_BLOCK)).reshape(b, k * _BLOCK)
    rest = jnp.broadcast_to(jnp.arange(blocks * _BLOCK, v), (b, v - blocks * _BLOCK))
    columns = jnp.concatenate([columns, rest], axis=1)
    best, places = jax.lax.top_k(jnp.take_along_axis(scores, columns, axis=1), k)
    return best, jnp.take_along_axis(columns, places, axis=1)


def items_left(indices: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Puts item 0 where `best_columns` had nothing left but what is excluded, whose score is -inf."""
    return np.where(scores == -np.inf, 0, indices)


def next_power_of_two(n: int) -> int:
    """Returns the least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def padded_lists(lists: Sequence[Sequence[int] | np.ndarray], rows: int) -> np.ndarray:
    """Returns lists of item indices as int32 [rows, s], filled with 0; s is a power of two."""
    columns = np.zeros((rows, next_power_of_two(max([1, *(len(ids) for ids in lists)]))), np.int32)
    for row, ids in enumerate(lists):
        columns[row, : len(ids)] = ids
    return columns
