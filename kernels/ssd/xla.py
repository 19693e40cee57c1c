"""State space duality in plain JAX: dense inside a chunk, a short recurrence of states between chunks.

The inner function works on u = delta x and log decays a = delta A, cut into k chunks of c positions, with the heads
as g groups of r. Axes: values [b, k, g, r, c, p], maps [b, k, g, c, n], log decays [b, k, g, r, c], states
[b, g, r, p, n].
"""

import functools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Log-decays are split into multiples of this and a remainder. Sums of multiples are exact in float32, so that a
# difference of two long sums (strong decay reaches thousands) keeps the absolute error of the remainders alone.
_COARSE_STEP = 1.0 / 64.0


def _add_up(a: Array, *, reverse: bool = False, exclusive: bool = False) -> Array:
    """Cumulative sum over the last axis as a product with ones: a few dozen terms, one operation.

    `reverse` sums from the end; `exclusive` leaves the position itself out.
    """
    ones = jnp.ones((a.shape[-1], a.shape[-1]), a.dtype)
    triangle = jnp.tril(ones, -int(exclusive)) if reverse else jnp.triu(ones, int(exclusive))
    return jnp.matmul(a, triangle, precision=jax.lax.Precision.HIGHEST)


def _sum_width(a: Array) -> Array:
    """Sums over the last axis as a product with ones: on CPUs a reduction fused with the product before it is slow."""
    return jnp.matmul(a, jnp.ones(a.shape[-1], a.dtype), precision=jax.lax.Precision.HIGHEST)


def _sum_heads(a: Array) -> Array:
    """Sums [b, k, g, r, c, c] over r by additions, for the reason given in `_sum_width`."""
    heads = [a[:, :, :, r] for r in range(a.shape[3])]
    return functools.reduce(jnp.add, heads)


class _Decays(NamedTuple):
    """Decay factors of a chunk: between a position and earlier ones [.., c, c], from its start, to its end [.., c]."""

    between: Array
    from_start: Array
    to_end: Array


def _cumulative(log_decay: Array) -> tuple[Array, Array]:
    """Sums of log decays [.., c] up to each position, as coarse and fine parts."""
    coarse = jnp.round(log_decay / _COARSE_STEP) * _COARSE_STEP
    return _add_up(coarse), _add_up(log_decay - coarse)


def _between(parts: tuple[Array, Array]) -> Array:
    segments = sum(part[..., :, None] - part[..., None, :] for part in parts)
    earlier = jnp.tril(jnp.ones((parts[0].shape[-1],) * 2, bool), -1)
    # The mask comes before exp: above the diagonal the sums are positive and overflow for strong decay.
    return jnp.exp(jnp.where(earlier, segments, -jnp.inf))


def decays_between(log_decay: Array) -> Array:
    """Builds decay factors [.., c, c] between steps from log decays [.., c].

    L[i, j] = exp(sum_{k=j+1..i} log_decay_k) for i > j, else 0
    """
    return _between(_cumulative(log_decay))


def _decays(log_decay: Array) -> _Decays:
    parts = _cumulative(log_decay)
    return _Decays(_between(parts), jnp.exp(sum(parts)), jnp.exp(sum(part[..., -1:] - part for part in parts)))


