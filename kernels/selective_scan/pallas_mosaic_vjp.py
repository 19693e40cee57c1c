"""Gradient of the selective scan on Mosaic GPU: chunks of positions backwards, states recomputed in registers.

With decay a_t = exp(delta_t A), u_t = delta_t x_t and the gradient g_t of the state after position t,

  g_t = a_{t+1} g_{t+1} + dy_t C_t            dB_t = sum_e g_t u_t           dC_t = sum_e dy_t state_t
  w_t = g_t a_t state_{t-1}                   du_t = sum_n g_t B_t           dA = sum_t delta_t w_t
  ddelta_t = x_t du_t + sum_n A w_t           dx_t = delta_t du_t + D dy_t
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kernels.mosaic import Tiles, mosaic_call, program_index, select

# Positions between two states that the forward kernel keeps: 4 n / CHUNK bytes per channel and position.
CHUNK = 4
# Of shared memory, for sums over channels.
_SCRATCH_BYTES = 6144


class Kept(NamedTuple):
    """What the backward kernel reads of the forward pass.

    Attributes:
      x: [b, l, e].
      delta: [b, l, e] step sizes, float32.
      A: [e, n].
      B, C: [b, l, n].
      D: [e].
      states: [b, chunks, e, n] states before each chunk.
      starts: int32 [b, l], or None.
    """

    x: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    D: Array
    states: Array
    starts: Array | None = None


class _Outputs(NamedTuple):
    """Where gradients go; those of B and C are sums over a block of channels, those of A and D over a row."""

    dx: Any
    ddelta: Any
    dB: Any
    dC: Any
    dA: Any
    dD: Any
    d_initial: Any


def _kernel(*refs: Any, packed: bool, final: bool, interpret: bool) -> None:
    """Refs: `Kept`, dy, [gradient of the final state]; `_Outputs`."""
    count = 7 + packed
    kept, dy_ref, out = Kept(*refs[:count]), refs[count], _Outputs(*refs[-7:])
    length, tiles = kept.x.shape[1], Tiles(kept.B.shape[-1], interpret)
    row, block = program_index("rows"), program_index("channels")
    channels, states = pl.ds(block * tiles.ROWS, tiles.ROWS), pl.ds(0, tiles.columns)
    A, D = tiles.load(kept.A, channels, states), tiles.load_vector(kept.D, channels, axis=0)

    def load(t: Array) -> tuple[Any, ...]:
        """The position's x, delta, dy, B, C and whether a history begins; behind the row delta and dy are 0."""
        at, real = jnp.minimum(t, length - 1), t < length
        x, delta, dy = (tiles.load_vector(ref, row, at, channels, axis=0) for ref in (kept.x, kept.delta, dy_ref))
        B, C = (tiles.load_vector(ref, row, at, states, axis=1) for ref in (kept.B, kept.C))
        goes_on = None if kept.starts is None else (kept.starts[row, at] == 0) | ~real
        return x, select(real, delta), select(real, dy), B, C, goes_on

    def passed(a: Array, goes_on: Array | None) -> Array:
        """What of a tile passes between a position and the one before: nothing where a history begins."""
        return a if goes_on is None else select(goes_on, a)

    def one_position(t: Array, loaded: tuple[Any, ...], before: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        """Passes the gradient g over a position and stores what belongs to it."""
        (x, delta, dy, B, C, goes_on), (g, dA, dD) = loaded, sums
        B, C, deltas, dys = tiles.spread(B, 1), tiles.spread(C, 1), tiles.spread(delta, 0), tiles.spread(dy, 0)
        u = tiles.spread(delta * x, 0)
        decay = jnp.exp(deltas * A)
        decayed = decay * passed(before, goes_on)
        g = g + dys * C
        flow = g * decayed
        du = jnp.sum(g * B, axis=1)
        # What lies behind the row is stored at its last position first, and then overwritten by what belongs there.
        at = jnp.minimum(t, length - 1)
        out.dx[row, at, channels] = (delta * du + D * dy).astype(out.dx.dtype)
        out.ddelta[row, at, channels] = x * du + jnp.sum(A * flow, axis=1)
        out.dB[row, block, at, states] = jnp.sum(g * u, axis=0)
        out.dC[row, block, at, states] = jnp.sum(dys * (decayed + u * B), axis=0)
        return passed(g * decay, goes_on), dA + deltas * flow, dD + dy * x

    chunks = -(-length // CHUNK)

    def one_chunk(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        chunk = chunks - 1 - i
        start = chunk * CHUNK
        loaded = [load(start + j) for j in range(CHUNK)]
        before = [tiles.load(kept.states, row, chunk, channels, states)]
        for x, delta, _, B, _, goes_on in loaded[:-1]:
            decayed = jnp.exp(tiles.spread(delta, 0) * A) * passed(before[-1], goes_on)
            before.append(decayed + tiles.spread(delta * x, 0) * tiles.spread(B, 1))
        for j in reversed(range(CHUNK)):
            sums = one_position(start + j, loaded[j], before[j], sums)
        return sums

    g = tiles.zeros()
    if final:
        # A sum, as what the loop carries on: inside shard_map what is loaded has another type.
        g += tiles.load(refs[count + 1], row, channels, states)
    g, dA, dD = jax.lax.fori_loop(0, chunks, one_chunk, (g, tiles.zeros(), tiles.full_vector(0.0)))
    out.dA[row, channels, states] = dA
    out.d_initial[row, channels, states] = g
    out.dD[row, channels] = dD


def backward(kept: Kept, dy: Array, d_final: Array | None, interpret: bool) -> tuple[Array, ...]:
    """Runs the backward kernel and adds up what its programs wrote.

    Args:
      kept: of the forward pass.
      dy: [b, l, e], gradient of y.
      d_final: [b, e, n], gradient of the final state, or None for zeros.
      interpret: run by the interpreter.

    Returns:
      Gradients of x, delta, A, B, C, D and the initial state [b, e, n].
    """
    batch, length, width = kept.x.shape
    state_width, blocks = kept.B.shape[-1], width // Tiles.ROWS
    of_maps, of_states = (batch, blocks, length, state_width), (batch, width, state_width)
    shapes = _Outputs(kept.x.shape, kept.x.shape, of_maps, of_maps, of_states, (batch, width), of_states)
    dtypes = (kept.x.dtype, *[jnp.float32] * 6)
    outputs = mosaic_call(
        functools.partial(_kernel, packed=kept.starts is not None, final=d_final is not None, interpret=interpret),
        [*kept, dy, d_final],
        list(zip(shapes, dtypes, strict=True)),
        grid={"rows": batch, "channels": blocks},
        scratch_bytes=_SCRATCH_BYTES,
        interpret=interpret,
        name="selective_scan_backward",
    )
    out = _Outputs(*outputs)
    dB, dC = out.dB.sum(1).astype(kept.B.dtype), out.dC.sum(1).astype(kept.C.dtype)
    return out.dx, out.ddelta, out.dA.sum(0), dB, dC, out.dD.sum(0), out.d_initial
