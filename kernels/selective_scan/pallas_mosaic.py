"""Selective scan by Pallas kernels on Mosaic GPU: a program goes through a row with the states of 64 channels.

States are a tile [64, n] in registers. Step sizes are made by plain JAX before, so that they are written and read once
more than in the Triton form: 8 bytes per channel and position forward, and as many for their gradient.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kernels.decays import step_size
from kernels.dispatch import interpreted, pvary_together
from kernels.mosaic import DTYPES, Tiles, mosaic_call, program_index, select
from kernels.segment_ids import history_starts, real_positions
from kernels.selective_scan.config import DEFAULT_CHUNK_SIZE
from kernels.selective_scan.pallas_mosaic_vjp import CHUNK, Kept, backward

# A tile takes n / 2 registers per thread, and the backward kernel holds CHUNK of them and more.
MAX_STATE_WIDTH = 64


class _Options(NamedTuple):
    """What is known when the kernels are built."""

    final_state: bool
    interpret: bool


def _kernel(*all_refs: Any, options: _Options, initial: bool, packed: bool, keep: bool) -> None:
    """Refs: x, delta, A, B, C, D, [initial state], [starts]; y, [final state], [states]."""
    refs = list(all_refs)
    x_ref, delta_ref, A_ref, B_ref, C_ref, D_ref = refs[:6]
    del refs[:6]
    initial_ref = refs.pop(0) if initial else None
    starts_ref = refs.pop(0) if packed else None
    y_ref = refs.pop(0)
    final_ref = refs.pop(0) if options.final_state else None
    tiles = Tiles(B_ref.shape[-1], options.interpret)
    row, channels = program_index("rows"), pl.ds(program_index("channels") * tiles.ROWS, tiles.ROWS)
    states = pl.ds(0, tiles.columns)
    A, D = tiles.load(A_ref, channels, states), tiles.load_vector(D_ref, channels, axis=0)

    def step(t: Array, state: Array) -> Array:
        if keep:

            @pl.when(t % CHUNK == 0)
            def _():
                refs[0][row, t // CHUNK, channels, states] = state

        x, delta = (tiles.load_vector(ref, row, t, channels, axis=0) for ref in (x_ref, delta_ref))
        B, C = (tiles.spread(tiles.load_vector(ref, row, t, states, axis=1), 1) for ref in (B_ref, C_ref))
        before = state if starts_ref is None else select(starts_ref[row, t] == 0, state)
        state = jnp.exp(tiles.spread(delta, 0) * A) * before + tiles.spread(delta * x, 0) * B
        y_ref[row, t, channels] = (jnp.sum(state * C, axis=1) + D * x).astype(y_ref.dtype)
        return state

    state = tiles.zeros()
    if initial_ref is not None:
        # A sum, as what the loop carries on: inside shard_map what is loaded has another type.
        state += tiles.load(initial_ref, row, channels, states)
    state = jax.lax.fori_loop(0, x_ref.shape[1], step, state)
    if final_ref is not None:
        final_ref[row, channels, states] = state


def _forward(options: _Options, inputs: tuple[Any, ...], *, keep: bool) -> list[Array]:
    """Returns y, the final state [b, e, n] where asked for, and with `keep` the states that the gradient needs."""
    x, *_, initial_state, starts = inputs
    batch, length, width = x.shape
    state_width = inputs[3].shape[-1]
    outputs: list[Any] = [(x.shape, x.dtype)]
    if options.final_state:
        outputs.append(((batch, width, state_width), jnp.float32))
    if keep:
        outputs.append(((batch, -(-length // CHUNK), width, state_width), jnp.float32))
    given = {"initial": initial_state is not None, "packed": starts is not None}
    return mosaic_call(
        functools.partial(_kernel, options=options, **given, keep=keep),
        inputs,
        outputs,
        grid={"rows": batch, "channels": width // Tiles.ROWS},
        interpret=options.interpret,
        name="selective_scan_forward",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options: _Options, *inputs: Any) -> tuple[Array, ...]:
    return tuple(_forward(options, inputs, keep=False))


def _scan_fwd(options: _Options, *inputs: Any) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    *outputs, states = _forward(options, inputs, keep=True)
    x, delta, A, B, C, D, initial_state, starts = inputs
    return tuple(outputs), (Kept(x, delta, A, B, C, D, states, starts), initial_state is not None)


def _scan_bwd(options: _Options, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]) -> tuple[Any, ...]:
    kept, initial = residuals
    d_final = cotangents[1] if options.final_state else None
    *others, d_initial = backward(kept, cotangents[0], d_final, options.interpret)
    return *others, d_initial if initial else None, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _check_limits(state_width: int, **arrays: Array | None) -> None:
    if state_width > MAX_STATE_WIDTH:
        raise ValueError(
            f"n={state_width} of A and B: the kernels on Mosaic GPU hold at most {MAX_STATE_WIDTH} state entries per "
            "channel; implementation='xla' takes any"
        )
    for name, array in arrays.items():
        if array is not None and array.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {array.dtype}: the GPU kernels take float32 and bfloat16; implementation='xla' takes others"
            )


def selective_scan_pallas_mosaic(
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
) -> tuple[Array, Array | None]:
    """Runs the operator of `kernels.selective_scan.selective_scan`, softplus included; arguments are as there.

    Args:
      x, dt, B, C: float32 or bfloat16; the gradient of each comes back in its dtype.
      A, D, dt_bias, initial_state: float32.
      chunk_size: changes nothing here; a state is kept every `CHUNK` positions.

    Returns:
      y [b, l, e] in the dtype of x, and the final state [b, e, n] float32, or None where it is not wanted.

    Raises:
      ValueError: for a state width or dtypes that the kernels do not take.
    """
    width, state_width = A.shape
    _check_limits(state_width, x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, initial_state=initial_state)
    starts = history_starts(segment_ids)

    def padded(a: Array, *sides: int) -> Array:
        """Fills the last axes up with zeros to whole tiles."""
        more = [-size % side for size, side in zip(a.shape[-len(sides) :], sides, strict=True)]
        return jnp.pad(a, [(0, 0)] * (a.ndim - len(sides)) + [(0, m) for m in more]) if any(more) else a

    inputs = (
        padded(x, Tiles.ROWS),
        padded(step_size(dt, dt_bias, real_positions(segment_ids)), Tiles.ROWS),
        padded(A, Tiles.ROWS, 8),
        padded(B, 8),
        padded(C, 8),
        padded(jnp.zeros(width, jnp.float32) if D is None else D, Tiles.ROWS),
        None if initial_state is None else padded(initial_state, Tiles.ROWS, 8),
        None if starts is None else starts.astype(jnp.int32),
    )
    outputs: tuple[Array, ...] = _scan(_Options(return_final_state, interpreted(interpret)), *pvary_together(*inputs))
    y, final = outputs[0], outputs[1] if return_final_state else None
    return y[..., :width], None if final is None else final[:, :width, :state_width]
