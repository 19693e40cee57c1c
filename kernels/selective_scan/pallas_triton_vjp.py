"""Gradient of the selective scan as a GPU kernel: groups of positions backwards, states recomputed in registers.

With decay a_t = exp(delta_t A), u_t = delta_t x_t and the gradient g_t of the state after position t,

  g_t = a_{t+1} g_{t+1} + dy_t C_t            dB_t = sum_e g_t u_t           dC_t = sum_e dy_t state_t
  w_t = g_t a_t state_{t-1}                   du_t = sum_n g_t B_t           dA = sum_t delta_t w_t
  ddelta_t = x_t du_t + sum_n A w_t           dx_t = delta_t du_t + D dy_t
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kernels.selective_scan.config import SelectiveScanConfig
from kernels.selective_scan.tiles import Tile, divide, from_before, this_tile
from kernels.triton import exp2, load_tile, store_tile, triton_call

_LN_2 = math.log(2)
# Under this step 1 - exp(-delta) has lost digits that its series keeps.
_SMALL_STEP = 1 / 16


class Kept(NamedTuple):
    """What the backward kernel reads of the forward pass.

    Attributes:
      x: [b, l, e].
      delta: [b, l, e] step sizes, float32.
      A: [n, e] decay rates in powers of two.
      B, C: [b, l, n].
      D: [e].
      states: [b, chunks, n, e] states before each chunk.
      starts: int8 [b, l], or None.
    """

    x: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    D: Array
    states: Array
    starts: Array | None = None


def _states_after(
    tile: Tile, kept: Kept, A: Array, state: Array, start: Array, steps: int, interpret: bool
) -> list[Array]:
    """Returns the states before position `start` and after each of `steps` positions from there."""
    positions = [start + j for j in range(steps)]
    loaded = [
        (
            tile.load(kept.x, t, tile.channels),
            tile.load(kept.delta, t, tile.channels),
            tile.load(kept.B, t, tile.states),
            tile.load_start(kept.starts, t),
        )
        for t in positions
    ]
    states = [state]
    for x, delta, B, begins in loaded:
        states.append(exp2(delta * A, interpret) * from_before(states[-1], begins) + (delta * x) * B[:, None])
    return states


def _slope(delta: Array, interpret: bool) -> Array:
    """The derivative of softplus where its value is delta: 1 - exp(-delta), and 0 at padding."""
    series = delta * (1 - delta * (1 / 2 - delta * (1 / 6 - delta * (1 / 24 - delta * (1 / 120)))))
    return jnp.where(delta < _SMALL_STEP, series, 1 - exp2(delta * (-1 / _LN_2), interpret))


class _Outputs(NamedTuple):
    """Where gradients go; those of B and C are sums over a block of channels, those of parameters over a row."""

    dx: Any
    ddt: Any
    dB: Any
    dC: Any
    dA: Any
    dD: Any
    ddt_bias: Any
    d_initial: Any


class _Sums(NamedTuple):
    """What a program carries from the end of its row to the start: g [n, e], and gradients of parameters."""

    g: Array
    dA: Array
    dD: Array
    ddt_bias: Array


def _one_position(
    tile: Tile,
    out: _Outputs,
    loaded: tuple[Any, ...],
    A: Array,
    D: Array,
    before: Array,
    sums: _Sums,
    interpret: bool,
) -> tuple[_Sums, tuple[tuple[Any, Array], ...], tuple[tuple[Any, Array], ...]]:
    """Passes the gradient over a position; returns also what is to be stored by channel and by state entry."""
    x, delta, dy, B, C, start = loaded
    u = delta * x
    decay = exp2(delta * A, interpret)
    g = sums.g + dy * C[:, None]
    decayed = decay * from_before(before, start)
    # state_t = decayed + u B, whose second part is summed without a tile.
    dC = jnp.sum(dy * decayed, axis=1) + B * jnp.sum(dy * u, axis=0)
    dB = jnp.sum(g * u, axis=1)
    du = jnp.sum(g * B[:, None], axis=0)
    flow = g * decayed
    ddelta = x * du + jnp.sum(A * flow, axis=0) * _LN_2
    ddt = ddelta * _slope(delta, interpret)
    dx = delta * du + D * dy
    sums = _Sums(from_before(g * decay, start), sums.dA + delta * flow, sums.dD + dy * x, sums.ddt_bias + ddt)
    return sums, ((out.dx, dx), (out.ddt, ddt)), ((out.dB, dB), (out.dC, dC))


def _kernel(*refs: Any, config: SelectiveScanConfig, packed: bool, final: bool, interpret: bool) -> None:
    """Refs: `Kept`, dy, [gradient of the final state]; `_Outputs`."""
    count = 7 + packed
    kept, dy_ref, out = Kept(*refs[:count]), refs[count], _Outputs(*refs[-8:])
    tile = this_tile(kept.x.shape, kept.B.shape[-1], config.backward_channels)
    whole = tile.row, tile.states, tile.channels
    A = load_tile(kept.A, tile.states, tile.channels)
    D = load_tile(kept.D, tile.channels)
    num_groups, per_chunk = pl.cdiv(tile.positions, config.group), config.chunk // config.group

    def load_position(t: Array) -> tuple[Any, ...]:
        by_channel = [tile.load(ref, t, tile.channels) for ref in (kept.x, kept.delta, dy_ref)]
        by_state = [tile.load(ref, t, tile.states) for ref in (kept.B, kept.C)]
        return *by_channel, *by_state, tile.load_start(kept.starts, t)

    def one_group(i: Array, sums: _Sums) -> _Sums:
        group = num_groups - 1 - i
        chunk, start = divide(group, per_chunk), group * config.group
        state = load_tile(kept.states, tile.row, chunk, tile.states, tile.channels)

        def skip_group(k: Array, state: Array) -> Array:
            return _states_after(
                tile, kept, A, state, chunk * config.chunk + k * config.group, config.group, interpret
            )[-1]

        state = jax.lax.fori_loop(0, group - chunk * per_chunk, skip_group, state)
        states = _states_after(tile, kept, A, state, start, config.group - 1, interpret)
        loaded = load_position(start + config.group - 1)
        for j in reversed(range(config.group)):
            t, now = start + j, loaded
            if j:
                # One position ahead of its use.
                loaded = load_position(t - 1)
            sums, by_channel, by_state = _one_position(tile, out, now, A, D, states[j], sums, interpret)
            for ref, value in by_channel:
                tile.store(ref, value, t, tile.channels)
            for ref, value in by_state:
                tile.store(ref, value, t, tile.states, tile.block)
        return sums

    g = jnp.zeros(tile.shape, jnp.float32)
    no_channels = jnp.zeros(tile.channels.count, jnp.float32)
    first = load_tile(refs[count + 1], *whole) if final else g
    sums = jax.lax.fori_loop(0, num_groups, one_group, _Sums(first, g, no_channels, no_channels))
    for ref, value in ((out.dA, sums.dA), (out.d_initial, sums.g)):
        store_tile(ref, value, *whole)
    for ref, value in ((out.dD, sums.dD), (out.ddt_bias, sums.ddt_bias)):
        store_tile(ref, value, tile.row, tile.channels)


def backward(
    kept: Kept, dy: Array, d_final: Array | None, config: SelectiveScanConfig, dt_dtype: Any, interpret: bool
) -> tuple[Array, ...]:
    """Runs the backward kernel and adds up what its programs wrote.

    Args:
      kept: of the forward pass.
      dy: [b, l, e], gradient of y.
      d_final: [b, n, e], gradient of the final state, or None for zeros.
      config: the one of the forward pass.
      dt_dtype: of the raw steps.
      interpret: run as plain JAX.

    Returns:
      Gradients of x, dt, A (as [n, e], in powers of two), B, C, D, dt_bias and the initial state [b, n, e].
    """
    batch, length, width = kept.x.shape
    state_width = kept.B.shape[-1]
    blocks = pl.cdiv(width, config.backward_channels)
    of_maps, of_states = (batch, blocks, length, state_width), (batch, state_width, width)
    shapes = _Outputs(
        kept.x.shape, kept.x.shape, of_maps, of_maps, of_states, (batch, width), (batch, width), of_states
    )
    dtypes = (kept.x.dtype, dt_dtype, *[jnp.float32] * 6)
    outputs = triton_call(
        functools.partial(
            _kernel, config=config, packed=kept.starts is not None, final=d_final is not None, interpret=interpret
        ),
        [*kept, dy, d_final],
        list(zip(shapes, dtypes, strict=True)),
        grid=batch * blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
        name="selective_scan_backward",
    )
    out = _Outputs(*outputs)
    dB, dC = out.dB.sum(1).astype(kept.B.dtype), out.dC.sum(1).astype(kept.C.dtype)
    # A comes in powers of two, so its gradient is that of A by the natural logarithm times ln 2.
    return out.dx, out.ddt, out.dA.sum(0) * _LN_2, dB, dC, out.dD.sum(0), out.ddt_bias.sum(0), out.d_initial
