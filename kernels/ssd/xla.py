"""State space duality in plain JAX: a loop over tiles, each some rows times some chunks.

Inside a chunk everything is dense, between chunks go states. Axes of a tile, with the heads as g groups of r: values
[b, k, c, g, r, p], maps [b, k, c, g, n], steps and log decays [b, k, c, g, r], decays between positions
[b, k, g, r, c, c], states [b, g, n, r, p]. Heads stay beside their widths, so that products with a map or a state are
one product for all heads of a group.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from kernels.decays import between_sums, cumsum_matmul, cumulative_log_decay, step_size
from kernels.dispatch import Precision, matmul_precision, precision_name, pvary_together
from kernels.segment_ids import history_starts, real_positions
from kernels.ssd.config import DEFAULT_CHUNK_SIZE


def _sum_last(a: Array) -> Array:
    """Sums over the last axis as a product with ones: on CPUs a reduction fused with the product before it is slow."""
    return jnp.matmul(a, jnp.ones(a.shape[-1], a.dtype), precision=jax.lax.Precision.HIGHEST)


def _sum_heads(a: Array) -> Array:
    """Sums [b, k, g, r, c, c] over r by additions, for the reason given in `_sum_last`."""
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
    number = cumsum_matmul(starts.astype(jnp.float32))[:, :, None, None]
    return _Histories(number[..., :, None] == number[..., None, :], number == 0, number == number[..., -1:])


def _sums_together(histories: _Histories | None) -> Array | None:
    return None if histories is None else histories.together[:, :, 0]


def _decay_factor(log_decay: Array, mask: Array | None) -> Array:
    """Decay factors, 0 where nothing flows. The mask comes before exp, for elsewhere the sums may be anything."""
    return jnp.exp(log_decay if mask is None else jnp.where(mask, log_decay, -jnp.inf))


def _apply_decay(decay: Array, product: Array, starts: Array | None) -> Array:
    """Multiplies by decay factors; products across histories may overflow where those inside do not."""
    return _mask_by_decay(decay, decay * product, starts)


def _mask_by_decay(decay: Array, weighed: Array, starts: Array | None) -> Array:
    """Among several histories, sets what is weighed to 0 where decay factors are."""
    return weighed if starts is None else jnp.where(decay == 0, 0, weighed)


def _decays(log_decay: Array, histories: _Histories | None, *, transposed: bool = False) -> _Decays:
    # Sums of one history take nothing from another: not its rounding, nor what its strong decay would cancel.
    parts = cumulative_log_decay(jnp.moveaxis(log_decay, 2, -1), _sums_together(histories))
    together, from_before, with_last = (None, None, None) if histories is None else histories
    to_end = _decay_factor(cast(Array, sum(part[..., -1:] - part for part in parts)), with_last)
    from_start = _decay_factor(cast(Array, sum(parts)), from_before)
    between = between_sums(parts, transposed=transposed, together=together)
    return _Decays(between, jnp.moveaxis(from_start, -1, 2), jnp.moveaxis(to_end, -1, 2))


def _recurrence(state: Array, decay: Array, state_update: Array, *, reverse: bool = False) -> tuple[Array, Array]:
    """Runs state <- decay state + state_update over chunks; returns the last state and those before each, [b, k, ..].

    Args:
      state: [b, g, n, r, p]
      decay: [b, k, g, r]
      state_update: [b, k, g, n, r, p]
    """

    def step(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, state_update = inputs
        return decay[:, :, None, :, None] * state + state_update, state

    if decay.shape[1] == 1:
        return step(state, (decay[:, 0], state_update[:, 0]))[0], state[:, None]
    by_chunk = jnp.moveaxis(decay, 1, 0), jnp.moveaxis(state_update, 1, 0)
    state, before = jax.lax.scan(step, state, by_chunk, reverse=reverse)
    return state, jnp.moveaxis(before, 0, 1)


def _heads_last(product: Array, axis: int = 4) -> Array:
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


def _einsum(inputs: Inputs) -> Callable[..., Array]:
    """Returns `jnp.einsum` with sums in the dtype of the step size.

    XLA for CPUs (jaxlib 0.10) compiles products of bfloat16 factors in several groups and cannot run them: there the
    factors are widened, which changes no product.
    """
    accum = inputs.delta.dtype
    if inputs.B.shape[3] == 1 or jax.default_backend() != "cpu":
        return partial(jnp.einsum, preferred_element_type=accum)
    return lambda spec, *factors: jnp.einsum(spec, *(factor.astype(accum) for factor in factors))


def forward_tile(inputs: Inputs, D: Array, state: Array | None) -> tuple[Array, Array | None, Array, Array | None]:
    """Runs a tile from the state before it, or from nothing.

    Returns the output, the part of it that comes from before each chunk, the final state and those before each chunk.
    """
    x, delta, log_decay, B, C, starts = inputs
    accum, compute = delta.dtype, x.dtype
    dot = _einsum(inputs)
    u = inputs.u()
    decays = _decays(log_decay, _histories(starts))
    scores = dot("bkign,bkjgn->bkgij", C, B)
    mixing = _apply_decay(decays.between, scores[:, :, :, None], starts).astype(compute)
    y = _heads_last(dot("bkgrij,bkjgrp->bkgrip", mixing, u))
    state_update = dot("bkcgn,bkcgrp->bkgnrp", B, (decays.to_end[..., None] * u).astype(compute))
    if state is None:
        final, before, from_before = state_update[:, 0], None, None
    else:
        final, before = _recurrence(state, decays.from_start[:, :, -1], state_update)
        from_before = _heads_last(dot("bkcgn,bkgnrp->bkgcrp", C, before.astype(compute)), 3)
        from_before = _apply_decay(decays.from_start[..., None], from_before, starts)
        y += from_before
    own = _sum_last(C.astype(accum) * B)[..., None, None]
    return (y + own * u + D[..., None] * x).astype(compute), from_before, final, before


def _crossing(flows: Array, between: Array, starts: Array | None) -> Array:
    """Sums flows [.., j, i] from position j to i over each position t [.., t]: those with j < t <= i.

    Each of them has passed the decay at t. A running sum of what arrives less what leaves would need one sum alone, but
    rounds all that passes elsewhere into a position that nothing passes.
    """
    # In other histories running sums hold 0 or, of what has overflowed, no number.
    to_or_beyond = _mask_by_decay(between, cumsum_matmul(flows, reverse=True), starts)
    size = flows.shape[-1]
    return jnp.sum(jnp.where(jnp.triu(jnp.ones((size, size), bool), 1), to_or_beyond, 0), axis=-2)


def _inside_backward(inputs: Inputs, between: Array, dy: Array) -> tuple[Array, Array, Array, Array]:
    """What positions of a chunk give to later ones: gradients of u, the log decays [.., c], B and C [b, k, g, c, n].

    Maps between positions are transposed here: what is multiplied from the left has to lie in rows on CPUs.
    """
    u, (*_, B, C, starts) = inputs.u(), inputs
    compute, dy_n = u.dtype, dy.astype(u.dtype)
    dot = _einsum(inputs)
    scores = dot("bkjgn,bkign->bkgji", B, C)[:, :, :, None]
    d_mixed = _apply_decay(between, dot("bkjgrp,bkigrp->bkgrji", u, dy_n), starts)
    d_scores = _sum_heads(d_mixed).astype(compute)
    mixing = _apply_decay(between, scores, starts).astype(compute)
    du = _heads_last(dot("bkgrji,bkigrp->bkgrjp", mixing, dy_n))
    d_log = _crossing(_mask_by_decay(between, d_mixed * scores, starts), between, starts)
    return du, d_log, dot("bkgji,bkign->bkgjn", d_scores, C), dot("bkgji,bkjgn->bkgin", d_scores, B)


def _before_backward(
    inputs: Inputs, decays: _Decays, from_before: Array, before: Array, dy: Array, d_after: Array
) -> tuple[Array, Array, Array, Array]:
    """What states before the chunks give to outputs.

    Returns gradients of the state before the tile, of those after each chunk, of the log decays and of C.
    """
    compute = inputs.x.dtype
    dot = _einsum(inputs)
    dy_from = (decays.from_start[..., None] * dy).astype(compute)
    state_cotangent = dot("bkcgn,bkcgrp->bkgnrp", inputs.C, dy_from)
    chunk_decay = decays.from_start[:, :, -1]
    d_state, d_after = _recurrence(d_after, chunk_decay, state_cotangent, reverse=True)
    through = _apply_decay(chunk_decay, _sum_last(jnp.swapaxes(_sum_last(d_after * before), 3, 4)), inputs.starts)
    arriving = cumsum_matmul(jnp.moveaxis(_sum_last(dy * from_before), 2, -1), reverse=True)
    arriving = _mask_by_decay(jnp.moveaxis(decays.from_start, 2, -1), arriving, inputs.starts)
    return d_state, d_after, arriving + through[..., None], dot("bkcgrp,bkgnrp->bkgcn", dy_from, before.astype(compute))


def _after_backward(inputs: Inputs, decays: _Decays, d_after: Array) -> tuple[Array, Array, Array]:
    """What positions give to the state after their chunk: gradients of u, the log decays and B."""
    u, compute = inputs.u(), inputs.x.dtype
    dot = _einsum(inputs)
    d_after = d_after.astype(compute)
    du = _heads_last(dot("bkcgn,bkgnrp->bkgcrp", inputs.B, d_after), 3)
    du = _apply_decay(decays.to_end[..., None], du, inputs.starts)
    d_log = cumsum_matmul(jnp.moveaxis(_sum_last(du * u), 2, -1), exclusive=True)
    d_log = _mask_by_decay(jnp.moveaxis(decays.to_end, 2, -1), d_log, inputs.starts)
    return du, d_log, dot("bkcgrp,bkgnrp->bkgcn", (decays.to_end[..., None] * u).astype(compute), d_after)


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
        assert from_before is not None and d_after is not None  # Both come with it.
        d_state, d_after, d_log_before, dC_before = _before_backward(inputs, decays, from_before, before, dy, d_after)
        d_log, dC = d_log + d_log_before, dC + dC_before
    elif d_after is not None:
        d_after = d_after[:, None]
    if d_after is not None:
        beyond = _after_backward(inputs, decays, d_after)
        du, d_log, dB = du + beyond[0], d_log + beyond[1], dB + beyond[2]
    # What a position gives to itself.
    own, dy_x = _sum_last(C.astype(delta.dtype) * B)[..., None], _sum_last(dy * x)
    d_own = _sum_last(delta * dy_x)[..., None]
    du, dB, dC = du + own[..., None] * dy, _heads_last(dB, 3) + d_own * C, _heads_last(dC, 3) + d_own * B
    dx = delta[..., None] * du + D[..., None] * dy
    return (dx, _sum_last(du * x), jnp.moveaxis(d_log, -1, 2), dB, dC, dy_x), d_state


class _Tiling(NamedTuple):
    """How the work is divided: tiles of `rows` times `chunks` chunks of `chunk` positions, and how many of them.

    `precision` is that of products.
    """

    chunk: int
    rows: int
    chunks: int
    row_tiles: int
    steps: int
    precision: str | None


class _TileIndex(NamedTuple):
    """Where a tile lies, and whether it is the first or the last of its rows.

    A tile that would reach beyond the end is moved back: whole rows are then done twice, and of positions `fresh` tells
    which no earlier tile has done.
    """

    number: Array | int
    row: Array | int
    start: Array | int
    first: Array | bool
    last: Array | bool
    fresh: Array | None


# Values in the largest array of a tile: what is made of a tile should stay in a CPU's cache.
_TILE_VALUES = 2**17


def _near_divisor(length: int, chunk: int) -> int:
    """Returns the largest divisor of the length within a quarter of the chunk, or the chunk: padding is work, too."""
    near = range(chunk + chunk // 4, chunk - chunk // 4 - 1, -1)
    return next((c for c in near if length % c == 0), chunk)


def _tiling(
    batch: int, length: int, heads: int, widths: tuple[int, int], chunk_size: int, precision: str | None
) -> _Tiling:
    """Chooses the tiles.

    On CPUs each operation on whole arrays would go through memory, and through memory that the system has to hand out
    anew at every run. Elsewhere one tile is everything, for small ones would leave a GPU idle.
    """
    on_cpu = jax.default_backend() == "cpu"
    chunk = _near_divisor(length, min(chunk_size, length)) if on_cpu else min(chunk_size, length)
    rows, chunks = batch, -(-length // chunk)
    if on_cpu:
        fit = max(1, _TILE_VALUES // (heads * chunk * max(chunk, *widths)))
        rows = -(-batch // -(-batch // fit))
        most = min(chunks, max(1, fit // rows))
        # Tiles that do not divide the length overlap, which is work done twice.
        chunks = next((n for n in range(most, most // 2, -1) if chunks % n == 0), most)
    return _Tiling(chunk, rows, chunks, -(-batch // rows), -(-length // (chunk * chunks)), precision)


def _take(a: Array, tiling: _Tiling, at: _TileIndex) -> Array:
    """Reads a tile of [b, l, ...] as [rows, chunks, chunk, ...]."""
    width = tiling.chunks * tiling.chunk
    if (tiling.rows, width) != a.shape[:2]:
        a = jax.lax.dynamic_slice(a, (at.row, at.start) + (0,) * (a.ndim - 2), (tiling.rows, width, *a.shape[2:]))
    return a.reshape(tiling.rows, tiling.chunks, tiling.chunk, *a.shape[2:])


def _by_group(a: Array, groups: int) -> Array:
    """Splits the heads, or the maps that lie one after the other, into groups: axis 3 of a tile."""
    return a.reshape(*a.shape[:3], groups, -1, *a.shape[4:])


def _put(whole: Array, tile: Array, at: _TileIndex) -> Array:
    """Writes a tile back."""
    tile = tile.reshape(tile.shape[0], -1, *whole.shape[2:]).astype(whole.dtype)
    if tile.shape == whole.shape:
        return tile
    return jax.lax.dynamic_update_slice(whole, tile, (at.row, at.start) + (0,) * (whole.ndim - 2))


def _put_rows(whole: Array, tile: Array, row: Array | int) -> Array:
    """Writes rows of states."""
    if tile.shape == whole.shape:
        return tile
    return jax.lax.dynamic_update_slice(whole, tile, (row,) + (0,) * (whole.ndim - 1))


def _tile_index(tiling: _Tiling, batch: int, length: int, index: Array | int) -> _TileIndex:
    row, step = index // tiling.steps, index % tiling.steps
    if tiling.row_tiles == 1:
        row, step = 0, index
    if tiling.steps == 1:
        row, step = index, 0
    width = tiling.chunks * tiling.chunk
    start, fresh = step * width, None
    if length % width:
        start = jnp.minimum(start, length - width)
        fresh = (start + jnp.arange(width) >= step * width).reshape(1, tiling.chunks, tiling.chunk, 1, 1)
    row *= tiling.rows
    if batch % tiling.rows:
        row = jnp.minimum(row, batch - tiling.rows)
    return _TileIndex(index, row, start, step == 0, step == tiling.steps - 1, fresh)


def _read(inputs: Inputs, tiling: _Tiling, at: _TileIndex, groups: int) -> Inputs:
    """Reads a tile of the inputs."""
    starts = None if inputs.starts is None else _take(inputs.starts, tiling, at)
    x, delta, log_decay, B, C = (_by_group(_take(a, tiling, at), groups) for a in inputs[:5])
    tile = Inputs(x, delta, log_decay, B, C, starts)
    if at.fresh is not None:
        # Positions done before neither decay nor add, and no history begins there.
        tile = tile._replace(
            delta=jnp.where(at.fresh, tile.delta, 0),
            log_decay=jnp.where(at.fresh, tile.log_decay, 0),
            starts=None if starts is None else starts & at.fresh[..., 0, 0],
        )
    return tile


def _rows(a: Array, tiling: _Tiling, at: _TileIndex) -> Array:
    """Reads the tile's rows of states."""
    return a if a.shape[0] == tiling.rows else jax.lax.dynamic_slice_in_dim(a, at.row, tiling.rows)


