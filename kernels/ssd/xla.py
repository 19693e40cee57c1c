"""State space duality in plain JAX: the walk over tiles of some rows times some chunks, one after the other."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from kernels.ssd.xla_tile import Inputs, add_up, backward_tile, forward_tile
from kernels.ssd.xla_tile import decays_between as decays_between
from kernels.triton_call import vary_together


class _Cut(NamedTuple):
    """How the work is cut: tiles of `rows` times `chunks` chunks of `chunk` positions, and how many of them."""

    chunk: int
    rows: int
    chunks: int
    row_tiles: int
    steps: int


class _Place(NamedTuple):
    """Where a tile lies, and whether it is the first or the last of its rows.

    A tile that would reach beyond the end is moved back: whole rows are then done twice, and of positions `fresh` tells
    which no earlier tile has done.
    """

    index: Array
    row: Array
    start: Array
    first: Array
    last: Array
    fresh: Array | None


# Values in the largest array of a tile: what is made of a tile should stay in a CPU's cache.
_TILE_VALUES = 2**17


def _cut(batch: int, length: int, heads: int, widths: tuple[int, int], chunk_size: int) -> _Cut:
    """Chooses the tiles.

    On CPUs each operation on whole arrays would go through memory, and through memory that the system has to hand out
    anew at every run. Elsewhere one tile is everything, for small ones would leave a GPU idle.
    """
    chunk = min(chunk_size, length)
    rows, chunks = batch, -(-length // chunk)
    if jax.default_backend() == "cpu":
        fit = max(1, _TILE_VALUES // (heads * chunk * max(chunk, *widths)))
        rows = -(-batch // -(-batch // fit))
        most = min(chunks, max(1, fit // rows))
        # Tiles that do not divide the length overlap, which is work done twice.
        chunks = next((n for n in range(most, most // 2, -1) if chunks % n == 0), most)
    return _Cut(chunk, rows, chunks, -(-batch // rows), -(-length // (chunk * chunks)))


def _take(a: Array, cut: _Cut, place: _Place) -> Array:
    """Reads a tile of [b, l, ...] as [rows, chunks, chunk, ...]."""
    width = cut.chunks * cut.chunk
    if (cut.rows, width) != a.shape[:2]:
        a = jax.lax.dynamic_slice(a, (place.row, place.start) + (0,) * (a.ndim - 2), (cut.rows, width, *a.shape[2:]))
    return a.reshape(cut.rows, cut.chunks, cut.chunk, *a.shape[2:])


def _by_group(a: Array, groups: int) -> Array:
    """Splits the heads, or the maps that lie one after the other, into groups: axis 3 of a tile."""
    return a.reshape(*a.shape[:3], groups, -1, *a.shape[4:])


def _put(whole: Array, tile: Array, place: _Place) -> Array:
    """Writes a tile back."""
    tile = tile.reshape(tile.shape[0], -1, *whole.shape[2:]).astype(whole.dtype)
    if tile.shape == whole.shape:
        return tile
    return jax.lax.dynamic_update_slice(whole, tile, (place.row, place.start) + (0,) * (whole.ndim - 2))


def _put_rows(whole: Array, tile: Array, row: Array) -> Array:
    """Writes rows of states."""
    if tile.shape == whole.shape:
        return tile
    return jax.lax.dynamic_update_slice(whole, tile, (row,) + (0,) * (whole.ndim - 1))


def _place(cut: _Cut, batch: int, length: int, index: Array) -> _Place:
    row, step = index // cut.steps, index % cut.steps
    if cut.row_tiles == 1:
        row, step = 0, index
    if cut.steps == 1:
        row, step = index, 0
    width = cut.chunks * cut.chunk
    start, fresh = step * width, None
    if length % width:
        start = jnp.minimum(start, length - width)
        fresh = (start + jnp.arange(width) >= step * width).reshape(1, cut.chunks, cut.chunk, 1, 1)
    row *= cut.rows
    if batch % cut.rows:
        row = jnp.minimum(row, batch - cut.rows)
    return _Place(index, row, start, step == 0, step == cut.steps - 1, fresh)


def _read(inputs: Inputs, cut: _Cut, place: _Place, groups: int) -> Inputs:
    """Reads a tile of the inputs."""
    *arrays, starts = inputs
    if starts is not None:
        starts = _take(starts, cut, place)
    tile = Inputs(*(_by_group(_take(a, cut, place), groups) for a in arrays), starts)
    if place.fresh is not None:
        # Positions done before neither decay nor add, and no history begins there.
        tile = tile._replace(
            delta=jnp.where(place.fresh, tile.delta, 0),
            log_decay=jnp.where(place.fresh, tile.log_decay, 0),
            starts=None if starts is None else starts & place.fresh[..., 0, 0],
        )
    return tile


def _rows(a: Array, cut: _Cut, place: _Place) -> Array:
    """Reads the tile's rows of states."""
    return a if a.shape[0] == cut.rows else jax.lax.dynamic_slice_in_dim(a, place.row, cut.rows)


