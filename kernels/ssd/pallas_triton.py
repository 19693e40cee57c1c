"""State space duality by hand-written GPU kernels: the forward pass, and how both passes are put together.

One program goes through the chunks of one row (or of one segment of it), one head, and carries the state [p, n] in
registers: every input is read once and every output written once. Long rows with too few programs are cut into s
segments, in three phases: the state that each segment adds, the recurrence between segments, and the loop above from
the states found. The backward pass (`pallas_triton_vjp`) has the same phases in the opposite direction.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels.dispatch import Precision, interpreted, pvary_together
from kernels.segment_ids import row_lengths
from kernels.ssd.config import DEFAULT_CHUNK_SIZE, MAX_WIDTH, SsdConfig, default_config
from kernels.ssd.pallas_triton_vjp import Outputs, backward
from kernels.ssd.tiles import (
    KernelParams,
    apply_decay,
    chunk_decays,
    edge_decays,
    grid_size,
    history_numbers,
    load_histories,
    load_steps,
    mask_tile,
    program_index,
    scaled,
    states_before,
    uncut_segments,
)
from kernels.triton import DTYPES, Span, load_tile, store_tile, tile_precision, triton_call


def _update_state(
    params: KernelParams, state: Array, to_end: Array, total: Array, delta: Array, x: Array, B: Array
) -> Array:
    """state' = total state + sum_j to_end_j delta_j x_j B_j^T"""
    return apply_decay(params, total, state) + params.dot(scaled(x, to_end * delta), B, trans_a=True)


