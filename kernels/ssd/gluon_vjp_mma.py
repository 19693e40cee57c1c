"""State space duality by Gluon kernels: the backward pass by `mma.sync`.

A warp goes through a row (or a segment of one) from its last block of positions to its first, with the gradient R of
the state [p, n] of a head in registers. A block is swept forward once, from its kept state, to have the transposed
state S^T before each 16 positions in shared memory; then these are taken from the last to the first. With u = delta x,
M = L o (C B^T), G = dy x^T, all products are a b^T of fragments (`kernels.gluon`):

  du = M^T dy + to_end (B R^T),    dB = (L o G delta)^T C + to_end (u R),    dC = (L o G delta) B + from_start (dy S)
  R' = total R + (from_start dy)^T C

Tiles of x, dy, B and C are copied to shared memory while the step before works on its own, so that nothing waits for
the device's memory; there they are read both ways round, as R is.

The gradient of a log decay is the sum of all that flows over its position, each flow of which has passed it: nothing is
subtracted, so that nothing of what passes elsewhere is rounded into a position that nothing passes.
"""

# Kernels are of Gluon's own language, in which constants are given as plain numbers.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportReturnType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kernels.gluon import (
    fragment,
    lane_at,
    lane_numbers,
    lane_sums,
    lanes,
    per_warp,
    product,
    same_in_warp,
    to_columns,
    to_rows,
)
from kernels.ssd.gluon_tiles import (
    edge_decays,
    lane_slots,
    load_histories,
    load_raw_steps,
    log2_sums,
    slot_column,
    slot_head,
    steps_of,
    tile_columns,
    tile_rows,
    tile_slots,
)
from kernels.ssd.gluon_vjp_shared import (
    allocate,
    ask_first,
    ask_for,
    staged,
    staged_turned,
)
from kernels.ssd.gluon_vjp_tiles import (
    apply_decay,
    column_sums,
    decays_back,
    decays_on,
    dot_parts,
    lane_total,
    masked_by,
    opaque,
    row_parts,
    row_sums,
    scaled,
    store_maps,
    sums_from_rows,
    zero_behind,
)


