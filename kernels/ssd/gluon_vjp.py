"""State space duality by Gluon kernels: the backward pass.

A warp goes through the chunks of its head's row (or segment) from the last to the first, and carries the gradient R
[p, n] of the state after the chunk, and R^T beside it: the one product of `kernels.gluon` sums over columns, which p
and n are in turn. Before each block it goes through the block forwards from the state that was kept, and leaves the
state before each chunk, turned as well, in memory of its own, where every lane finds what it wrote itself. With u =
delta x, M = L o (C B^T), G = dy u^T and the states S before a chunk,

  du = M^T dy + to_end (B R^T),    dB = (L o G)^T C + to_end (u R),    dC = (L o G) B + from_start (dy S)
  R' = total R + sum_i from_start_i dy_i C_i^T

The gradient of a log decay is all that flows over its position, summed up from what does and nothing else. The heads of
a program add up their gradients of B and C, always in the same order.
"""

# Kernels are of Gluon's own language, in which constants are given as plain numbers.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportReturnType=false

from typing import Any

import jax.numpy as jnp
from jax import Array
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import kernels.gluon
from kernels.gluon import (
    exp2,
    fragment,
    fragment_rows,
    lane_at,
    lane_numbers,
    lane_sums,
    lane_sums_before,
    lane_sums_from,
    per_warp,
    product,
    rows_to_lanes,
    same_in_warp,
    to_columns,
    to_rows,
    warp_to_lanes,
)
from kernels.ssd.gluon_tiles import (
    GluonParams,
    decays_between,
    edge_decays,
    lane_slots,
    load_histories,
    load_inside,
    load_maps,
    load_steps,
    log2_sums,
    slot_column,
    slot_head,
    tile_columns,
    tile_rows,
    tile_slots,
)
from kernels.ssd.tiles import states_before, uncut_segments


@gluon.jit
def _masked(tile, factor, PACKED: gl.constexpr):
    """Among several histories 0 where a factor is, also where the tile has overflowed."""
    if PACKED:
        return gl.where(factor == 0.0, 0.0, tile)
    return tile


@gluon.jit
def _load_dy(row, positions, at, column, LENGTH: gl.constexpr, WIDTH: gl.constexpr, COLUMNS: gl.constexpr):
    """A tile of dy, 0 behind the row's end."""
    if LENGTH % 16 != 0 or WIDTH % COLUMNS != 0:
        return gl.load(row + at, mask=(positions < LENGTH) & (column < WIDTH), other=0.0)
    return gl.load(row + at)