def _segment_kernel(params: KernelParams, x_ref, dt_ref, A_ref, B_ref, bias_ref, lengths_ref, *rest) -> None:
    """The state that a segment adds to nothing, and its total log decay."""
    numbers_ref, state_update_ref, log_ref = rest if params.packed else (None, *rest)
    row, segment, group, head, _, split = program_index(params, 1, params.config.width_splits)
    columns = params.columns(split)
    states = params.states
    A, bias, row_length = A_ref[head], bias_ref[head], lengths_ref[row]

    def body(chunk: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, log_total = carry
        index = segment * params.num_chunks + chunk
        positions = Span(index * params.chunk, params.chunk, params.length)
        delta = load_steps(dt_ref, row, positions, head, bias, row_length).delta
        _, to_end, total = edge_decays(params, delta * A, load_histories(params, numbers_ref, row, index))
        x = load_tile(x_ref, row, positions, head, columns)
        B = load_tile(B_ref, row, positions, group, states)
        return _update_state(params, state, to_end, total, delta, x, B), log_total + jnp.sum(delta * A)

    zeros = jnp.zeros((columns.count, states.count), jnp.float32)
    state, log_total = jax.lax.fori_loop(0, params.num_chunks, body, (zeros, jnp.float32(0)))
    store_tile(state_update_ref, state, row, segment, head, columns, states)
    # Splits of a head write the same number.
    log_ref[row, segment, head] = log_total


def _forward_kernel(params: KernelParams, keep_states: bool, *refs: Any) -> None:
    """Outputs, the final state and, for the gradient, the state before each chunk."""
    x_ref, dt_ref, A_ref, B_ref, C_ref, D_ref, bias_ref, lengths_ref, *rest = refs
    initial_ref = rest.pop(0) if params.has_initial or params.segments > 1 else None
    numbers_ref = rest.pop(0) if params.packed else None
    y_ref, *rest = rest
    final_ref = rest.pop(0) if params.wants_final else None
    row, segment, group, head, _, split = program_index(params, 1, params.config.width_splits)
    columns = params.columns(split)
    states = params.states
    A, D, bias, row_length = A_ref[head], D_ref[head], bias_ref[head], lengths_ref[row]

    def body(chunk: Array, state: Array) -> Array:
        index = segment * params.num_chunks + chunk
        positions = Span(index * params.chunk, params.chunk, params.length)
        delta = load_steps(dt_ref, row, positions, head, bias, row_length).delta
        decays = chunk_decays(params, delta * A, load_histories(params, numbers_ref, row, index))
        if keep_states:
            when = chunk != 0 if params.starts_from_zero else None
            store_tile(rest[0], state, row, index, head, columns, states, when=when)
        B, C = (load_tile(ref, row, positions, group, states) for ref in (B_ref, C_ref))
        mixed = mask_tile(params, params.dot(C, B, trans_b=True) * decays.between, decays.between)
        y = apply_decay(params, decays.from_start[:, None], params.dot(C, state.astype(C.dtype), trans_b=True))
        x = load_tile(x_ref, row, positions, head, columns)
        y += params.dot(mixed.astype(x.dtype), scaled(x, delta)) + D * x.astype(jnp.float32)
        state = _update_state(params, state, decays.to_end, decays.total, delta, x, B)
        store_tile(y_ref, y, row, positions, head, columns)
        return state

    if initial_ref is None:
        state = jnp.zeros((columns.count, states.count), jnp.float32)
    else:
        state = load_tile(initial_ref, row, segment, head, columns, states)
    state = jax.lax.fori_loop(0, params.num_chunks, body, state)
    if final_ref is not None:
        store_tile(final_ref, state, row, segment, head, columns, states)


def _call(
    params: KernelParams, kernel: Any, arguments: list[Array | None], out_shapes: list[Any], name: str
) -> list[Array]:
    return triton_call(
        functools.partial(kernel, params),
        arguments,
        out_shapes,
        grid=grid_size(params, 1, params.config.width_splits),
        num_warps=params.config.forward_warps,
        num_stages=params.config.num_stages,
        interpret=params.interpret,
        name=name,
    )


def _forward(params: KernelParams, keep_states: bool, *inputs: Any) -> tuple[Outputs, Array | None]:
    """Returns the outputs, and the state before each chunk [b, k, h, p, n] if it is kept."""
    x, dt, A, B, C, D, dt_bias, initial, lengths, numbers = inputs
    state_shape = (params.heads, params.width, params.state_width)
    before = None if initial is None else initial[:, None]
    if params.segments > 1:
        state_update, log_total = _call(
            params,
            _segment_kernel,
            [x, dt, A, B, dt_bias, lengths, numbers],
            [
                ((params.batch, params.segments, *state_shape), jnp.float32),
                ((params.batch, params.segments, params.heads), jnp.float32),
            ],
            "ssd_segments",
        )
        before = states_before(state_update, log_total, initial, uncut=uncut_segments(params, numbers))
    shapes = [(x.shape, x.dtype)]
    if params.wants_final:
        shapes.append(((params.batch, params.segments, *state_shape), jnp.float32))
    if keep_states:
        shapes.append(((params.batch, params.all_chunks, *state_shape), jnp.float32))
    y, *rest = _call(
        params,
        lambda params, *refs: _forward_kernel(params, keep_states, *refs),
        [x, dt, A, B, C, D, dt_bias, lengths, before, numbers],
        shapes,
        "ssd_forward",
    )
    final = rest.pop(0)[:, -1] if params.wants_final else None
    return (y, final), rest[0] if keep_states else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(params: KernelParams, *inputs: Array | None) -> Outputs:
    return _forward(params.without_gradient, False, *inputs)[0]


def _ssd_fwd(params: KernelParams, *inputs: Array | None) -> tuple[Outputs, tuple[Any, ...]]:
    outputs, states = _forward(params, True, *inputs)
    return outputs, (*inputs, states)


def _ssd_bwd(params: KernelParams, residuals: tuple[Any, ...], cotangents: Outputs) -> tuple[Array | None, ...]:
    return backward(params, residuals, cotangents)


_ssd.defvjp(_ssd_fwd, _ssd_bwd)


def _checked_config(x: Array, B: Array, chunk_size: int, precision: str, config: SsdConfig | None) -> SsdConfig:
    """Returns how the work on x [b, l, h, p] and B [b, l, g, n] is divided, if the kernels can do it."""
    batch, length, heads, width = x.shape
    groups, state_width = B.shape[2:]
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the Triton kernels take float32 or bfloat16: use implementation='xla'")
    for name, size in (("p", width), ("n", state_width)):
        if size > MAX_WIDTH:
            raise ValueError(f"{name}={size} is over the {MAX_WIDTH} of the Triton kernels: use implementation='xla'")
    config = config or default_config(
        batch=batch,
        length=length,
        heads=heads,
        groups=groups,
        width=width,
        state_width=state_width,
        chunk_size=chunk_size,
        exact_products=precision == "float32" and x.dtype == jnp.float32,
        itemsize=x.dtype.itemsize,
    )
    config.check(heads_per_group=heads // groups, width=width)
    return config


def ssd_pallas_triton(
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
    interpret: bool | None = None,
    config: SsdConfig | None = None,
) -> Outputs:
    """Runs the operator of `kernels.ssd.ssd`, softplus, bias and skip included; arguments are as there.

    Args:
      B: [b, l, g, n], as C.

    Returns:
      y [b, l, h, p] in the dtype of x, and the final state [b, h, p, n] in float32, or None where it is not wanted.

    Raises:
      ValueError: for dtypes, widths, a precision or a config that the kernels do not offer.
    """
    tiles = tile_precision(precision)
    params = KernelParams(
        *x.shape[:3],
        groups=B.shape[2],
        width=x.shape[3],
        state_width=B.shape[3],
        config=_checked_config(x, B, chunk_size, tiles, config),
        precision=tiles,
        interpret=interpreted(interpret),
        has_initial=initial_state is not None,
        wants_final=return_final_state,
        packed=segment_ids is not None,
    )
    zeros = jnp.zeros(x.shape[2], jnp.float32)
    read = max(divided.all_chunks * divided.chunk for divided in (params, params.without_gradient))
    inputs = (
        x,
        dt.astype(jnp.float32),
        A.astype(jnp.float32),
        B.astype(x.dtype),
        C.astype(x.dtype),
        zeros if D is None else D.astype(jnp.float32),
        zeros if dt_bias is None else dt_bias.astype(jnp.float32),
        None if initial_state is None else initial_state.astype(jnp.float32),
        row_lengths(segment_ids, x.shape[:2]),
        history_numbers(params.length, read, segment_ids),
    )
    # What has been made here varies over no mesh axis yet.
    return _ssd(params, *pvary_together(*inputs))
