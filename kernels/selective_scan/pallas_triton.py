"""Selective scan as GPU kernels: one program goes through a row with the states of a block of channels in registers.

Every input is read once and every output written once. The kernels take decay rates as [n, e] in powers of two.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kernels.dispatch import interpreted, pvary_together
from kernels.segment_ids import history_starts, row_lengths
from kernels.selective_scan.config import DEFAULT_CHUNK_SIZE, MAX_STATE_WIDTH, SelectiveScanConfig, default_config
from kernels.selective_scan.pallas_triton_vjp import Kept, backward
from kernels.selective_scan.tiles import Tile, from_before, this_tile
from kernels.triton import DTYPES, exp2, load_tile, store_tile, triton_call


class _Options(NamedTuple):
    """What is known when the kernels are built."""

    config: SelectiveScanConfig
    final_state: bool
    interpret: bool


def _step_size(dt: Array, bias: Array, exists: Array) -> Array:
    raw = dt + bias
    return jnp.where(exists, jnp.maximum(raw, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(raw))), 0.0)


def _kernel(*all_refs: Any, options: _Options, initial: bool, packed: bool, keep: bool) -> None:
    """Refs: lengths, x, dt, A, B, C, D, dt_bias, [initial state], [starts]; y, [final state], [delta, states]."""
    refs = list(all_refs)
    lengths_ref, x_ref, dt_ref, A_ref, B_ref, C_ref, D_ref, bias_ref = refs[:8]
    del refs[:8]
    initial_ref = refs.pop(0) if initial else None
    starts_ref = refs.pop(0) if packed else None
    y_ref = refs.pop(0)
    final_ref = refs.pop(0) if options.final_state else None
    delta_ref, states_ref = refs if keep else (None, None)
    config, interpret = options.config, options.interpret
    tile = this_tile(x_ref.shape, B_ref.shape[-1], config.forward_channels)
    length = lengths_ref[tile.row]
    A = load_tile(A_ref, tile.states, tile.channels)
    D, bias = load_tile(D_ref, tile.channels), load_tile(bias_ref, tile.channels)

    def one_chunk(k: Array, state: Array) -> Array:
        positions = [k * config.chunk + j for j in range(config.chunk)]
        if keep:
            store_tile(states_ref, state, tile.row, k, tile.states, tile.channels)
        # All loads come first: the chunk's arithmetic hides their latency.
        loaded = [_load_position(tile, (x_ref, dt_ref, B_ref, C_ref, starts_ref), t) for t in positions]
        outputs = []
        for t, (x, dt, B, C, start) in zip(positions, loaded, strict=True):
            delta = _step_size(dt, bias, t < length)
            state = exp2(delta * A, interpret) * from_before(state, start) + (delta * x) * B[:, None]
            outputs.append((jnp.sum(state * C[:, None], axis=0) + D * x, delta))
        for t, (y, delta) in zip(positions, outputs, strict=True):
            tile.store(y_ref, y, t, tile.channels)
            if keep:
                tile.store(delta_ref, delta, t, tile.channels)
        return state

    state = jnp.zeros(tile.shape, jnp.float32)
    if initial_ref is not None:
        state = load_tile(initial_ref, tile.row, tile.states, tile.channels)
    state = jax.lax.fori_loop(0, pl.cdiv(tile.positions, config.chunk), one_chunk, state)
    if final_ref is not None:
        store_tile(final_ref, state, tile.row, tile.states, tile.channels)


def _load_position(tile: Tile, refs: tuple[Any, ...], t: Array) -> tuple[Any, ...]:
    x_ref, dt_ref, B_ref, C_ref, starts_ref = refs
    by_channel = (tile.load(ref, t, tile.channels) for ref in (x_ref, dt_ref))
    by_state = (tile.load(ref, t, tile.states) for ref in (B_ref, C_ref))
    return *by_channel, *by_state, tile.load_start(starts_ref, t)


def _forward(options: _Options, inputs: tuple[Any, ...], *, keep: bool) -> list[Array]:
    """Returns y, the final state [b, n, e] where asked for, and with `keep` what the gradient needs."""
    x, dt, A, B, C, D, dt_bias, initial_state, lengths, starts = inputs
    config = options.config
    batch, length, width = x.shape
    state_width = B.shape[-1]
    outputs = [(x.shape, x.dtype)]
    if options.final_state:
        outputs.append(((batch, state_width, width), jnp.float32))
    if keep:
        outputs.append((x.shape, jnp.float32))
        outputs.append(((batch, pl.cdiv(length, config.chunk), state_width, width), jnp.float32))
    given = {"initial": initial_state is not None, "packed": starts is not None}
    return triton_call(
        functools.partial(_kernel, options=options, **given, keep=keep),
        [lengths, x, dt, A, B, C, D, dt_bias, initial_state, starts],
        outputs,
        grid=batch * pl.cdiv(width, config.forward_channels),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=options.interpret,
        name="selective_scan_forward",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options: _Options, *inputs: Any) -> tuple[Array, ...]:
    return tuple(_forward(options, inputs, keep=False))


def _scan_fwd(options: _Options, *inputs: Any) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    *outputs, delta, states = _forward(options, inputs, keep=True)
    x, dt, A, B, C, D, _, initial_state, _, starts = inputs
    like_dt = jnp.zeros((0,), dt.dtype)
    return tuple(outputs), (Kept(x, delta, A, B, C, D, states, starts), like_dt, initial_state is not None)


def _scan_bwd(options: _Options, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]) -> tuple[Any, ...]:
    kept, like_dt, initial = residuals
    d_final = cotangents[1] if options.final_state else None
    gradients = backward(kept, cotangents[0], d_final, options.config, like_dt.dtype, options.interpret)
    *others, d_initial = gradients
    return *others, d_initial if initial else None, None, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _check_limits(state_width: int, **arrays: Array | None) -> None:
    if state_width > MAX_STATE_WIDTH:
        raise ValueError(
            f"n={state_width} of A and B: the GPU kernels hold at most {MAX_STATE_WIDTH} state entries per channel; "
            "implementation='xla' takes any"
        )
    for name, array in arrays.items():
        if array is not None and array.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {array.dtype}: the GPU kernels take float32 and bfloat16; implementation='xla' takes others"
            )


def selective_scan_pallas_triton(
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
    interpret: bool | None = None,
    config: SelectiveScanConfig | None = None,
) -> tuple[Array, Array | None]:
    """Runs the operator of `kernels.selective_scan.selective_scan`, softplus included; arguments are as there.

    Args:
      x, dt, B, C: float32 or bfloat16; the gradient of each comes back in its dtype.
      A, D, dt_bias, initial_state: float32.
      chunk_size: changes nothing here; the config has its own.

    Returns:
      y [b, l, e] in the dtype of x, and the final state [b, e, n] float32, or None where it is not wanted.

    Raises:
      ValueError: for a state width or dtypes that the kernels do not take.
    """
    _check_limits(A.shape[1], x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, initial_state=initial_state)
    zeros = jnp.zeros(x.shape[2], jnp.float32)
    starts = history_starts(segment_ids)
    inputs = (
        x,
        dt,
        (A * math.log2(math.e)).T,
        B,
        C,
        zeros if D is None else D,
        zeros if dt_bias is None else dt_bias,
        None if initial_state is None else jnp.swapaxes(initial_state, 1, 2),
        row_lengths(segment_ids, x.shape[:2]),
        None if starts is None else starts.astype(jnp.int8),
    )
    options = _Options(config or default_config(A.shape[1]), return_final_state, interpreted(interpret))
    # What has been made here varies over no mesh axis yet.
    y, *state = _scan(options, *pvary_together(*inputs))  # pyright: ignore[reportGeneralTypeIssues]
    return y, jnp.swapaxes(state[0], 1, 2) if return_final_state else None