def _carry(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
    """One step of the recurrence between chunks; emits the state before the chunk."""
    decay, added = inputs
    return decay[..., None, None] * state + added, state


def _forward(u: Array, log_decay: Array, B: Array, C: Array, state: Array) -> tuple[Array, Array, Array]:
    """Returns what outputs [b, k, g, r, c, p] have from before, the final state, and the states before each chunk
    [k, b, g, r, p, n].
    """
    wide = log_decay.dtype
    dot = partial(jnp.einsum, preferred_element_type=wide)
    decays = _decays(log_decay)
    scores = dot("bkgin,bkgjn->bkgij", C, B)
    y = dot("bkgrij,bkgrjp->bkgrip", (decays.between * scores[:, :, :, None]).astype(u.dtype), u)
    added = dot("bkgrcp,bkgcn->bkgrpn", (decays.to_end[..., None] * u).astype(u.dtype), B)
    by_chunk = (jnp.moveaxis(decays.from_start[..., -1], 1, 0), jnp.moveaxis(added, 1, 0))
    final_state, before = jax.lax.scan(_carry, state, by_chunk)
    carried = dot("bkgcn,kbgrpn->bkgrcp", C, before.astype(C.dtype))
    return y + decays.from_start[..., None] * carried, final_state, before


@jax.custom_vjp
def _chunked(u: Array, log_decay: Array, B: Array, C: Array, state: Array) -> tuple[Array, Array]:
    """Returns what outputs have from earlier positions and the initial state, and the final state.

    Its gradient keeps no [c, c] array and recomputes them. What a position gives to itself is added outside.
    """
    y, final_state, _ = _forward(u, log_decay, B, C, state)
    return y, final_state


def _chunked_fwd(*inputs: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    y, final_state, before = _forward(*inputs)
    return (y, final_state), (*inputs[:-1], y, before)


def _chunked_bwd(residuals: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Array, ...]:
    """Gradient of `_chunked`.

    The gradient of a log decay is all that flows over its position, from before it to it or later. With G = dy u^T and
    M = L o (C B^T) below the diagonal, the sums over rows and columns of G o M that it needs are dy . y and du . u at
    each position, so no [c, c] array is reduced for them. The diagonal would cancel there, but under strong decay it is
    nearly everything and its rounding would bury the rest; so each flow is also summed from the side where it is small.
    """
    u, log_decay, B, C, y, before = residuals
    dy, d_final = cotangents
    wide, narrow = log_decay.dtype, u.dtype
    dot = partial(jnp.einsum, preferred_element_type=wide)
    decays = _decays(log_decay)
    dy_n = dy.astype(narrow)
    # States: what a chunk's outputs ask of the state before it, carried backwards through the recurrence.
    asked = dot("bkgrcp,bkgcn->kbgrpn", (decays.from_start[..., None] * dy).astype(narrow), C)
    chunk_decay = jnp.moveaxis(decays.from_start[..., -1], 1, 0)
    d_initial, d_after = jax.lax.scan(_carry, d_final.astype(wide), (chunk_decay, asked), reverse=True)
    # Inside the chunk.
    scores = dot("bkgin,bkgjn->bkgij", C, B)
    d_mixed = dot("bkgrip,bkgrjp->bkgrij", dy_n, u)
    d_scores = _sum_heads(d_mixed * decays.between).astype(narrow)
    du_inside = dot("bkgrij,bkgrip->bkgrjp", (decays.between * scores[:, :, :, None]).astype(narrow), dy_n)
    dB = dot("bkgij,bkgin->bkgjn", d_scores, C)
    dC = dot("bkgij,bkgjn->bkgin", d_scores, B)
    # Between chunks.
    d_after_n = d_after.astype(narrow)
    du_beyond = decays.to_end[..., None] * dot("bkgcn,kbgrpn->bkgrcp", B, d_after_n)
    dB = dB + dot("bkgrcp,kbgrpn->bkgcn", (decays.to_end[..., None] * u).astype(narrow), d_after_n)
    dC = dC + dot("bkgrcp,kbgrpn->bkgcn", (decays.from_start[..., None] * dy).astype(narrow), before.astype(narrow))
    # Log decays: flows that end inside the chunk, that start inside and leave it, and that pass through all of it.
    d_log_decay = _add_up(_sum_width(dy * y - du_inside * u), reverse=True)
    d_log_decay += _add_up(_sum_width(du_beyond * u), exclusive=True)
    through = chunk_decay * jnp.einsum("kbgrpn,kbgrpn->kbgr", d_after, before)
    d_log_decay += jnp.moveaxis(through, 0, 1)[..., None]
    return (du_inside + du_beyond).astype(narrow), d_log_decay, dB.astype(B.dtype), dC.astype(C.dtype), d_initial


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def ssd_xla(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial_state: Array | None,
    *,
    chunk_size: int,
) -> tuple[Array, Array]:
    """Runs the operator of `reference.ssd_reference` in chunks; arguments and results are the same.

    Args:
      chunk_size: c, positions handled densely at once; l need not be a multiple.
    """
    batch, length, heads, width = x.shape
    groups, state_width = B.shape[2:]
    per_group = (groups, heads // groups)
    chunk = min(chunk_size, length)
    num_chunks = -(-length // chunk)

    def to_chunks(a: Array, heads_axes: tuple[int, ...]) -> Array:
        """[b, l, ...] -> [b, k, *heads_axes, c, ...]; padding has delta = 0, so it neither decays nor adds."""
        a = jnp.pad(a, [(0, 0), (0, num_chunks * chunk - length)] + [(0, 0)] * (a.ndim - 2))
        a = a.reshape(batch, num_chunks, chunk, *heads_axes, *a.shape[3:])
        return jnp.moveaxis(a, 2, 2 + len(heads_axes))

    wide = delta.dtype
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, width, state_width), wide)
    u = (delta[..., None] * x).astype(x.dtype)
    y, final_state = _chunked(
        to_chunks(u, per_group),
        to_chunks(delta * A, per_group),
        to_chunks(B, (groups,)),
        to_chunks(C, (groups,)),
        initial_state.astype(wide).reshape(batch, *per_group, width, state_width),
    )
    y = jnp.moveaxis(y, 4, 2).reshape(batch, num_chunks * chunk, heads, width)[:, :length]
    own = jnp.einsum("blgn,blgn->blg", C, B, preferred_element_type=wide)
    y = y + jnp.repeat(own, heads // groups, axis=2)[..., None] * u
    if D is not None:
        y = y + D[:, None] * x
    return y.astype(x.dtype), final_state.reshape(batch, heads, width, state_width)


def ssd_last_xla(x: Array, delta: Array, A: Array, B: Array, C_last: Array, D: Array | None, last: Array) -> Array:
    """Reads the operator's output at one position a row, at linear cost.

      y_T = sum_{j<=T} exp(A * sum_{k=j+1..T} delta_k) delta_j (C_T . B_j) x_j + D x_T

    Args:
      x, delta, A, B, D: as in `reference.ssd_reference`; delta must be 0 after position `last`.
      C_last: [b, g, n] output map at the read position.
      last: int [b] read position T.

    Returns:
      [b, h, p] in the dtype of x.
    """
    heads, groups = x.shape[2], B.shape[2]
    steps = jnp.moveaxis(delta, 1, 2)
    log_decay = steps * A[:, None]
    # What is still to be decayed after position j: summed without j, for a difference of sums cancels badly.
    decay = jnp.exp(_add_up(log_decay, reverse=True, exclusive=True))
    scores = jnp.einsum("bgn,blgn->bgl", C_last, B, preferred_element_type=decay.dtype)
    weights = decay * steps * jnp.repeat(scores, heads // groups, axis=1)
    y = jnp.einsum("bhl,blhp->bhp", weights.astype(x.dtype), x, preferred_element_type=decay.dtype)
    if D is not None:
        y = y + D[:, None] * jnp.take_along_axis(x, last[:, None, None, None], axis=1)[:, 0]
    return y.astype(x.dtype)
