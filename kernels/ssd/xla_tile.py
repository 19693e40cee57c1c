"""State space duality in plain JAX on one tile, some rows times some chunks: dense inside a chunk, states between them.

Axes, with the heads as g groups of r: values [b, k, c, g, r, p], maps [b, k, c, g, n], steps and log decays
[b, k, c, g, r], decays between positions [b, k, g, r, c, c], states [b, g, n, r, p]. Heads stay beside their widths, so
that products with a map or a state are one product for all heads of a group.
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


def _enough(log_decay: Array) -> Array:
    """Cuts log decays where their decay is 0 anyway: sums over one of millions would lose what stands beside it."""
    return jnp.maximum(log_decay, -1024.0 if log_decay.dtype == jnp.float64 else -128.0)


def add_up(a: Array, *, reverse: bool = False, exclusive: bool = False, together: Array | None = None) -> Array:
    """Cumulative sum over the last axis as a product with ones: a few dozen terms, one operation.

    `reverse` sums from the end; `exclusive` leaves the position itself out; `together` [.., c, c] tells which positions
    are summed with which.
    """
    ones = jnp.ones((a.shape[-1], a.shape[-1]), a.dtype)
    triangle = jnp.tril(ones, -int(exclusive)) if reverse else jnp.triu(ones, int(exclusive))
    if together is not None:
        triangle = jnp.where(together, triangle, 0)
    return jnp.matmul(a, triangle, precision=jax.lax.Precision.HIGHEST)


def _sum_width(a: Array) -> Array:
    """Sums over the last axis as a product with ones: on CPUs a reduction fused with the product before it is slow."""
    return jnp.matmul(a, jnp.ones(a.shape[-1], a.dtype), precision=jax.lax.Precision.HIGHEST)


def _sum_heads(a: Array) -> Array:
    """Sums [b, k, g, r, c, c] over r by additions, for the reason given in `_sum_width`."""
    heads = [a[:, :, :, r] for r in range(a.shape[3])]
    return functools.reduce(jnp.add, heads)


class _Decays(NamedTuple):
    """Decay factors of a chunk: between positions [b, k, g, r, c, c], from its start and to its end [b, k, c, g, r]."""

    between: Array
    from_start: Array
    to_end: Array


class _Histories(NamedTuple):
    """Which positions of a chunk share a history with what.

    Attributes:
      together: [b, k, 1, 1, c, c], with which other positions.
      from_start: [b, k, 1, 1, c], with what came before the chunk.
      to_end: [b, k, 1, 1, c], with the chunk's last position.
    """

    together: Array
    from_start: Array
    to_end: Array


def _histories(starts: Array | None) -> _Histories | None:
    """Numbers the histories of each chunk from starts [b, k, c]; 0 is the one that came from before."""
    if starts is None:
        return None
    number = add_up(starts.astype(jnp.float32))[:, :, None, None]
    return _Histories(number[..., :, None] == number[..., None, :], number == 0, number == number[..., -1:])


def _sums_together(histories: _Histories | None) -> Array | None:
    return None if histories is None else histories.together[:, :, 0]


def _reached(log_decay: Array, mask: Array | None) -> Array:
    """Decay factors, 0 where nothing flows. The mask comes before exp, for elsewhere the sums may be anything."""
    return jnp.exp(log_decay if mask is None else jnp.where(mask, log_decay, -jnp.inf))


def _weigh(decay: Array, product: Array, starts: Array | None) -> Array:
    """Multiplies by decay factors; products across histories may overflow where those inside do not."""
    return _reach(decay, decay * product, starts)


def _reach(decay: Array, weighed: Array, starts: Array | None) -> Array:
    """Among several histories, sets what is weighed to 0 where decay factors are."""
    return weighed if starts is None else jnp.where(decay == 0, 0, weighed)


def _cumulative(log_decay: Array, together: Array | None = None) -> tuple[Array, Array]:
    """Sums of log decays [.., c] up to each position, as coarse and fine parts."""
    log_decay = _enough(log_decay)
    coarse = jnp.round(log_decay / _COARSE_STEP) * _COARSE_STEP
    return add_up(coarse, together=together), add_up(log_decay - coarse, together=together)


def _between(parts: tuple[Array, Array], *, transposed: bool = False, together: Array | None = None) -> Array:
    """Decay factors [.., i, j] from position j to i, or [.., j, i]."""
    rows, columns = [part[..., :, None] for part in parts], [part[..., None, :] for part in parts]
    later, sooner = (columns, rows) if transposed else (rows, columns)
    segments = sum(end - start for end, start in zip(later, sooner, strict=True))
    ones = jnp.ones((parts[0].shape[-1],) * 2, bool)
    earlier = jnp.triu(ones, 1) if transposed else jnp.tril(ones, -1)
    if together is not None:
        earlier = earlier & together
    # The mask comes before exp: above the diagonal the sums are positive and overflow for strong decay.
    return jnp.exp(jnp.where(earlier, segments, -jnp.inf))


def decays_between(log_decay: Array) -> Array:
    """Builds decay factors [.., c, c] between steps from log decays [.., c].

    L[i, j] = exp(sum_{k=j+1..i} log_decay_k) for i > j, else 0
    """
    return _between(_cumulative(log_decay))


def _decays(log_decay: Array, histories: _Histories | None, *, transposed: bool = False) -> _Decays:
    # Sums of one history take nothing from another: not its rounding, nor what its strong decay would cancel.
    parts = _cumulative(jnp.moveaxis(log_decay, 2, -1), _sums_together(histories))
    together, from_before, with_last = (None, None, None) if histories is None else histories
    to_end = _reached(sum(part[..., -1:] - part for part in parts), with_last)
    from_start = _reached(sum(parts), from_before)
    between = _between(parts, transposed=transposed, together=together)
    return _Decays(between, jnp.moveaxis(from_start, -1, 2), jnp.moveaxis(to_end, -1, 2))


def _recurrence(state: Array, decay: Array, added: Array, *, reverse: bool = False) -> tuple[Array, Array]:
    """Walks state <- decay state + added over chunks; returns the last state and those before each chunk, [b, k, ..].

    Args:
      state: [b, g, n, r, p]
      decay: [b, k, g, r]
      added: [b, k, g, n, r, p]
    """

    def step(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, added = inputs
        return decay[:, :, None, :, None] * state + added, state

    if decay.shape[1] == 1:
        return step(state, (decay[:, 0], added[:, 0]))[0], state[:, None]
    by_chunk = jnp.moveaxis(decay, 1, 0), jnp.moveaxis(added, 1, 0)
    state, before = jax.lax.scan(step, state, by_chunk, reverse=reverse)
    return state, jnp.moveaxis(before, 0, 1)


def _beside(product: Array, axis: int = 4) -> Array:
    """Moves the position back in front of the heads. `einsum` would swap the factors to spare this, and copy both."""
    return jnp.moveaxis(product, axis, 2)


class Inputs(NamedTuple):
    """What a tile reads; in whole arrays heads and maps lie without groups: [b, l, h, p], [b, l, h] and [b, l, g n].

    Starts are bool [b, k, c], and [b, l] in whole arrays, or None; log decays are 0 there.
    """

    x: Array
    delta: Array
    log_decay: Array
    B: Array
    C: Array
    starts: Array | None

    def u(self) -> Array:
        """Values times steps, in the dtype of the values."""
        return (self.delta[..., None] * self.x).astype(self.x.dtype)


def forward_tile(inputs: Inputs, D: Array, state: Array | None) -> tuple[Array, Array, Array, Array | None]:
    """Runs a tile from the state before it, or from nothing.

    Returns the output, the part of it that comes from before each chunk, the final state and those before each chunk.
    """
    x, delta, log_decay, B, C, starts = inputs
    wide, narrow = delta.dtype, x.dtype
    dot = partial(jnp.einsum, preferred_element_type=wide)
    u = inputs.u()
    decays = _decays(log_decay, _histories(starts))
    scores = dot("bkign,bkjgn->bkgij", C, B)
    mixing = _weigh(decays.between, scores[:, :, :, None], starts).astype(narrow)
    y = _beside(dot("bkgrij,bkjgrp->bkgrip", mixing, u))
    added = dot("bkcgn,bkcgrp->bkgnrp", B, (decays.to_end[..., None] * u).astype(narrow))
    if state is None:
        final, before, from_before = added[:, 0], None, None
    else:
        final, before = _recurrence(state, decays.from_start[:, :, -1], added)
        from_before = _beside(dot("bkcgn,bkgnrp->bkgcrp", C, before.astype(narrow)), 3)
        from_before = _weigh(decays.from_start[..., None], from_before, starts)
        y += from_before
    own = _sum_width(C.astype(wide) * B)[..., None, None]
    return (y + own * u + D[..., None] * x).astype(narrow), from_before, final, before


def _crossing(flows: Array) -> Array:
    """Sums flows [.., j, i] from position j to i over each position t [.., t]: those with j < t <= i.

    Each of them has passed the decay at t. A running sum of what arrives less what leaves would need one sum alone, but
    rounds all that passes elsewhere into a position that nothing passes.
    """
    to_or_beyond = add_up(flows, reverse=True)
    size = flows.shape[-1]
    return jnp.sum(jnp.where(jnp.triu(jnp.ones((size, size), bool), 1), to_or_beyond, 0), axis=-2)


def _inside_backward(inputs: Inputs, between: Array, dy: Array) -> tuple[Array, Array, Array, Array]:
    """What positions of a chunk give to later ones: gradients of u, the log decays [.., c], B and C [b, k, g, c, n].

    Maps between positions are transposed here: what is multiplied from the left has to lie in rows on CPUs.
    """
    u, (_, delta, _, B, C, starts) = inputs.u(), inputs
    narrow, dy_n = u.dtype, dy.astype(u.dtype)
    dot = partial(jnp.einsum, preferred_element_type=delta.dtype)
    scores = dot("bkjgn,bkign->bkgji", B, C)[:, :, :, None]
    d_mixed = _weigh(between, dot("bkjgrp,bkigrp->bkgrji", u, dy_n), starts)
    d_scores = _sum_heads(d_mixed).astype(narrow)
    mixing = _weigh(between, scores, starts).astype(narrow)
    du = _beside(dot("bkgrji,bkigrp->bkgrjp", mixing, dy_n))
    d_log = _crossing(_reach(between, d_mixed * scores, starts))
    return du, d_log, dot("bkgji,bkign->bkgjn", d_scores, C), dot("bkgji,bkjgn->bkgin", d_scores, B)


def _before_backward(
    inputs: Inputs, decays: _Decays, from_before: Array, before: Array, dy: Array, d_after: Array
) -> tuple[Array, Array, Array, Array]:
    """What states before the chunks give to outputs.

    Returns gradients of the state before the tile, of those after each chunk, of the log decays and of C.
    """
    wide, narrow = inputs.delta.dtype, inputs.x.dtype
    dot = partial(jnp.einsum, preferred_element_type=wide)
    dy_from = (decays.from_start[..., None] * dy).astype(narrow)
    asked = dot("bkcgn,bkcgrp->bkgnrp", inputs.C, dy_from)
    chunk_decay = decays.from_start[:, :, -1]
    d_state, d_after = _recurrence(d_after, chunk_decay, asked, reverse=True)
    through = _weigh(chunk_decay, _sum_width(jnp.swapaxes(_sum_width(d_after * before), 3, 4)), inputs.starts)
    arriving = add_up(jnp.moveaxis(_sum_width(dy * from_before), 2, -1), reverse=True)
    return d_state, d_after, arriving + through[..., None], dot("bkcgrp,bkgnrp->bkgcn", dy_from, before.astype(narrow))


def _after_backward(inputs: Inputs, decays: _Decays, d_after: Array) -> tuple[Array, Array, Array]:
    """What positions give to the state after their chunk: gradients of u, the log decays and B."""
    u, wide, narrow = inputs.u(), inputs.delta.dtype, inputs.x.dtype
    dot = partial(jnp.einsum, preferred_element_type=wide)
    d_after = d_after.astype(narrow)
    du = _beside(dot("bkcgn,bkgnrp->bkgcrp", inputs.B, d_after), 3)
    du = _weigh(decays.to_end[..., None], du, inputs.starts)
    d_log = add_up(jnp.moveaxis(_sum_width(du * u), 2, -1), exclusive=True)
    return du, d_log, dot("bkcgrp,bkgnrp->bkgcn", (decays.to_end[..., None] * u).astype(narrow), d_after)


def backward_tile(
    inputs: Inputs, D: Array, from_before: Array | None, before: Array | None, dy: Array, d_after: Array | None
) -> tuple[tuple[Array, ...], Array | None]:
    """Gradient of `forward_tile`.

    The gradient of a log decay is all that flows over its position, from before it to it or later: sums of what has
    been decayed there alone, so that after a large step they are as small as they should be.

    Args:
      from_before, before: the second and last results of `forward_tile`.
      dy: gradient of the output.
      d_after: gradient of the final state, or None for zeros where `before` is None.

    Returns:
      Gradients of x, delta, log_decay, B, C and, at each position, of D; and of the state before the tile.
    """
    x, delta, log_decay, B, C, starts = inputs
    decays = _decays(log_decay, _histories(starts), transposed=True)
    du, d_log, dB, dC = _inside_backward(inputs, decays.between, dy)
    d_state = None
    if before is not None:
        d_state, d_after, d_log_before, dC_before = _before_backward(inputs, decays, from_before, before, dy, d_after)
        d_log, dC = d_log + d_log_before, dC + dC_before
    elif d_after is not None:
        d_after = d_after[:, None]
    if d_after is not None:
        beyond = _after_backward(inputs, decays, d_after)
        du, d_log, dB = du + beyond[0], d_log + beyond[1], dB + beyond[2]
    # What a position gives to itself.
    own, dy_x = _sum_width(C.astype(delta.dtype) * B)[..., None], _sum_width(dy * x)
    d_own = _sum_width(delta * dy_x)[..., None]
    du, dB, dC = du + own[..., None] * dy, _beside(dB, 3) + d_own * C, _beside(dC, 3) + d_own * B
    dx = delta[..., None] * du + D[..., None] * dy
    return (dx, _sum_width(du * x), jnp.moveaxis(d_log, -1, 2), dB, dC, dy_x), d_state