def _loop(
    tiling: _Tiling, x: Array, body: Callable[[_TileIndex, Any], Any], carry: Any, *, reverse: bool = False
) -> Any:
    """Runs `carry = body(at, carry)` for every tile of x [b, l, h, p] in turn, rows of tiles after one another."""
    tiles = tiling.row_tiles * tiling.steps

    batch, length = x.shape[:2]

    def step(index: Array | int, carry: Any) -> Any:
        return body(_tile_index(tiling, batch, length, tiles - 1 - index if reverse else index), carry)

    with matmul_precision(tiling.precision):
        return step(0, carry) if tiles == 1 else jax.lax.fori_loop(0, tiles, step, carry)


def _state_shape(inputs: Inputs, D: Array) -> tuple[int, ...]:
    """[b, g, n, r, p]"""
    groups, per_group = D.shape
    return inputs.x.shape[0], groups, inputs.B.shape[-1] // groups, per_group, inputs.x.shape[-1]


def _zeros(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """Zeros to be carried: under shard_map they have to differ over the same mesh axes as what is written into them."""
    return pvary_together(jnp.zeros(shape, dtype), like)[0]


def _arriving(whole: Array, carried: Array | None, tiling: _Tiling, at: _TileIndex, begins: Array | bool) -> Array:
    """The state that comes into a tile: the carried one, or that of `whole` where the loop over its rows begins."""
    if carried is None:
        return _rows(whole, tiling, at)
    return carried if tiling.row_tiles == 1 else jnp.where(begins, _rows(whole, tiling, at), carried)


def _carried(whole: Array | None, tiling: _Tiling) -> Array | None:
    """The state to carry from tile to tile at the start of the loop, if rows have several tiles."""
    return whole[: tiling.rows] if whole is not None and tiling.steps > 1 else None


def _forward(
    tiling: _Tiling, inputs: Inputs, D: Array, state: Array | None, *, keep: bool
) -> tuple[Array, Array, Array | None, Array | None]:
    """Runs all tiles.

    Returns the output, the final state and, with `keep`, what the gradient reads besides the inputs, if any chunk has
    something before it: the output's part from there, and the states before each chunk of each tile.
    """
    x, groups, accum = inputs.x, D.shape[0], inputs.delta.dtype
    state_shape = _state_shape(inputs, D)
    chained = tiling.steps * tiling.chunks > 1 or state is not None
    if chained and state is None:
        state = _zeros(state_shape, accum, x)
    by_tile = (tiling.row_tiles * tiling.steps, tiling.rows, tiling.chunks, *state_shape[1:])
    buffers = (
        _zeros(x.shape, x.dtype, x),
        _zeros(state_shape, accum, x),
        _zeros(x.shape, accum, x) if keep and chained else None,
        _zeros(by_tile, accum, x) if keep and chained else None,
        _carried(state, tiling),
    )

    def body(at: _TileIndex, carry: tuple[Any, ...]) -> tuple[Array | None, ...]:
        y_whole, final, from_before_whole, befores, carried = carry
        outputs = [y_whole, from_before_whole]
        before = _arriving(state, carried, tiling, at, at.first) if state is not None else None
        y, from_before, after, before = forward_tile(_read(inputs, tiling, at, groups), D, before)
        for index, tile in enumerate((y, from_before)):
            if outputs[index] is not None and tile is not None:
                if at.fresh is not None:
                    done = _by_group(_take(outputs[index], tiling, at), groups)
                    tile = jnp.where(at.fresh[..., None], tile, done)
                outputs[index] = _put(outputs[index], tile, at)
        final = _put_rows(final, after, at.row)
        if befores is not None and before is not None:
            befores = _put_rows(befores, before[None], at.number)
        return outputs[0], final, outputs[1], befores, None if carried is None else after

    return _loop(tiling, x, body, buffers)[:4]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    tiling: _Tiling,
    x: Array,
    delta: Array,
    log_decay: Array,
    B: Array,
    C: Array,
    starts: Array | None,
    D: Array,
    state: Array | None,
) -> tuple[Array, Array]:
    """Returns the output and the final state; its gradient keeps no [c, c] array and recomputes them.

    D is [g, r] and the state [b, g, n, r, p], or None for zeros.
    """
    return _forward(tiling, Inputs(x, delta, log_decay, B, C, starts), D, state, keep=False)[:2]