@gluon.jit
def _swept(
    T, chunk, x_row, dt_row, B_row, numbers_row, A, bias, row_length, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr, EXACT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The turned state [n, p] after a whole chunk, from that before it."""
    first = chunk * 16
    slot = tile_slots(first_slot, W)
    head = slot_head(slot, WIDTH, COLUMNS)
    across = first + tile_columns(16, W)
    column = slot_column(slot, WIDTH, COLUMNS) + tile_rows(COLUMNS, W)
    x = load_inside(x_row + (across * (HEADS * WIDTH) + (head * WIDTH + column)), column < WIDTH, WIDTH % COLUMNS != 0)
    group = head // (HEADS // GROUPS)
    B = load_maps(B_row, across, tile_rows(STATES, W), group, GROUPS, STATE_WIDTH, STATES)
    delta, _ = load_steps(dt_row, bias, row_length, first, first_slot, LENGTH, HEADS, WIDTH, COLUMNS, W, False)
    number, first_number, last_number = load_histories(numbers_row, first, W, PACKED)
    coarse, fine = log2_sums(delta * A, number, EXACT, PACKED)
    _, to_end, total = edge_decays(coarse, fine, number, first_number, last_number, EXACT, PACKED)
    total = total[:, None, None]
    added = (B.to(gl.float32) * to_columns(to_end * delta)[:, None, :]).to(B.dtype)
    return product(added, x, _masked(T * total, total, PACKED), EXACT)


@gluon.jit
def _store_maps(
    out, tile, first, group, GROUPS: gl.constexpr, STATE_WIDTH: gl.constexpr, LENGTH: gl.constexpr
):  # fmt: skip
    """Adds up the warps' tiles [W, 16, n] of one group in their order, and stores the sum."""
    total = gl.sum(tile, axis=0)
    layout: gl.constexpr = total.type.layout
    position = first + gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    n = gl.arange(0, tile.shape[2], gl.SliceLayout(0, layout))[None, :]
    at = position * (GROUPS * STATE_WIDTH) + (group * STATE_WIDTH + n)
    gl.store(out + at, total, mask=(position < LENGTH) & (n < STATE_WIDTH))


@gluon.jit
def _squares(x, dy, B, C, delta, coarse, fine, number, EXACT: gl.constexpr, PACKED: gl.constexpr):
    """(L o G), its transpose, M^T, and what flows over each position inside the chunk."""
    W: gl.constexpr = x.shape[0]
    zeros = gl.zeros([W, 16, 16], gl.float32, fragment(W))
    between, reached = decays_between(coarse, fine, number, EXACT, PACKED)
    d_scores = gl.where(reached, product(dy, x, zeros, EXACT) * (between * to_columns(delta)[:, None, :]), 0.0)
    # Rows are j and columns i from here on.
    log2 = to_columns(coarse)[:, None, :] - to_rows(coarse)[:, :, None]
    if EXACT:
        log2 += to_columns(fine)[:, None, :] - to_rows(fine)[:, :, None]
    row = tile_rows(16, W)
    column = tile_columns(16, W)
    reached = row <= column
    if PACKED:
        reached &= to_rows(number)[:, :, None] == to_columns(number)[:, None, :]
    between = exp2(log2)
    scores = product(B, C, zeros, EXACT)
    d_scores_turned = gl.where(reached, product(x, dy, zeros, EXACT) * (between * to_rows(delta)[:, :, None]), 0.0)
    mixed = gl.where(reached, scores * between, 0.0)
    flows = gl.where(reached & (row < column), d_scores_turned * scores, 0.0)
    # Over t flows what leaves j < t for i >= t.
    arrived = gl.where(row <= column, 1.0, 0.0) + zeros
    over = product(arrived, flows, zeros, EXACT)
    return d_scores, d_scores_turned, mixed, gl.sum(gl.where(column < row, over, 0.0), axis=2)


@gluon.jit
def _chunk_back(
    R, Q, T, sum_A, sum_D, chunk, x_row, dt_row, B_row, C_row, dy_row, numbers_row, dx_row, ddt_row, dB_row, dC_row,
    A, bias, D, row_length, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr, EXACT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One chunk, given the turned state T before it; returns what is carried on to the chunk before."""
    TAIL: gl.constexpr = LENGTH % 16 != 0
    first = chunk * 16
    slot = tile_slots(first_slot, W)
    head, column = slot_head(slot, WIDTH, COLUMNS), slot_column(slot, WIDTH, COLUMNS)
    group = head // (HEADS // GROUPS)
    down, across = first + tile_rows(16, W), first + tile_columns(16, W)
    down_inside, across_inside = down, across
    if TAIL:
        down_inside, across_inside = gl.minimum(down, LENGTH - 1), gl.minimum(across, LENGTH - 1)
    p_across, p_down = column + tile_columns(COLUMNS, W), column + tile_rows(COLUMNS, W)
    at = down_inside * (HEADS * WIDTH) + (head * WIDTH + p_across)
    at_turned = across_inside * (HEADS * WIDTH) + (head * WIDTH + p_down)
    n_down, n_across = tile_rows(STATES, W), tile_columns(STATES, W)
    x = load_inside(x_row + at, p_across < WIDTH, WIDTH % COLUMNS != 0)
    dy = _load_dy(dy_row, down, at, p_across, LENGTH, WIDTH, COLUMNS)
    B = load_maps(B_row, down_inside, n_across, group, GROUPS, STATE_WIDTH, STATES)
    C = load_maps(C_row, down_inside, n_across, group, GROUPS, STATE_WIDTH, STATES)

    delta, slope = load_steps(dt_row, bias, row_length, first, first_slot, LENGTH, HEADS, WIDTH, COLUMNS, W, TAIL)
    number, first_number, last_number = load_histories(numbers_row, first, W, PACKED)
    coarse, fine = log2_sums(delta * A, number, EXACT, PACKED)
    from_start, to_end, total = edge_decays(coarse, fine, number, first_number, last_number, EXACT, PACKED)
    d_scores, d_scores_turned, mixed, inside = _squares(x, dy, B, C, delta, coarse, fine, number, EXACT, PACKED)
    passed = total * gl.sum(gl.sum(Q * T, axis=2), axis=1)
    d_log = rows_to_lanes(inside) + warp_to_lanes(_masked(passed, total, PACKED))

    # Gradient of C, and what flows from before the chunk.
    maps = gl.zeros([W, 16, STATES], gl.float32, fragment(W))
    factor = to_rows(from_start)[:, :, None]
    dC = _masked(product(dy, T.to(dy.dtype), maps, EXACT) * factor, factor, PACKED)
    d_log += lane_sums_from(rows_to_lanes(gl.sum(dC * C.to(gl.float32), axis=2)))
    B_turned = load_maps(B_row, across_inside, n_down, group, GROUPS, STATE_WIDTH, STATES)
    dC = product(d_scores.to(x.dtype), B_turned, dC, EXACT)
    of_group = first_slot // (HEADS // GROUPS * ((WIDTH + COLUMNS - 1) // COLUMNS))
    _store_maps(dC_row, dC, first, of_group, GROUPS, STATE_WIDTH, LENGTH)

    # Gradient of B, and what flows on behind the chunk.
    factor = to_rows(to_end * delta)[:, :, None]
    dB = _masked(product(x, Q.to(x.dtype), maps, EXACT) * factor, factor, PACKED)
    d_log += lane_sums_before(rows_to_lanes(gl.sum(dB * B.to(gl.float32), axis=2)))
    C_turned = load_maps(C_row, across_inside, n_down, group, GROUPS, STATE_WIDTH, STATES)
    dB = product(d_scores_turned.to(x.dtype), C_turned, dB, EXACT)
    _store_maps(dB_row, dB, first, of_group, GROUPS, STATE_WIDTH, LENGTH)

    # Gradients of the inputs and the steps.
    dy_turned = _load_dy(dy_row, across, at_turned, p_down, LENGTH, WIDTH, COLUMNS)
    factor = to_rows(to_end)[:, :, None]
    du = product(B, R.to(B.dtype), gl.zeros([W, 16, COLUMNS], gl.float32, fragment(W)), EXACT)
    du = product(mixed.to(x.dtype), dy_turned, _masked(du * factor, factor, PACKED), EXACT)
    x_wide, dy_wide = x.to(gl.float32), dy.to(gl.float32)
    dx = (to_rows(delta)[:, :, None] * du + D * dy_wide).to(x.dtype)
    gl.store(dx_row + at, dx, mask=(down < LENGTH) & (p_across < WIDTH))
    d_delta = A * d_log + rows_to_lanes(gl.sum(x_wide * du, axis=2))
    position = first + lane_numbers(W)
    at = position * HEADS + slot_head(lane_slots(first_slot, W), WIDTH, COLUMNS)
    gl.store(ddt_row + at, d_delta * slope, mask=position < LENGTH)

    # Gradient of the state before the chunk, both ways round.
    asked = (C_turned.to(gl.float32) * to_columns(from_start)[:, None, :]).to(x.dtype)
    total = total[:, None, None]
    R = product(dy_turned, asked, _masked(R * total, total, PACKED), EXACT)
    Q = product(asked, dy_turned, _masked(Q * total, total, PACKED), EXACT)
    return R, Q, sum_A + d_log * delta, sum_D + gl.sum(x_wide * dy_wide, axis=2)


@gluon.jit
def _load_state(pointer, at, inside, IS_THERE: gl.constexpr):
    """A state, or its gradient, either way round; zeros unless it is there."""
    state = gl.zeros(at.shape, gl.float32, at.type.layout)
    if IS_THERE:
        state += gl.load(pointer + at, mask=inside, other=0.0)
    return state


@gluon.jit
def _store_sums(
    dA, dD, sum_A, sum_D, row, segment, first_slot, HEADS: gl.constexpr, WIDTH: gl.constexpr, COLUMNS: gl.constexpr,
    W: gl.constexpr, SEGMENTS: gl.constexpr, BATCH: gl.constexpr,
):  # fmt: skip
    """Stores a warp's gradients of A and D."""
    slot = first_slot + gl.arange(0, W, per_warp(W))
    split = slot % ((WIDTH + COLUMNS - 1) // COLUMNS)
    at = ((split * BATCH + row) * SEGMENTS + segment) * HEADS + slot_head(slot, WIDTH, COLUMNS)
    gl.store(dA + at, same_in_warp(lane_at(lane_sums(sum_A, lane_numbers(W), False), 15)))
    gl.store(dD + at, gl.sum(sum_D, axis=1))


@gluon.jit
def _sweep_block(
    held, held_tile, T, count, first_chunk, x_row, dt_row, B_row, numbers_row, A, bias, row_length, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr, EXACT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Leaves the turned state before each chunk of a block in the program's memory."""
    gl.store(held + held_tile, T)
    for k in range(count - 1):
        T = _swept(
            T, first_chunk + k, x_row, dt_row, B_row, numbers_row, A, bias, row_length, first_slot, LENGTH, HEADS,
            GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W, EXACT, PACKED,
        )  # fmt: skip
        gl.store(held + (k + 1) * (W * STATES * COLUMNS) + held_tile, T)


@gluon.jit
def ssd_backward(
    x, dt, A, B, C, D, bias, lengths, numbers, states, dy, after,
    dx, ddt, dB, dC, dA, dD, d_initial, scratch,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr, SEGMENTS: gl.constexpr, SEGMENT_CHUNKS: gl.constexpr,
    EXACT: gl.constexpr, PACKED: gl.constexpr, BLOCK_CHUNKS: gl.constexpr, BATCH: gl.constexpr, KEPT: gl.constexpr,
    FIRST_KEPT: gl.constexpr, HAS_AFTER: gl.constexpr, INITIAL: gl.constexpr,
):  # fmt: skip
    """All gradients; those of B and C by program, of dt and the parameters by warp."""
    splits: gl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = gl.program_id(0)
    parts: gl.constexpr = HEADS * splits // W
    first_slot, segment, row = program % parts * W, program // parts % SEGMENTS, program // (parts * SEGMENTS)
    wide_row = row.to(gl.int64)
    of_values, of_maps = wide_row * (LENGTH * HEADS * WIDTH), wide_row * (LENGTH * GROUPS * STATE_WIDTH)
    x_row, dt_row, B_row = x + of_values, dt + wide_row * (LENGTH * HEADS), B + of_maps
    # Programs of one group write gradients of B and C side by side, warps of one head those of dt.
    part = (first_slot % (HEADS // GROUPS * splits) // W).to(gl.int64)
    of_sums = (part * BATCH + row) * (LENGTH * GROUPS * STATE_WIDTH)
    split = (lane_slots(first_slot, W) + lane_numbers(W) * 0) % splits
    ddt_row = ddt + (split.to(gl.int64) * BATCH + row) * (LENGTH * HEADS)
    numbers_row = numbers + wide_row * (SEGMENTS * SEGMENT_CHUNKS * 16 + 1)

    slot = tile_slots(first_slot, W)
    head = slot_head(slot, WIDTH, COLUMNS)
    lane_head = slot_head(lane_slots(first_slot, W), WIDTH, COLUMNS) + lane_numbers(W) * 0
    decay_rate, lane_bias, skip = gl.load(A + lane_head), gl.load(bias + lane_head), gl.load(D + head)
    row_length = gl.minimum(gl.load(lengths + row), LENGTH)

    # [p, n] of a head, and turned.
    column = slot_column(slot, WIDTH, COLUMNS)
    p, n = column + tile_rows(COLUMNS, W), tile_columns(STATES, W)
    at = (head * WIDTH + p) * STATE_WIDTH + n
    inside = (p < WIDTH) & (n < STATE_WIDTH)
    p_turned, n_turned = column + tile_columns(COLUMNS, W), tile_rows(STATES, W)
    at_turned = (head * WIDTH + p_turned) * STATE_WIDTH + n_turned
    inside_turned = (p_turned < WIDTH) & (n_turned < STATE_WIDTH)
    size: gl.constexpr = HEADS * WIDTH * STATE_WIDTH
    of_segment = (wide_row * SEGMENTS + segment) * size
    R = _load_state(after + of_segment, at, inside, HAS_AFTER)
    Q = _load_state(after + of_segment, at_turned, inside_turned, HAS_AFTER)
    sum_A = gl.zeros_like(decay_rate)
    sum_D = gl.zeros([W, 16], gl.float32, fragment_rows(W))
    held_tile = (tile_slots(0, W) * STATES + n_turned) * COLUMNS + tile_columns(COLUMNS, W)
    held = scratch + program.to(gl.int64) * (BLOCK_CHUNKS * W * STATES * COLUMNS)
    blocks: gl.constexpr = (LENGTH + BLOCK_CHUNKS * 16 - 1) // (BLOCK_CHUNKS * 16)
    begin = segment * (SEGMENT_CHUNKS // BLOCK_CHUNKS)
    end = gl.minimum(begin + SEGMENT_CHUNKS // BLOCK_CHUNKS, blocks)
    for back in range(end - begin):
        block = end - 1 - back
        kept = inside_turned & (FIRST_KEPT | (block > 0))
        T = _load_state(states + (wide_row * blocks + block) * size, at_turned, kept, KEPT)
        count = gl.minimum(BLOCK_CHUNKS, (LENGTH + 15) // 16 - block * BLOCK_CHUNKS)
        _sweep_block(
            held, held_tile, T, count, block * BLOCK_CHUNKS, x_row, dt_row, B_row, numbers_row, decay_rate, lane_bias,
            row_length, first_slot, LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W, EXACT, PACKED,
        )  # fmt: skip
        for back_k in range(count):
            k = count - 1 - back_k
            T = gl.load(held + k * (W * STATES * COLUMNS) + held_tile)
            R, Q, sum_A, sum_D = _chunk_back(
                R, Q, T, sum_A, sum_D, block * BLOCK_CHUNKS + k, x_row, dt_row, B_row, C + of_maps, dy + of_values,
                numbers_row, dx + of_values, ddt_row, dB + of_sums, dC + of_sums, decay_rate, lane_bias, skip,
                row_length, first_slot, LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W, EXACT, PACKED,
            )  # fmt: skip
    if INITIAL:
        gl.store(d_initial + of_segment + at, R, mask=inside)
    _store_sums(
        dA, dD, sum_A, sum_D, row, segment, first_slot, HEADS, WIDTH, COLUMNS, W, SEGMENTS, BATCH
    )  # fmt: skip


@gluon.jit
def ssd_requests(
    dt, A, C, bias, lengths, numbers, dy, asked, logs,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr, SEGMENTS: gl.constexpr, SEGMENT_CHUNKS: gl.constexpr,
    EXACT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """What a segment's outputs ask of the state before it, and the segment's total log decay."""
    parts: gl.constexpr = HEADS * ((WIDTH + COLUMNS - 1) // COLUMNS) // W
    program = gl.program_id(0)
    first_slot = program % parts * W
    segment = program // parts % SEGMENTS
    wide_row = (program // (parts * SEGMENTS)).to(gl.int64)
    dy_row = dy + wide_row * (LENGTH * HEADS * WIDTH)
    C_row = C + wide_row * (LENGTH * GROUPS * STATE_WIDTH)
    numbers_row = numbers + wide_row * (SEGMENTS * SEGMENT_CHUNKS * 16 + 1)
    slot = tile_slots(first_slot, W)
    head = slot_head(slot, WIDTH, COLUMNS)
    lane_head = slot_head(lane_slots(first_slot, W), WIDTH, COLUMNS) + lane_numbers(W) * 0
    decay_rate = gl.load(A + lane_head)
    lane_bias = gl.load(bias + lane_head)
    row_length = gl.minimum(gl.load(lengths + wide_row), LENGTH)
    p, n = slot_column(slot, WIDTH, COLUMNS) + tile_rows(COLUMNS, W), tile_columns(STATES, W)
    R = gl.zeros([W, COLUMNS, STATES], gl.float32, fragment(W))
    log_total = gl.zeros_like(decay_rate)
    begin = segment * SEGMENT_CHUNKS
    end = gl.minimum(begin + SEGMENT_CHUNKS, (LENGTH + 15) // 16)
    TAIL: gl.constexpr = LENGTH % 16 != 0
    for back in range(end - begin):
        first = (end - 1 - back) * 16
        across = first + tile_columns(16, W)
        inside = across
        if TAIL:
            inside = gl.minimum(across, LENGTH - 1)
        dy_turned = _load_dy(dy_row, across, inside * (HEADS * WIDTH) + (head * WIDTH + p), p, LENGTH, WIDTH, COLUMNS)
        group = head // (HEADS // GROUPS)
        C_turned = load_maps(C_row, inside, tile_rows(STATES, W), group, GROUPS, STATE_WIDTH, STATES)
        dt_row = dt + wide_row * (LENGTH * HEADS)
        delta, _ = load_steps(
            dt_row, lane_bias, row_length, first, first_slot, LENGTH, HEADS, WIDTH, COLUMNS, W, TAIL
        )  # fmt: skip
        number, first_number, last_number = load_histories(numbers_row, first, W, PACKED)
        coarse, fine = log2_sums(delta * decay_rate, number, EXACT, PACKED)
        from_start, _, total = edge_decays(coarse, fine, number, first_number, last_number, EXACT, PACKED)
        weighted = (C_turned.to(gl.float32) * to_columns(from_start)[:, None, :]).to(dy_turned.dtype)
        total = total[:, None, None]
        R = product(dy_turned, weighted, _masked(R * total, total, PACKED), EXACT)
        log_total += delta * decay_rate
    size: gl.constexpr = HEADS * WIDTH * STATE_WIDTH
    at = (wide_row * SEGMENTS + segment) * size + ((head * WIDTH + p) * STATE_WIDTH + n)
    gl.store(asked + at, R, mask=(p < WIDTH) & (n < STATE_WIDTH))
    # Warps that share a head write the same number.
    at = (wide_row * SEGMENTS + segment) * HEADS
    slot = first_slot + gl.arange(0, W, per_warp(W))
    gl.store(
        logs + at + slot_head(slot, WIDTH, COLUMNS), same_in_warp(lane_at(lane_sums(log_total, lane_head, False), 15))
    )


def _states_after(params: GluonParams, residuals: tuple[Any, ...], dy: Array, d_final: Array | None) -> Array | None:
    """Gradient of the state after each segment, [b, s, h, p, n], or None for zeros."""
    _, dt, A, _, C, _, dt_bias, _, lengths, numbers, _ = residuals
    if params.segments == 1:
        return None if d_final is None else d_final[:, None]
    asked, log_total = kernels.gluon.launch(
        ssd_requests,
        [dt, A, C, dt_bias, lengths, numbers, dy],
        [
            ((params.batch, params.segments, params.heads, params.width, params.state_width), jnp.float32),
            ((params.batch, params.segments, params.heads), jnp.float32),
        ],
        grid=params.grid,
        num_warps=params.config.warps,
        constants=params.constants,
        name="ssd_requests",
    )
    assert asked is not None and log_total is not None
    return states_before(asked, log_total, d_final, uncut=uncut_segments(params, numbers), reverse=True)


def backward(
    params: GluonParams, residuals: tuple[Any, ...], cotangents: tuple[Array, Array | None]
) -> tuple[Array | None, ...]:
    """Pulls the gradients of the outputs back to every input.

    Args:
      params: static numbers of the call.
      residuals: the inputs (x, dt, A, B, C, D, dt_bias, initial state or None, lengths, numbers of the histories or
        None), and the states before each block, or None where none is kept.
      cotangents: gradients by the outputs; None where there is no such output.

    Returns:
      One gradient for each input; None for integers and for what is not there.
    """
    x, dt, A, B, C, D, dt_bias, initial, lengths, numbers, states = residuals
    dy, d_final = cotangents
    dy = dy.astype(x.dtype)
    after = _states_after(params, residuals, dy, d_final)
    parts = params.heads // params.groups * params.splits // params.config.warps
    per_head = ((params.splits, params.batch, params.segments, params.heads), jnp.float32)
    maps = ((parts, *B.shape), jnp.float32)
    state_shape = ((params.batch, params.segments, params.heads, params.width, params.state_width), jnp.float32)
    block_chunks = params.config.block // params.chunk
    held = params.grid * block_chunks * params.config.warps * params.states * params.config.columns
    dx, ddt, dB, dC, dA, dD, d_initial, _ = kernels.gluon.launch(
        ssd_backward,
        [x, dt, A, B, C, D, dt_bias, lengths, numbers, states, dy, after],
        [
            (x.shape, x.dtype),
            ((params.splits, *dt.shape), jnp.float32),
            maps,
            maps,
            per_head,
            per_head,
            None if initial is None else state_shape,
            ((held,), jnp.float32),
        ],
        grid=params.grid,
        num_warps=params.config.warps,
        constants=params.constants
        | {
            "BLOCK_CHUNKS": block_chunks,
            "BATCH": params.batch,
            "KEPT": states is not None,
            "FIRST_KEPT": not params.starts_from_zero,
            "HAS_AFTER": after is not None,
            "INITIAL": initial is not None,
        },
        maxnreg=params.config.backward_registers,
        name="ssd_backward",
    )
    ddt = _add_parts(ddt)
    return (
        dx,
        ddt,
        jnp.sum(dA, axis=(0, 1, 2)),
        _add_parts(dB).astype(B.dtype),
        _add_parts(dC).astype(C.dtype),
        jnp.sum(dD, axis=(0, 1, 2)),
        jnp.sum(ddt, axis=(0, 1)),
        None if d_initial is None else d_initial[:, 0],
        None,
        None,
    )


def _add_parts(parts: Any) -> Array:
    """Adds up the first axis; alone it is taken off without a copy."""
    return parts[0] if parts.shape[0] == 1 else jnp.sum(parts, axis=0)