def _walk(cut: _Cut, x: Array, body: Callable[[_Place, Any], Any], carry: Any, *, reverse: bool = False) -> Any:
    """Runs `carry = body(place, carry)` for every tile of x [b, l, h, p] in turn, rows of tiles after one another."""
    tiles = cut.row_tiles * cut.steps

    def step(index: Array, carry: Any) -> Any:
        return body(_place(cut, *x.shape[:2], tiles - 1 - index if reverse else index), carry)

    return step(0, carry) if tiles == 1 else jax.lax.fori_loop(0, tiles, step, carry)


def _state_shape(inputs: Inputs, D: Array) -> tuple[int, ...]:
    """[b, g, n, r, p]"""
    groups, per_group = D.shape
    return inputs.x.shape[0], groups, inputs.B.shape[-1] // groups, per_group, inputs.x.shape[-1]


def _zeros(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """Zeros to be carried: under shard_map they have to differ over the same mesh axes as what is written into them."""
    return vary_together(jnp.zeros(shape, dtype), like)[0]


def _arriving(whole: Array, walking: Array | None, cut: _Cut, place: _Place, begins: Array) -> Array:
    """The state that comes into a tile: the carried one, or that of `whole` where the walk over its rows begins."""
    if walking is None:
        return _rows(whole, cut, place)
    return walking if cut.row_tiles == 1 else jnp.where(begins, _rows(whole, cut, place), walking)


def _carried(whole: Array | None, cut: _Cut) -> Array | None:
    """The state to carry from tile to tile at the start of the walk, if rows have several tiles."""
    return whole[: cut.rows] if cut.steps > 1 else None


def _forward(cut: _Cut, inputs: Inputs, D: Array, state: Array | None, *, keep: bool) -> tuple[Array | None, ...]:
    """Runs all tiles.

    Returns the output, the final state and, with `keep`, what the gradient reads besides the inputs, if any chunk has
    something before it: the output's part from there, and the states before each chunk of each tile.
    """
    x, groups, wide = inputs.x, D.shape[0], inputs.delta.dtype
    state_shape = _state_shape(inputs, D)
    chained = cut.steps * cut.chunks > 1 or state is not None
    if chained and state is None:
        state = _zeros(state_shape, wide, x)
    by_tile = (cut.row_tiles * cut.steps, cut.rows, cut.chunks, *state_shape[1:])
    buffers = (
        _zeros(x.shape, x.dtype, x),
        _zeros(state_shape, wide, x),
        _zeros(x.shape, wide, x) if keep and chained else None,
        _zeros(by_tile, wide, x) if keep and chained else None,
        _carried(state, cut),
    )

    def body(place: _Place, carry: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
        y_whole, final, from_before_whole, befores, walking = carry
        outputs = [y_whole, from_before_whole]
        before = _arriving(state, walking, cut, place, place.first) if chained else None
        y, from_before, after, before = forward_tile(_read(inputs, cut, place, groups), D, before)
        for index, tile in enumerate((y, from_before)):
            if outputs[index] is not None:
                if place.fresh is not None:
                    done = _by_group(_take(outputs[index], cut, place), groups)
                    tile = jnp.where(place.fresh[..., None], tile, done)
                outputs[index] = _put(outputs[index], tile, place)
        final = _put_rows(final, after, place.row)
        if befores is not None:
            befores = _put_rows(befores, before[None], place.index)
        return outputs[0], final, outputs[1], befores, None if walking is None else after

    return _walk(cut, x, body, buffers)[:4]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    cut: _Cut,
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
    return _forward(cut, Inputs(x, delta, log_decay, B, C, starts), D, state, keep=False)[:2]


def _chunked_fwd(cut: _Cut, *arguments: Any) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    # With symbolic zeros each argument is wrapped, and None is not.
    *inputs, D, state = (None if a is None else a.value for a in arguments)
    inputs = Inputs(*inputs)
    y, final, from_before, befores = _forward(cut, inputs, D, state, keep=True)
    return (y, final), (inputs, D, state is None, from_before, befores)


def _chunked_bwd(cut: _Cut, residuals: tuple[Any, ...], cotangents: tuple[Any, Any]) -> tuple[Array | None, ...]:
    inputs, D, from_nothing, from_before, befores = residuals
    dy, d_final = cotangents
    x, groups, wide = inputs.x, D.shape[0], inputs.delta.dtype
    state_shape = _state_shape(inputs, D)
    if isinstance(dy, SymbolicZero):
        dy = _zeros(x.shape, x.dtype, x)
    if isinstance(d_final, SymbolicZero):
        # A row of one chunk whose state nobody reads has nothing to do with states at all.
        d_final = None if befores is None else _zeros(state_shape, wide, x)
    buffers = (
        *(_zeros(a.shape, a.dtype, x) for a in inputs[:5]),
        _zeros(inputs.delta.shape, wide, x),
        None if from_nothing else _zeros(state_shape, wide, x),
        _carried(d_final, cut),
    )

    def body(place: _Place, carry: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
        *gradients, d_initial, walking = carry
        dy_tile, from_before_tile = (
            None if a is None else _by_group(_take(a, cut, place), groups) for a in (dy, from_before)
        )
        if place.fresh is not None:
            # Gradients at the other positions are written over later.
            dy_tile = jnp.where(place.fresh[..., None], dy_tile, 0)
        before = None if befores is None else jax.lax.dynamic_index_in_dim(befores, place.index, keepdims=False)
        d_after = None if d_final is None else _arriving(d_final, walking, cut, place, place.last)
        tile = _read(inputs, cut, place, groups)
        tiles, d_state = backward_tile(tile, D, from_before_tile, before, dy_tile, d_after)
        gradients = [_put(a, tile, place) for a, tile in zip(gradients, tiles, strict=True)]
        if d_initial is not None:
            d_initial = _put_rows(d_initial, d_state, place.row)
        return *gradients, d_initial, None if walking is None else d_state

    *gradients, dD, d_initial, _ = _walk(cut, x, body, buffers, reverse=True)
    return *gradients, None, jnp.sum(dD, axis=(0, 1)).reshape(D.shape).astype(D.dtype), d_initial


_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)


def ssd_xla(
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
    """Runs the operator of `reference.ssd_reference` in chunks; arguments and results are the same.

    Args:
      chunk_size: c, positions handled densely at once; l need not be a multiple.
    """
    batch, length, heads, width = x.shape
    groups, state_width = B.shape[2:]
    per_group = (groups, heads // groups)
    cut = _cut(batch, length, heads, (width, state_width), chunk_size)
    wide = delta.dtype

    padding = max(0, cut.chunk * cut.chunks - length)

    def padded(a: Array) -> Array:
        """Positions of padding have delta = 0: they neither decay nor add."""
        return jnp.pad(a, [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2)) if padding else a

    D = (jnp.zeros(heads, wide) if D is None else D).reshape(per_group)
    state = None
    if initial_state is not None:
        state = jnp.transpose(
            initial_state.astype(wide).reshape(batch, *per_group, width, state_width), (0, 1, 4, 2, 3)
        )
    maps = [a.reshape(batch, length, groups * state_width) for a in (B, C)]
    log_decay = delta * A
    if starts is not None:
        log_decay, starts = jnp.where(starts[..., None], 0, log_decay), padded(starts)
    arguments = *(padded(a) for a in (x, delta, log_decay, *maps)), starts, D, state
    y, final = _chunked(cut, *vary_together(*arguments))
    final = jnp.transpose(final, (0, 1, 3, 4, 2)).reshape(batch, heads, width, state_width)
    return y[:, :length], final


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
    decay = jnp.exp(add_up(log_decay, reverse=True, exclusive=True))
    scores = jnp.einsum("bgn,blgn->bgl", C_last, B, preferred_element_type=decay.dtype)
    weights = decay * steps * jnp.repeat(scores, heads // groups, axis=1)
    y = jnp.einsum("bhl,blhp->bhp", weights.astype(x.dtype), x, preferred_element_type=decay.dtype)
    if D is not None:
        y = y + D[:, None] * jnp.take_along_axis(x, last[:, None, None, None], axis=1)[:, 0]
    return y.astype(x.dtype)
