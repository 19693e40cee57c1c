"""State space duality by Gluon kernels: the forward pass, and how both passes are put together.

A warp goes through a row (or a segment of one), 16 positions at a time, with a head's state [p, n] in registers, as
sums of the tensor cores have it. Tiles of x and y are turned, [p, 16], so that all four products are a b^T of tiles in
that layout, and nothing goes through shared memory:

  scores = C B^T [16, 16],   y^T = from_start o (state C^T) + x^T (decays o scores)^T,
  state' = total state + x^T (to_end o B)

Positions behind the last whole chunk are a last step of its own, so that all others need no masks. Programs are of the
warps of some heads of one row, which read B and C from the same cache lines. Few long rows are cut into segments as in
`pallas_triton`, which this follows in what it keeps and offers.
"""

# Kernels are of Gluon's own language, in which constants are given as plain numbers.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportReturnType=false

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import kernels.gluon
from kernels.dispatch import Precision, pvary_together
from kernels.gluon import fragment, lane_at, lane_numbers, lane_sums, per_warp, product, same_in_warp, to_columns
from kernels.segment_ids import row_lengths
from kernels.ssd.config import DEFAULT_CHUNK_SIZE, MAX_WIDTH, GluonConfig, default_gluon_config
from kernels.ssd.gluon_tiles import (
    GluonParams,
    decays_between,
    edge_decays,
    lane_slots,
    load_histories,
    load_inside,
    load_steps,
    log2_sums,
    slot_column,
    slot_head,
    tile_columns,
    tile_rows,
    tile_slots,
)
from kernels.ssd.gluon_vjp import backward, check_wgmma, that_fits
from kernels.ssd.tiles import history_numbers, states_before, uncut_segments
from kernels.triton import DTYPES, tile_precision

Outputs = tuple[Array, Array | None]


@gluon.jit
def _load_maps(row, positions, n, group, GROUPS: gl.constexpr, STATE_WIDTH: gl.constexpr, STATES: gl.constexpr):
    """A tile of B or C, either way round."""
    at = positions * (GROUPS * STATE_WIDTH) + (group * STATE_WIDTH + n)
    return load_inside(row + at, n < STATE_WIDTH, STATES != STATE_WIDTH)


@gluon.jit
def _outputs(state, x, B, C, D, delta, from_start, between, reached, EXACT: gl.constexpr, PACKED: gl.constexpr):
    """y^T [W, p, 16] of a chunk."""
    W: gl.constexpr = x.shape[0]
    # What was before the chunk.
    y = product(state.to(C.dtype), C, gl.zeros([W, x.shape[1], 16], gl.float32, fragment(W)), EXACT)
    from_start = to_columns(from_start)[:, None, :]
    y *= from_start
    if PACKED:
        # 0 wins, also over what has overflowed in another history.
        y = gl.where(from_start == 0.0, 0.0, y)
    # The chunk's own positions.
    scores = product(C, B, gl.zeros([W, 16, 16], gl.float32, fragment(W)), EXACT)
    mixed = gl.where(reached, scores * (between * to_columns(delta)[:, None, :]), 0.0)
    return product(x, mixed.to(x.dtype), y, EXACT) + D * x.to(gl.float32)