@gluon.jit
def _sweep(
    T, x_tile, B_tile, raw, first, numbers_row, A, bias, row_length,
    W: gl.constexpr, EXACT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The transposed state [W, n, p] after a chunk."""
    x = staged_turned(x_tile, W)
    B = staged_turned(B_tile, W)
    delta, _ = steps_of(raw, bias, row_length, first)
    number, first_number, last_number = load_histories(numbers_row, first, W, PACKED)
    coarse, fine = log2_sums(delta * A, number, EXACT, PACKED)
    _, to_end, total = edge_decays(coarse, fine, number, first_number, last_number, EXACT, PACKED)
    T = apply_decay(same_in_warp(total)[:, None, None], T, PACKED)
    return product(scaled(B, to_columns(to_end * delta)[:, None, :]), x, T, EXACT)


@gluon.jit
def _gradient_of_C(
    x, dy, C, B_turned, T, from_start, delta, coarse, fine, number, first,
    LENGTH: gl.constexpr, EXACT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Gradient of C [W, 16, n], and what flows from before the chunk into each position."""
    W: gl.constexpr = x.shape[0]
    acc: gl.constexpr = fragment(W)
    dtype: gl.constexpr = x.dtype
    STATES: gl.constexpr = C.shape[2]
    # Where factors are scaled it is always the first one: it needs registers of its own, as the tensor cores want its
    # numbers in another order than they are loaded in.
    factor = to_rows(from_start)[:, :, None]
    dC = product(scaled(dy, factor), T.to(dtype), gl.zeros([W, 16, STATES], gl.float32, acc), EXACT)
    dC = masked_by(factor, dC, PACKED)
    arriving = row_sums(row_parts(dC, C.to(gl.float32)))
    weights = decays_back(coarse, fine, number, first, LENGTH, EXACT, PACKED)
    G = product(dy, x, gl.zeros([W, 16, 16], gl.float32, acc), EXACT)
    d_scores = apply_decay(weights, G * to_columns(delta)[:, None, :], PACKED)
    dC = product(d_scores.to(dtype), B_turned, dC, EXACT)
    return dC, arriving


@gluon.jit
def _inside_chunk(
    x, dy, B, C, delta_rows, coarse, fine, number, first,
    LENGTH: gl.constexpr, EXACT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The mixing factors M and the gradient of scores, turned, and what flows on from each position (row)."""
    W: gl.constexpr = x.shape[0]
    acc: gl.constexpr = fragment(W)
    # Scores and their gradients, turned: from a position (row) to a later one (column).
    scores = product(B, C, gl.zeros([W, 16, 16], gl.float32, acc), EXACT)
    G = product(scaled(x, delta_rows), dy, gl.zeros([W, 16, 16], gl.float32, acc), EXACT)
    weights = decays_on(coarse, fine, number, first, LENGTH, EXACT, PACKED)
    mixed = apply_decay(weights, scores, PACKED)
    d_scores = apply_decay(weights, G, PACKED)
    row = tile_rows(16, W)
    col = tile_columns(16, W)
    flows = gl.where(row < col, d_scores * scores, 0.0)
    if PACKED:
        flows = gl.where(weights == 0.0, 0.0, flows)
    # Of each position (row), what flows on to a later one (column) or behind it.
    until = gl.where(row <= col, 1.0, gl.zeros([W, 16, 16], gl.float32, acc))
    onward = product(flows, until, gl.zeros([W, 16, 16], gl.float32, acc), EXACT)
    return mixed, d_scores, onward


@gluon.jit
def _store_steps(
    ddt_row, onward, leaving, arriving, through, x_du, A, delta, slope, number, first, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, WIDTH: gl.constexpr, COLUMNS: gl.constexpr, W: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """Stores the gradient of the steps, and returns what a chunk adds to that of A."""
    row = tile_rows(16, W)
    col = tile_columns(16, W)
    # What flows over each position (column): from the rows before it, and into those from it on.
    over = gl.where(row < col, onward + leaving[:, :, None], arriving[:, :, None])
    if PACKED:
        # Also where what flows in another history has overflowed.
        over = gl.where(to_rows(number)[:, :, None] == to_columns(number)[:, None, :], over, 0.0)
    d_log = column_sums(over) + through
    d_delta = A * d_log + sums_from_rows(x_du)
    position = first + lane_numbers(W)
    lane_head = slot_head(lane_slots(first_slot, W), WIDTH, COLUMNS)
    gl.store(ddt_row + (position * HEADS + lane_head), d_delta * slope, mask=position < LENGTH)
    return d_log * delta


@gluon.jit
def _gradient_of_u(B, R, mixed, dy_turned, to_end, EXACT: gl.constexpr, PACKED: gl.constexpr):
    """Gradient [W, 16, p] of u = delta x."""
    W: gl.constexpr = B.shape[0]
    du = gl.zeros([W, 16, R.shape[1]], gl.float32, fragment(W))
    du = masked_by(to_end, product(scaled(B, to_end), R.to(B.dtype), du, EXACT), PACKED)
    return product(mixed.to(B.dtype), dy_turned, du, EXACT)


@gluon.jit
def _gradient_of_B(x, B, C_turned, Q, d_scores, to_end_rows, delta_rows, EXACT: gl.constexpr, PACKED: gl.constexpr):
    """Gradient of B [W, 16, n], and what flows from each position to behind the chunk."""
    W: gl.constexpr = x.shape[0]
    acc: gl.constexpr = fragment(W)
    dtype: gl.constexpr = x.dtype
    STATES: gl.constexpr = B.shape[2]
    factor = to_end_rows * delta_rows
    dB = product(scaled(x, factor), Q.to(dtype), gl.zeros([W, 16, STATES], gl.float32, acc), EXACT)
    dB = masked_by(to_end_rows, dB, PACKED)
    leaving = row_sums(row_parts(dB, B.to(gl.float32)))
    dB = product(d_scores.to(dtype), C_turned, dB, EXACT)
    return dB, leaving


@gluon.jit
def _chunk(
    R, sum_A, sum_D, kept, flow, x_tile, dy_tile, B_tile, C_tile, raw, first, dx_row, ddt_row, dB_row, dC_row,
    maps_size, numbers_row, A, bias, skip, row_length, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr, EXACT: gl.constexpr, PACKED: gl.constexpr,
    JOIN: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """All gradients of 16 positions; returns R before them, and what is added up of dA and dD."""
    dtype: gl.constexpr = dx_row.dtype.element_ty
    slot = tile_slots(first_slot, W)
    column = slot_column(slot, WIDTH, COLUMNS)
    p = tile_columns(COLUMNS, W)
    delta, slope = steps_of(raw, bias, row_length, first)
    number, first_number, last_number = load_histories(numbers_row, first, W, PACKED)
    coarse, fine = log2_sums(delta * A, number, EXACT, PACKED)
    from_start, to_end, total = edge_decays(coarse, fine, number, first_number, last_number, EXACT, PACKED)
    # Behind the row's end nothing reads.
    from_start = zero_behind(from_start, first, LENGTH)
    tile_total = same_in_warp(total)[:, None, None]
    # The state before the chunk leaves its place to R, which comes back transposed.
    T = kept.load(fragment(W))
    kept.permute((0, 2, 1)).store(R)
    Q = kept.load(fragment(W))
    # Put aside where a barrier follows, so that it is added up here: else the compiler keeps both until the end.
    flow.store(dot_parts(Q, T))
    # From the state before the chunk to its outputs; gradient of C.
    dy = staged(dy_tile, W)
    C = staged(C_tile, W)
    x = staged(x_tile, W)
    B_turned = staged_turned(B_tile, W)
    dC, arriving = _gradient_of_C(
        x, dy, C, B_turned, T, from_start, delta, coarse, fine, number, first, LENGTH, EXACT, PACKED
    )
    store_maps(dC_row, dC, first, first_slot, maps_size, LENGTH, GROUPS, STATE_WIDTH, STATES, W, JOIN, SLOTS)
    through = apply_decay(total, lane_total(flow.load(lanes(W))), PACKED)
    delta_rows = to_rows(delta)[:, :, None]
    B = staged(B_tile, W)
    mixed, d_scores, onward = _inside_chunk(x, dy, B, C, delta_rows, coarse, fine, number, first, LENGTH, EXACT, PACKED)
    # Gradient of the inputs.
    to_end_rows = to_rows(to_end)[:, :, None]
    dy_turned = staged_turned(dy_tile, W)
    du = _gradient_of_u(B, R, mixed, dy_turned, to_end_rows, EXACT, PACKED)
    wide_x = x.to(gl.float32)
    wide_dy = dy.to(gl.float32)
    x_du = row_parts(wide_x, du)
    dots = row_parts(wide_x, wide_dy)
    position = first + tile_rows(16, W)
    dx_at = dx_row + (position * (HEADS * WIDTH) + (slot_head(slot, WIDTH, COLUMNS) * WIDTH + column)) + p
    written = (position < LENGTH) & (column + p < WIDTH)
    gl.store(dx_at, (delta_rows * du + skip * wide_dy).to(dtype), mask=written)
    # From the inputs to the state after the chunk; gradient of B.
    C_turned = staged_turned(C_tile, W)
    dB, leaving = _gradient_of_B(x, B, C_turned, Q, d_scores, to_end_rows, delta_rows, EXACT, PACKED)
    store_maps(dB_row, dB, first, first_slot, maps_size, LENGTH, GROUPS, STATE_WIDTH, STATES, W, JOIN, SLOTS)
    sum_A += _store_steps(
        ddt_row, onward, leaving, arriving, through, x_du, A, delta, slope, number, first, first_slot,
        LENGTH, HEADS, WIDTH, COLUMNS, W, PACKED,
    )  # fmt: skip
    if LENGTH % 16 != 0:
        dots = gl.where((first + gl.arange(0, 16, gl.SliceLayout(0, dots.type.layout)))[None, :] < LENGTH, dots, 0.0)
    sum_D += dots
    # Gradient of the state before the chunk.
    factor = to_columns(from_start)[:, None, :]
    R = product(scaled(dy_turned, factor), C_turned, apply_decay(tile_total, R, PACKED), EXACT)
    return R, sum_A, sum_D


@gluon.jit
def _store_sums(
    dA, dD, sum_A, sum_D, row, segment, first_slot,
    BATCH: gl.constexpr, SEGMENTS: gl.constexpr, HEADS: gl.constexpr, SPLITS: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Stores what a warp has added up of the gradients of A and D."""
    slot = first_slot + gl.arange(0, W, per_warp(W))
    at = ((slot % SPLITS * BATCH + row) * SEGMENTS + segment) * HEADS + slot // SPLITS
    gl.store(dA + at, same_in_warp(lane_at(lane_sums(sum_A, lane_numbers(W), False), 15)))
    gl.store(dD + at, gl.sum(row_sums(sum_D), 1))


@gluon.jit
def _state_tiles(
    first_slot, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr, COLUMNS: gl.constexpr, STATES: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """Offsets [W, p, n] in a state, and which of them are inside."""
    slot = tile_slots(first_slot, W)
    head = slot_head(slot, WIDTH, COLUMNS)
    column = slot_column(slot, WIDTH, COLUMNS)
    p_down = column + tile_rows(COLUMNS, W)
    n_across = tile_columns(STATES, W)
    state_at = (head * WIDTH + p_down) * STATE_WIDTH + n_across
    inside = (p_down < WIDTH) & (n_across < STATE_WIDTH)
    return state_at, inside


@gluon.jit
def _sweep_block(
    raw, step, kept, x_tiles, B_tiles, before, before_inside, first_chunk, count, x_row, dt_row, B_row, numbers_row,
    decay_rate, lane_bias, row_length, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr, EXACT: gl.constexpr, PACKED: gl.constexpr,
    HAS_STATES: gl.constexpr,
):  # fmt: skip
    """Leaves the transposed state before each chunk of a block; returns dt of the last one, and steps taken."""
    T = gl.zeros([W, STATES, COLUMNS], gl.float32, fragment(W))
    if HAS_STATES:
        kept.index(0).permute((0, 2, 1)).store(gl.load(before, mask=before_inside, other=0.0))
        T += kept.index(0).load(fragment(W))
    for k in range(0, count - 1):
        async_copy.wait_group(0)
        this_raw = raw
        first = (first_chunk + k) * 16
        ask_for(
            x_tiles, B_tiles, (step + 1) & 1, x_row, B_row, first + 16, first_slot,
            LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W,
        )  # fmt: skip
        async_copy.commit_group()
        raw = load_raw_steps(dt_row, first + 16, first_slot, LENGTH, HEADS, WIDTH, COLUMNS, W, LENGTH % 16 != 0)
        kept.index(k).store(T)
        T = _sweep(
            T, x_tiles.index(step & 1), B_tiles.index(step & 1), this_raw, first, numbers_row, decay_rate,
            lane_bias, row_length, W, EXACT, PACKED,
        )  # fmt: skip
        step += 1
    kept.index(count - 1).store(T)
    return raw, step


@gluon.jit
def _chunks_of_block(
    R, sum_A, sum_D, raw, step, kept, flow, x_tiles, dy_tiles, B_tiles, C_tiles, begin, first_chunk, count, x_row,
    dt_row, B_row, C_row, dy_row, dx_row, ddt_row, dB_row, dC_row, maps_size, numbers_row, decay_rate, lane_bias, skip,
    row_length, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr, EXACT: gl.constexpr, PACKED: gl.constexpr,
    JOIN: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """All gradients of a block, from its last chunk to its first; returns what is carried on."""
    for i in range(0, count):
        k = count - 1 - i
        chunk = opaque(first_chunk + k)
        async_copy.wait_group(0)
        this_raw = raw
        # Before the first chunk there is nothing: it is read once more.
        first = gl.maximum(gl.where(k > 0, chunk - 1, first_chunk - kept.shape[0]), begin) * 16
        ask_for(
            x_tiles, B_tiles, (step + 1) & 1, x_row, B_row, first, first_slot,
            LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W,
        )  # fmt: skip
        ask_for(
            dy_tiles, C_tiles, (chunk + 1) & 1, dy_row, C_row, gl.maximum(chunk - 1, begin) * 16,
            first_slot, LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W,
        )  # fmt: skip
        async_copy.commit_group()
        raw = load_raw_steps(dt_row, first, first_slot, LENGTH, HEADS, WIDTH, COLUMNS, W, LENGTH % 16 != 0)
        R, sum_A, sum_D = _chunk(
            R, sum_A, sum_D, kept.index(k), flow, x_tiles.index(step & 1), dy_tiles.index(chunk & 1),
            B_tiles.index(step & 1), C_tiles.index(chunk & 1), this_raw, chunk * 16, dx_row, ddt_row,
            dB_row, dC_row, maps_size, numbers_row, decay_rate, lane_bias, skip, row_length, first_slot,
            LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W, EXACT, PACKED, JOIN, SLOTS,
        )  # fmt: skip
        step += 1
    return R, sum_A, sum_D, raw, step


@gluon.jit
def ssd_backward(
    x, dt, A, B, C, D, bias, lengths, states, dy, after, numbers,
    dx, ddt, dB, dC, dA, dD, d_initial,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr, SEGMENTS: gl.constexpr, SEGMENT_CHUNKS: gl.constexpr,
    EXACT: gl.constexpr, PACKED: gl.constexpr, BLOCK: gl.constexpr, BATCH: gl.constexpr, JOIN: gl.constexpr,
    HAS_STATES: gl.constexpr, HAS_BEFORE: gl.constexpr, HAS_AFTER: gl.constexpr, WANTS_INITIAL: gl.constexpr,
):  # fmt: skip
    """All gradients of a row, or of a segment of one."""
    # Neighbours share a row, so that its B and C stay in the cache.
    splits: gl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    parts: gl.constexpr = HEADS * splits // W
    per_group: gl.constexpr = HEADS // GROUPS * splits
    per: gl.constexpr = BLOCK // 16
    program = gl.program_id(0)
    first_slot = program % parts * W
    segment = program // parts % SEGMENTS
    row = program // (parts * SEGMENTS)
    wide_row = row.to(gl.int64)
    values = wide_row * (LENGTH * HEADS * WIDTH)
    maps = wide_row * (LENGTH * GROUPS * STATE_WIDTH)
    dt_row = dt + wide_row * (LENGTH * HEADS)
    maps_size: gl.constexpr = BATCH * LENGTH * GROUPS * STATE_WIDTH
    numbers_row = numbers + wide_row * (SEGMENTS * SEGMENT_CHUNKS * 16 + 1)
    lane_slot = lane_slots(first_slot, W) + lane_numbers(W) * 0
    lane_head = slot_head(lane_slot, WIDTH, COLUMNS)
    ddt_row = ddt + ((lane_slot % splits).to(gl.int64) * BATCH + wide_row) * (LENGTH * HEADS)
    decay_rate = gl.load(A + lane_head)
    lane_bias = gl.load(bias + lane_head)
    skip = gl.load(D + slot_head(tile_slots(first_slot, W), WIDTH, COLUMNS))
    row_length = gl.minimum(gl.load(lengths + row), LENGTH)
    state_at, inside = _state_tiles(first_slot, WIDTH, STATE_WIDTH, COLUMNS, STATES, W)
    size: gl.constexpr = HEADS * WIDTH * STATE_WIDTH
    states_row = states + wide_row * ((LENGTH + BLOCK - 1) // BLOCK * size)
    x_tiles, dy_tiles, B_tiles, C_tiles, flow, kept = allocate(
        x.dtype.element_ty, W, 1 if JOIN == W else W, COLUMNS, STATES, per
    )
    R = gl.zeros([W, COLUMNS, STATES], gl.float32, fragment(W))
    if HAS_AFTER:
        R += gl.load(after + (wide_row * SEGMENTS + segment) * size + state_at, mask=inside, other=0.0)
    sum_A = gl.zeros_like(decay_rate)
    sum_D = gl.zeros([W, 16], gl.float32, gl.SliceLayout(2, fragment(W)))
    begin = segment * SEGMENT_CHUNKS
    end = gl.minimum(begin + SEGMENT_CHUNKS, (LENGTH + 15) // 16)
    blocks = (end - begin + per - 1) // per
    step = 0
    raw = ask_first(
        x_tiles, dy_tiles, B_tiles, C_tiles, (begin + (blocks - 1) * per) * 16, end - 1, x + values, dt_row, B + maps,
        C + maps, dy + values, first_slot, LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W,
    )  # fmt: skip
    for back in range(0, blocks):
        block = begin // per + blocks - 1 - back
        first_chunk = block * per
        count = gl.minimum(per, end - first_chunk)
        before = states_row + block.to(gl.int64) * size + state_at
        raw, step = _sweep_block(
            raw, step, kept, x_tiles, B_tiles, before, inside & (HAS_BEFORE | (block > 0)), first_chunk, count,
            x + values, dt_row, B + maps, numbers_row, decay_rate, lane_bias, row_length, first_slot,
            LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W, EXACT, PACKED, HAS_STATES,
        )  # fmt: skip
        R, sum_A, sum_D, raw, step = _chunks_of_block(
            R, sum_A, sum_D, raw, step, kept, flow, x_tiles, dy_tiles, B_tiles, C_tiles, begin, first_chunk, count,
            x + values, dt_row, B + maps, C + maps, dy + values, dx + values, ddt_row, dB + maps, dC + maps, maps_size,
            numbers_row, decay_rate, lane_bias, skip, row_length, first_slot,
            LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W, EXACT, PACKED, JOIN, per_group,
        )  # fmt: skip
    async_copy.wait_group(0)
    _store_sums(dA, dD, sum_A, sum_D, row, segment, first_slot, BATCH, SEGMENTS, HEADS, splits, W)
    if WANTS_INITIAL:
        gl.store(d_initial + (wide_row * SEGMENTS + segment) * size + state_at, R, mask=inside)