def _chunked_fwd(tiling: _Tiling, *arguments: Any) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    # With symbolic zeros each argument is wrapped, and None is not.
    values: list[Any] = [None if a is None else a.value for a in arguments]
    inputs, (D, state) = Inputs(*values[:6]), values[6:]
    y, final, from_before, befores = _forward(tiling, inputs, D, state, keep=True)
    return (y, final), (inputs, D, state is None, from_before, befores)


def _chunked_bwd(tiling: _Tiling, residuals: tuple[Any, ...], cotangents: tuple[Any, Any]) -> tuple[Array | None, ...]:
    inputs, D, from_nothing, from_before, befores = residuals
    dy, d_final = cotangents
    x, groups, accum = inputs.x, D.shape[0], inputs.delta.dtype
    state_shape = _state_shape(inputs, D)
    if isinstance(dy, SymbolicZero):
        dy = _zeros(x.shape, x.dtype, x)
    if isinstance(d_final, SymbolicZero):
        # A row of one chunk whose state nobody reads has nothing to do with states at all.
        d_final = None if befores is None else _zeros(state_shape, accum, x)
    buffers = (
        *(_zeros(a.shape, a.dtype, x) for a in inputs[:5]),
        _zeros(inputs.delta.shape, accum, x),
        None if from_nothing else _zeros(state_shape, accum, x),
        _carried(d_final, tiling),
    )

    def body(at: _TileIndex, carry: tuple[Any, ...]) -> tuple[Array | None, ...]:
        *gradients, d_initial, carried = carry
        dy_tile = _by_group(_take(dy, tiling, at), groups)
        from_before_tile = None if from_before is None else _by_group(_take(from_before, tiling, at), groups)
        if at.fresh is not None:
            # Gradients at the other positions are written over later.
            dy_tile = jnp.where(at.fresh[..., None], dy_tile, 0)
        before = None if befores is None else jax.lax.dynamic_index_in_dim(befores, at.number, keepdims=False)
        d_after = None if d_final is None else _arriving(d_final, carried, tiling, at, at.last)
        tile = _read(inputs, tiling, at, groups)
        tiles, d_state = backward_tile(tile, D, from_before_tile, before, dy_tile, d_after)
        gradients = [_put(a, tile, at) for a, tile in zip(gradients, tiles, strict=True)]
        if d_initial is not None and d_state is not None:
            d_initial = _put_rows(d_initial, d_state, at.row)
        return *gradients, d_initial, None if carried is None else d_state

    *gradients, dD, d_initial, _ = _loop(tiling, x, body, buffers, reverse=True)
    return *gradients, None, jnp.sum(dD, axis=(0, 1)).reshape(D.shape).astype(D.dtype), d_initial