@gluon.jit
def _chunk(
    state, log_total, first, x_row, dt_row, B_row, C_row, y_row, numbers_row, A, bias, D, row_length, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr, EXACT: gl.constexpr, PACKED: gl.constexpr,
    OUTPUTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """One step of 16 positions; returns the next state and the sum of log decays."""
    slot = tile_slots(first_slot, W)
    head = slot_head(slot, WIDTH, COLUMNS)
    group = head // (HEADS // GROUPS)
    column = slot_column(slot, WIDTH, COLUMNS) + tile_rows(COLUMNS, W)
    across = first + tile_columns(16, W)
    down = first + tile_rows(16, W)
    written = (across < LENGTH) & (column < WIDTH)
    if TAIL:
        # The last position stands in for those behind the row's end, with a step of 0.
        across = gl.minimum(across, LENGTH - 1)
        down = gl.minimum(down, LENGTH - 1)
    x_at = across * (HEADS * WIDTH) + (head * WIDTH + column)
    x = load_inside(x_row + x_at, column < WIDTH, WIDTH % COLUMNS != 0)
    B_turned = _load_maps(B_row, across, tile_rows(STATES, W), group, GROUPS, STATE_WIDTH, STATES)

    delta, _ = load_steps(dt_row, bias, row_length, first, first_slot, LENGTH, HEADS, WIDTH, COLUMNS, W, TAIL)
    log_decay = delta * A
    number, first_number, last_number = load_histories(numbers_row, first, W, PACKED)
    coarse, fine = log2_sums(log_decay, number, EXACT, PACKED)
    from_start, to_end, decay = edge_decays(coarse, fine, number, first_number, last_number, EXACT, PACKED)

    if OUTPUTS:
        B = _load_maps(B_row, down, tile_columns(STATES, W), group, GROUPS, STATE_WIDTH, STATES)
        C = _load_maps(C_row, down, tile_columns(STATES, W), group, GROUPS, STATE_WIDTH, STATES)
        between, reached = decays_between(coarse, fine, number, EXACT, PACKED)
        y = _outputs(state, x, B, C, D, delta, from_start, between, reached, EXACT, PACKED).to(x.dtype)
        if TAIL or WIDTH % COLUMNS != 0:
            gl.store(y_row + x_at, y, mask=written)
        else:
            gl.store(y_row + x_at, y)

    added = (B_turned.to(gl.float32) * to_columns(to_end * delta)[:, None, :]).to(x.dtype)
    decay = same_in_warp(decay)[:, None, None]
    state *= decay
    if PACKED:
        state = gl.where(decay == 0.0, 0.0, state)
    return product(x, added, state, EXACT), log_total + log_decay


@gluon.jit
def _keep_state(
    state, of_row, size, state_at, inside, chunk, BLOCK: gl.constexpr, KEEP: gl.constexpr, HAS_BEFORE: gl.constexpr
):  # fmt: skip
    """Stores the state before a chunk with which a block begins, unless it is the zeros before a row."""
    if KEEP:  # noqa: SIM102 (known when the kernel is compiled, the other one when it runs)
        if (chunk % (BLOCK // 16) == 0) & (HAS_BEFORE | (chunk > 0)):
            gl.store(of_row + chunk // (BLOCK // 16) * size + state_at, state, mask=inside)


@gluon.jit
def ssd_forward(
    x, dt, A, B, C, D, bias, lengths, before, numbers, y, final, states, logs,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr, SEGMENTS: gl.constexpr, SEGMENT_CHUNKS: gl.constexpr,
    EXACT: gl.constexpr, PACKED: gl.constexpr, BLOCK: gl.constexpr, HAS_BEFORE: gl.constexpr, FINAL: gl.constexpr,
    KEEP: gl.constexpr, OUTPUTS: gl.constexpr,
):  # fmt: skip
    """The outputs, the final state and the states before blocks; or what a segment adds to its state, and its decay."""
    # Neighbours share a row, so that its B and C stay in the cache.
    parts: gl.constexpr = HEADS * ((WIDTH + COLUMNS - 1) // COLUMNS) // W
    program = gl.program_id(0)
    first_slot = program % parts * W
    segment = program // parts % SEGMENTS
    row = program // (parts * SEGMENTS)
    wide_row = row.to(gl.int64)
    x_row = x + wide_row * (LENGTH * HEADS * WIDTH)
    y_row = y + wide_row * (LENGTH * HEADS * WIDTH)
    dt_row = dt + wide_row * (LENGTH * HEADS)
    B_row = B + wide_row * (LENGTH * GROUPS * STATE_WIDTH)
    C_row = C + wide_row * (LENGTH * GROUPS * STATE_WIDTH)
    numbers_row = numbers + wide_row * (SEGMENTS * SEGMENT_CHUNKS * 16 + 1)

    slot = tile_slots(first_slot, W)
    head = slot_head(slot, WIDTH, COLUMNS)
    lane_head = slot_head(lane_slots(first_slot, W), WIDTH, COLUMNS) + lane_numbers(W) * 0
    decay_rate = gl.load(A + lane_head)
    lane_bias = gl.load(bias + lane_head)
    skip = gl.load(D + head)
    row_length = gl.minimum(gl.load(lengths + row), LENGTH)

    # [p, n] of a head.
    column = slot_column(slot, WIDTH, COLUMNS) + tile_rows(COLUMNS, W)
    n = tile_columns(STATES, W)
    state_at = (head * WIDTH + column) * STATE_WIDTH + n
    inside = (column < WIDTH) & (n < STATE_WIDTH)
    size: gl.constexpr = HEADS * WIDTH * STATE_WIDTH
    ragged: gl.constexpr = (WIDTH % COLUMNS != 0) or (STATE_WIDTH != STATES)
    state = gl.zeros([W, COLUMNS, STATES], gl.float32, fragment(W))
    if HAS_BEFORE:
        state += load_inside(before + (wide_row * SEGMENTS + segment) * size + state_at, inside, ragged)
    log_total = gl.zeros_like(decay_rate)

    begin = segment * SEGMENT_CHUNKS
    end = gl.minimum(begin + SEGMENT_CHUNKS, (LENGTH + 15) // 16)
    whole = gl.minimum(end, LENGTH // 16)
    states_row = states + wide_row * ((LENGTH + BLOCK - 1) // BLOCK * size)
    for chunk in range(begin, whole):
        _keep_state(state, states_row, size, state_at, inside, chunk, BLOCK, KEEP, HAS_BEFORE)
        state, log_total = _chunk(
            state, log_total, chunk * 16, x_row, dt_row, B_row, C_row, y_row, numbers_row, decay_rate, lane_bias, skip,
            row_length, first_slot, LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W, EXACT, PACKED,
            OUTPUTS, False,
        )  # fmt: skip
    if LENGTH % 16 != 0:  # noqa: SIM102 (known when the kernel is compiled, the other one when it runs)
        if whole < end:
            _keep_state(state, states_row, size, state_at, inside, whole, BLOCK, KEEP, HAS_BEFORE)
            state, log_total = _chunk(
                state, log_total, whole * 16, x_row, dt_row, B_row, C_row, y_row, numbers_row, decay_rate, lane_bias,
                skip, row_length, first_slot, LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W, EXACT,
                PACKED, OUTPUTS, True,
            )  # fmt: skip
    if FINAL:
        gl.store(final + (wide_row * SEGMENTS + segment) * size + state_at, state, mask=inside)
    if not OUTPUTS:
        # Warps that share a head write the same number.
        total = lane_at(lane_sums(log_total, lane_head, False), 15)
        slot = first_slot + gl.arange(0, W, per_warp(W))
        at = (wide_row * SEGMENTS + segment) * HEADS + slot_head(slot, WIDTH, COLUMNS)
        gl.store(logs + at, same_in_warp(total))


def _call(params: GluonParams, arguments: list[Any], out_shapes: list[Any], name: str, **flags: bool) -> list[Any]:
    return kernels.gluon.launch(
        ssd_forward,
        arguments,
        out_shapes,
        grid=params.grid,
        num_warps=params.config.warps,
        constants=params.constants | {"BLOCK": params.config.block} | flags,
        maxnreg=params.config.forward_registers,
        name=name,
    )


def _forward(params: GluonParams, keep_states: bool, *inputs: Any) -> tuple[Outputs, Array | None]:
    """Returns the outputs, and the state before each block [b, k, h, p, n] if it is kept and there is one."""
    x, dt, A, B, C, D, dt_bias, initial, lengths, numbers = inputs
    state_shape = (params.heads, params.width, params.state_width)
    by_segment = ((params.batch, params.segments, *state_shape), jnp.float32)
    before = None if initial is None else initial[:, None]
    arguments = [x, dt, A, B, C, D, dt_bias, lengths, before, numbers]
    if params.segments > 1:
        logs = ((params.batch, params.segments, params.heads), jnp.float32)
        flags = {"HAS_BEFORE": False, "FINAL": True, "KEEP": False, "OUTPUTS": False}
        arguments[8] = None
        _, added, _, log_total = _call(params, arguments, [None, by_segment, None, logs], "ssd_segments", **flags)
        arguments[8] = states_before(added, log_total, initial, uncut=uncut_segments(params, numbers))
    keep = keep_states and not (params.starts_from_zero and params.blocks == 1)
    kept = ((params.batch, params.blocks, *state_shape), jnp.float32) if keep else None
    flags = {"HAS_BEFORE": arguments[8] is not None, "FINAL": params.wants_final, "KEEP": keep, "OUTPUTS": True}
    shapes = [(x.shape, x.dtype), by_segment if params.wants_final else None, kept, None]
    y, final, states, _ = _call(params, arguments, shapes, "ssd_forward", **flags)
    return (y, None if final is None else final[:, -1]), states


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(params: GluonParams, *inputs: Array | None) -> Outputs:
    return _forward(params, False, *inputs)[0]


def _ssd_fwd(params: GluonParams, *inputs: Array | None) -> tuple[Outputs, tuple[Any, ...]]:
    outputs, states = _forward(params, True, *inputs)
    return outputs, (*inputs, states)


_ssd.defvjp(_ssd_fwd, backward)


def _checked_config(x: Array, B: Array, exact: bool, config: GluonConfig | None) -> GluonConfig:
    """Returns how the work on x [b, l, h, p] and B [b, l, g, n] is divided, if the kernels can do it."""
    batch, length, heads, width = x.shape
    state_width = B.shape[3]
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the Gluon kernels take float32 or bfloat16: use implementation='xla'")
    for name, size in (("p", width), ("n", state_width)):
        if size > MAX_WIDTH:
            raise ValueError(f"{name}={size} is over the {MAX_WIDTH} of the Gluon kernels: use implementation='xla'")
    if config is None:
        return default_gluon_config(
            batch=batch,
            length=length,
            heads=heads,
            width=width,
            state_width=state_width,
            exact_products=exact and x.dtype == jnp.float32,
        )
    if not isinstance(config, GluonConfig):
        raise ValueError(f"config={config!r}: the Gluon kernels take a GluonConfig, or None")
    config.check(heads=heads, width=width)
    return config


def ssd_gluon(
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
    config: GluonConfig | None = None,
) -> Outputs:
    """Runs the operator of `kernels.ssd.ssd`, softplus, bias and skip included; arguments are as there.

    Args:
      B: [b, l, g, n], as C.
      chunk_size: changes nothing: chunks are of 16 positions.

    Returns:
      y [b, l, h, p] in the dtype of x, and the final state [b, h, p, n] in float32, or None where it is not wanted.

    Raises:
      ValueError: for dtypes, widths, a precision or a config that the kernels do not offer.
    """
    exact = tile_precision(precision) == "float32"
    params = GluonParams(
        *x.shape[:3],
        groups=B.shape[2],
        width=x.shape[3],
        state_width=B.shape[3],
        config=_checked_config(x, B, exact, config),
        exact=exact,
        has_initial=initial_state is not None,
        wants_final=return_final_state,
        packed=segment_ids is not None,
    )
    if config is None:
        params = that_fits(params, x.dtype)
    else:
        check_wgmma(params, x.dtype)
    zeros = jnp.zeros(x.shape[2], jnp.float32)
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
        history_numbers(params.length, params.all_chunks * params.chunk, segment_ids),
    )
    # What has been made here varies over no mesh axis yet.
    return _ssd(params, *pvary_together(*inputs))
