"""Selective scan in plain JAX: one position after the other, with states kept for the gradient at chunk borders only.

A step costs a few operations an element, which an associative scan multiplies; it works on all rows of a tile at once.
The inner functions are time-major: by position [l, b, e] or [l, b, n], cut into k chunks of c, where b counts the rows
of one tile; states are [b, n, e], channels last, so that loops run along contiguous memory.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels.decays import step_size
from kernels.dispatch import pvary_together
from kernels.segment_ids import history_starts, real_positions
from kernels.selective_scan.config import DEFAULT_CHUNK_SIZE


def _from_before(a: Array, start: Array | None) -> Array:
    """What of [b, n, e] passes between a position and the one before: nothing where a history begins, start [b]."""
    return a if start is None else jnp.where(start[:, None, None], 0, a)


def _advance(A: Array, state: Array, delta: Array, u: Array, B: Array, start: Array | None) -> Array:
    """state_t = exp(delta_t A) state_{t-1} + u_t B_t, for A [n, e]."""
    state = _from_before(state, start)
    return jnp.exp(delta[:, None] * A) * state + u[:, None] * B[..., None].astype(state.dtype)


@jax.custom_vjp
def _scan(
    delta: Array, u: Array, A: Array, B: Array, C: Array, state: Array, starts: Array | None
) -> tuple[Array, Array]:
    """Returns what outputs [k, c, b, e] have from states, and the final state.

    Args:
      delta, u: [k, c, b, e] step sizes, and inputs times them.
      A: [n, e].
      B, C: [k, c, b, n].
      state: [b, n, e] before the first position.
      starts: bool [k, c, b], or None.
    """
    outputs, _ = _scan_fwd(delta, u, A, B, C, state, starts)
    return outputs


def _scan_fwd(
    delta: Array, u: Array, A: Array, B: Array, C: Array, state: Array, starts: Array | None
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    def step(state: Array, inputs: tuple[Any, ...]) -> tuple[Array, Array]:
        delta_t, u_t, B_t, C_t, start = inputs
        state = _advance(A, state, delta_t, u_t, B_t, start)
        return state, jnp.sum(state * C_t[..., None].astype(state.dtype), axis=1)

    def chunk(state: Array, inputs: tuple[Any, ...]) -> tuple[Array, tuple[Array, Array]]:
        after, y = jax.lax.scan(step, state, inputs)
        return after, (y, state)

    final_state, (y, before) = jax.lax.scan(chunk, state, (delta, u, B, C, starts))
    return (y, final_state), (delta, u, A, B, C, before, starts)


def _step_back(
    A: Array, carry: tuple[Array, Array], inputs: tuple[Any, ...]
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """Passes the gradient g of the state over a position; `dA` is summed for each row apart."""
    g, dA = carry
    delta, u, B, C, before, dy, start = inputs
    accum = g.dtype
    B, C = B.astype(accum), C.astype(accum)
    decay = jnp.exp(delta[:, None] * A)
    g = g + dy[:, None] * C[..., None]
    decayed = decay * _from_before(before, start)
    flow = g * decayed
    # The state is decayed + u B; what the second part gives dC needs no array of the state's size.
    dC = jnp.einsum("be,bne->bn", dy, decayed) + B * jnp.sum(dy * u, axis=1, keepdims=True)
    dB = jnp.einsum("be,bne->bn", u, g)
    du = jnp.sum(g * B[..., None], axis=1)
    d_delta = jnp.sum(flow * A, axis=1)
    return (_from_before(g * decay, start), dA + flow * delta[:, None]), (d_delta, du, dB, dC)


def _scan_bwd(residuals: tuple[Any, ...], cotangents: tuple[Array, Array]) -> tuple[Array | None, ...]:
    """Walks the chunks backwards; states inside a chunk are computed again from the one before it."""
    delta, u, A, B, C, before, starts = residuals
    dy, d_final = cotangents

    def remember(state: Array, inputs: tuple[Any, ...]) -> tuple[Array, Array]:
        return _advance(A, state, *inputs), state

    def chunk(carry: tuple[Array, Array], inputs: tuple[Any, ...]) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        delta, u, B, C, state, dy, starts = inputs
        _, states = jax.lax.scan(remember, state, (delta, u, B, starts))
        return jax.lax.scan(partial(_step_back, A), carry, (delta, u, B, C, states, dy, starts), reverse=True)

    carry = d_final, jnp.zeros_like(d_final)
    (d_initial, dA), by_position = jax.lax.scan(chunk, carry, (delta, u, B, C, before, dy, starts), reverse=True)
    d_delta, du, dB, dC = by_position
    return d_delta, du, dA.sum(0), dB.astype(B.dtype), dC.astype(C.dtype), d_initial, None


_scan.defvjp(_scan_fwd, _scan_bwd)


# Values in the states of a tile: a step's arrays should stay in a CPU's cache.
_TILE_VALUES = 2**15


def _row_tiles(batch: int, state_values: int) -> tuple[int, int]:
    """Returns how many tiles of how many rows a batch is cut into, for states of so many values per row.

    On CPUs a step on all rows would go through memory. Elsewhere one tile is everything, for small ones would leave a
    GPU idle.
    """
    if jax.default_backend() != "cpu":
        return 1, batch
    tiles = max(1, -(-batch // max(1, _TILE_VALUES // state_values)))
    return tiles, -(-batch // tiles)  # one tile of no rows for an empty batch


def selective_scan_xla(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    dt_bias: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
    *,
    return_final_state: bool = True,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> tuple[Array, Array]:
    """Runs the operator in chunks; arguments and results are those of `reference.selective_scan_reference`.

    Args:
      chunk_size: c, most positions between two states that are kept for the gradient; l need not be a multiple. Memory
        for states is l / c b e n numbers and c e n for each row of a tile.
    """
    delta, starts = step_size(dt, dt_bias, real_positions(segment_ids)), history_starts(segment_ids)
    batch, length, width = x.shape
    accum = jnp.result_type(delta, A)
    num_chunks = -(-length // min(chunk_size, length))
    chunk = -(-length // num_chunks)  # of like size, so that little is computed on padding
    tiles, rows = _row_tiles(batch, A.size)

    def to_tiles(a: Array) -> Array:
        """[b, ...] -> [tiles, rows, ...]"""
        a = jnp.pad(a, [(0, tiles * rows - batch)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(tiles, rows, *a.shape[1:])

    def to_chunks(a: Array) -> Array:
        """[b, l, w] -> [tiles, k, c, rows, w]; padding has delta = 0, so it neither decays nor adds."""
        a = jnp.pad(a, [(0, 0), (0, num_chunks * chunk - length), (0, 0)])
        return jnp.moveaxis(to_tiles(a.reshape(batch, num_chunks, chunk, -1)), 1, 3)

    delta = delta.astype(accum)
    u = delta * x
    if initial_state is None:
        initial_state = jnp.zeros((batch, *A.shape), accum)
    decay, *by_tile = pvary_together(
        A.T.astype(accum),
        to_chunks(delta),
        to_chunks(u),
        to_chunks(B),
        to_chunks(C),
        to_tiles(jnp.swapaxes(initial_state.astype(accum), 1, 2)),
        None if starts is None else to_chunks(starts[..., None])[..., 0],
    )

    def scan_tile(tile: list[Any]) -> tuple[Array, Array]:
        delta, u, B, C, state, starts = tile
        return _scan(delta, u, decay, B, C, state, starts)

    y, final_state = jax.lax.map(scan_tile, by_tile)
    y = jnp.moveaxis(y, 3, 1).reshape(tiles * rows, num_chunks * chunk, width)[:batch, :length]
    final_state = final_state.reshape(tiles * rows, *final_state.shape[2:])[:batch]
    if D is not None:
        y = y + D * x
    return y.astype(x.dtype), jnp.swapaxes(final_state, 1, 2)