_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)


def ssd_xla(
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
    precision: Precision = None,
) -> tuple[Array, Array]:
    """Runs the operator in chunks; arguments and results are those of `reference.ssd_reference`.

    Args:
      chunk_size: c, positions handled densely at once; l need not be a multiple. On a CPU a near divisor of l is taken.
    """
    batch, length, heads, width = x.shape
    groups, state_width = B.shape[2:]
    per_group = (groups, heads // groups)
    delta, starts = step_size(dt, dt_bias, real_positions(segment_ids)), history_starts(segment_ids)
    tiling = _tiling(batch, length, heads, (width, state_width), chunk_size, precision_name(precision))
    accum = delta.dtype

    padding = max(0, tiling.chunk * tiling.chunks - length)

    def padded(a: Array) -> Array:
        """Positions of padding have delta = 0: they neither decay nor add."""
        return jnp.pad(a, [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2)) if padding else a

    D = (jnp.zeros(heads, accum) if D is None else D).reshape(per_group)
    state = None
    if initial_state is not None:
        state = jnp.transpose(
            initial_state.astype(accum).reshape(batch, *per_group, width, state_width), (0, 1, 4, 2, 3)
        )
    maps = [a.reshape(batch, length, groups * state_width) for a in (B, C)]
    log_decay = delta * A
    if starts is not None:
        log_decay, starts = jnp.where(starts[..., None], 0, log_decay), padded(starts)
    arguments = *(padded(a) for a in (x, delta, log_decay, *maps)), starts, D, state
    y, final = _chunked(tiling, *pvary_together(*arguments))  # pyright: ignore[reportGeneralTypeIssues]
    final = jnp.transpose(final, (0, 1, 3, 4, 2)).reshape(batch, heads, width, state_width)
    return y[:, :length], final
