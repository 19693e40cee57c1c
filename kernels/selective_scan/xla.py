"""Selective scan in plain JAX: one position after the other, with states kept for the gradient at chunk borders only.

A step works on the whole batch at once and costs a few operations an element, which an associative scan multiplies. The
inner functions are time-major: by position [l, b, e] or [l, b, n], cut into k chunks of c; states are [b, n, e],
channels last, so that loops run along contiguous memory.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from kernels.triton_call import vary_together


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
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
    def step(state: Array, inputs: tuple[Array | None, ...]) -> tuple[Array, Array]:
        delta_t, u_t, B_t, C_t, start = inputs
        state = _advance(A, state, delta_t, u_t, B_t, start)
        return state, jnp.sum(state * C_t[..., None].astype(state.dtype), axis=1)

    def chunk(state: Array, inputs: tuple[Array | None, ...]) -> tuple[Array, tuple[Array, Array]]:
        after, y = jax.lax.scan(step, state, inputs)
        return after, (y, state)

    final_state, (y, before) = jax.lax.scan(chunk, state, (delta, u, B, C, starts))
    return (y, final_state), (delta, u, A, B, C, before, starts)


def _step_back(
    A: Array, carry: tuple[Array, Array], inputs: tuple[Array | None, ...]
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """Passes the gradient g of the state over a position; `dA` is summed for each row apart."""
    g, dA = carry
    delta, u, B, C, before, dy, start = inputs
    wide = g.dtype
    B, C = B.astype(wide), C.astype(wide)
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


def _scan_bwd(residuals: tuple[Array | None, ...], cotangents: tuple[Array, Array]) -> tuple[Array | None, ...]:
    """Walks the chunks backwards; states inside a chunk are computed again from the one before it."""
    delta, u, A, B, C, before, starts = residuals
    dy, d_final = cotangents

    def remember(state: Array, inputs: tuple[Array | None, ...]) -> tuple[Array, Array]:
        return _advance(A, state, *inputs), state

    def chunk(
        carry: tuple[Array, Array], inputs: tuple[Array | None, ...]
    ) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        delta, u, B, C, state, dy, starts = inputs
        _, states = jax.lax.scan(remember, state, (delta, u, B, starts))
        return jax.lax.scan(partial(_step_back, A), carry, (delta, u, B, C, states, dy, starts), reverse=True)

    carry = d_final, jnp.zeros_like(d_final)
    (d_initial, dA), by_position = jax.lax.scan(chunk, carry, (delta, u, B, C, before, dy, starts), reverse=True)
    d_delta, du, dB, dC = by_position
    return d_delta, du, dA.sum(0), dB.astype(B.dtype), dC.astype(C.dtype), d_initial, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def selective_scan_xla(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial_state: Array | None,
    starts: Array | None = None,
    *,
    chunk_size: int,
) -> tuple[Array, Array]:
    """Runs the operator of `reference.selective_scan_reference`; arguments and results are the same.

    Args:
      chunk_size: c, positions between two states that are kept for the gradient; l need not be a multiple. Memory for
        states is (l / c + c) b e n numbers.
    """
    batch, length, width = x.shape
    wide = jnp.result_type(delta, A)
    chunk = min(chunk_size, length)
    num_chunks = -(-length // chunk)

    def to_chunks(a: Array) -> Array:
        """[b, l, w] -> [k, c, b, w]; padding has delta = 0, so it neither decays nor adds."""
        a = jnp.pad(a, [(0, 0), (0, num_chunks * chunk - length), (0, 0)])
        return jnp.moveaxis(a.reshape(batch, num_chunks, chunk, -1), 0, 2)

    delta = delta.astype(wide)
    u = delta * x
    if initial_state is None:
        initial_state = jnp.zeros((batch, *A.shape), wide)
    y, final_state = _scan(
        *vary_together(
            to_chunks(delta),
            to_chunks(u),
            A.T.astype(wide),
            to_chunks(B),
            to_chunks(C),
            jnp.swapaxes(initial_state.astype(wide), 1, 2),
            None if starts is None else to_chunks(starts[..., None])[..., 0],
        )
    )
    y = jnp.moveaxis(y, 2, 0).reshape(batch, num_chunks * chunk, width)[:, :length]
    if D is not None:
        y = y + D * x
    return y.astype(x.dtype), jnp.swapaxes(final_state, 1, 2)
