"""State space duality by Gluon kernels: the backward pass of wide heads by `wgmma`, for float32 with TF32 factors.

A program of two warpgroups has a head of a row (or of a segment of one), p = 128 and n = 64, and goes from its last
block of 64 positions to its first, with the transposed gradient R^T of the state in registers. The forward pass has
kept the state S before each block. With u = delta x, M = L o (C B^T) and G = dy x^T, as in `gluon_vjp_mma`:

  du = M^T dy + to_end (B R^T),    dB = (L o G delta)^T C + to_end (u R),    dC = (L o G delta) B + from_start (dy S)
  R' = total R + (from_start dy)^T C

All factors but one lie in shared memory, where `wgmma` reads TF32 along the summed index only: what is summed over
positions is turned on the way. First come the products that read tiles as they were copied. Then M^T and the gradients
of scores take the place of the states, and B, C and dy are turned, the two of them in their own place.

Behind the row's end tiles are zeros, and steps as well.
"""

# Kernels are of Gluon's own language, in which constants are given as plain numbers.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kernels.gluon import exp2, softplus
from kernels.ssd.gluon_vjp_tiles import apply_decay, opaque

WARPS, BLOCK, WIDTH, STATE_WIDTH = 8, 64, 128, 64
# Positions of a block, p and n.
L = gl.constexpr(BLOCK)
P = gl.constexpr(WIDTH)
N = gl.constexpr(STATE_WIDTH)

# Layouts.


@gluon.constexpr_function
def sums(columns):
    """Layout of sums [64, columns]: the warps of a warpgroup have 16 rows each, each warpgroup half of the columns."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, columns // 2, 8])


@gluon.constexpr_function
def sum_rows(columns):
    """Layout of [64]: a number per row of sums."""
    return gl.SliceLayout(1, sums(columns))


@gluon.constexpr_function
def sum_columns(columns):
    """Layout of [columns]: a number per column of sums."""
    return gl.SliceLayout(0, sums(columns))


@gluon.constexpr_function
def factor(columns):
    """Layout of a first factor in registers, of a product that is added to such sums."""
    return gl.DotOperandLayout(0, sums(columns), 1)


@gluon.constexpr_function
def turning(rows):
    """Layout of a tile that is turned: lanes along rows, so that loads and turned stores are of different banks."""
    return gl.BlockedLayout([1, 4], [32, 1], [rows // 32, 256 // rows], [1, 0])


# A number per position, two per lane, alike in all warps.
STEPS = gl.constexpr(gl.BlockedLayout([2], [32], [8], [0]))
# In shared memory: tiles that are read and written as sums lie, and turned ones, which are written along their columns.
# Either way no bank is asked twice at once.
TILE = gl.constexpr(gl.NVMMASharedLayout(32, 32, rank=2))
TURNED = gl.constexpr(gl.NVMMASharedLayout(128, 32, rank=2))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PAIR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _turned(tile):
    return tile.permute((1, 0))


# Copies to shared memory.


@gluon.constexpr_function
def _copying(columns):
    """Who copies what of [64, columns]: 16 bytes per thread and instruction, a warp four rows of 32 numbers."""
    across = [[0, 1 << i] for i in range(columns.bit_length() - 1)]
    down = [[1 << i, 0] for i in range(6)]
    rest = across[5:] + down[2:]
    lane = [across[2], *down[:2], *across[3:5]]
    return gl.DistributedLinearLayout(across[:2] + rest[3:], lane, rest[:3], [], [64, columns])


@gluon.jit
def _copy(tile, of_row, first, stride, LENGTH: gl.constexpr):
    """Begins to copy 64 positions of an input; what is behind the row's end is 0."""
    layout: gl.constexpr = _copying(tile.shape[1])
    position = first + gl.arange(0, L, gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, tile.shape[1], gl.SliceLayout(0, layout))[None, :]
    pointers = of_row + position * stride + column
    if LENGTH % L != 0:
        async_copy.async_load(tile, pointers, mask=(position < LENGTH) & (column >= 0))
    else:
        async_copy.async_load(tile, pointers)


@gluon.jit
def _ask_for(
    tiles, rows, block,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, HAS_STATES: gl.constexpr, HAS_BEFORE: gl.constexpr,
):  # fmt: skip
    """Begins to copy the tiles of a block, and the state before it; returns its dt."""
    x_row, dy_row, B_row, C_row, states_row, dt_row, numbers_row = rows
    _copy(tiles[0], x_row, block * L, HEADS * P, LENGTH)
    _copy(tiles[1], dy_row, block * L, HEADS * P, LENGTH)
    _copy(tiles[2], B_row, block * L, GROUPS * N, LENGTH)
    _copy(tiles[3], C_row, block * L, GROUPS * N, LENGTH)
    if HAS_STATES:
        layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0])
        p = gl.arange(0, P, gl.SliceLayout(1, layout))[:, None]
        n = gl.arange(0, N, gl.SliceLayout(0, layout))[None, :]
        state = states_row + block.to(gl.int64) * (HEADS * P * N)
        there = HAS_BEFORE | (block > 0)
        async_copy.async_load(tiles[4], state + p * N + n, mask=there & (p >= 0) & (n >= 0))
    async_copy.commit_group()
    return gl.load(dt_row + gl.minimum(block * L + gl.arange(0, L, STEPS), LENGTH - 1) * HEADS)


@gluon.jit
def _allocate():
    """Tiles x, dy, B, C, S, R, R^T and ones from the diagonal on; numbers per position; partial sums.

    Numbers are steps, both parts of sums of log decays, decays from the start and to the end; histories. Sums are of
    rows of both warpgroups, what arrives, leaves, flows over, x du, x dy; and what flows through, of p.
    """
    tiles = (
        gl.allocate_shared_memory(gl.float32, [1, L, P], TILE),
        gl.allocate_shared_memory(gl.float32, [1, L, P], TILE),
        gl.allocate_shared_memory(gl.float32, [1, L, N], TILE),
        gl.allocate_shared_memory(gl.float32, [1, L, N], TILE),
        gl.allocate_shared_memory(gl.float32, [1, P, N], TURNED),
        gl.allocate_shared_memory(gl.float32, [1, P, N], TURNED),
        gl.allocate_shared_memory(gl.float32, [1, N, P], TILE),
        gl.allocate_shared_memory(gl.float32, [1, L, L], TILE),
    )
    from_diagonal = gl.arange(0, L, sum_rows(L))[:, None] <= gl.arange(0, L, sum_columns(L))[None, :]
    tiles[7].index(0).store(gl.where(from_diagonal, 1.0, gl.zeros([L, L], gl.float32, sums(L))))
    vectors = gl.allocate_shared_memory(gl.float32, [8, L], VECTOR)
    histories = gl.allocate_shared_memory(gl.int32, [L], VECTOR)
    halves = gl.allocate_shared_memory(gl.float32, [8, 2, L], PAIR)
    through = gl.allocate_shared_memory(gl.float32, [2, P], PAIR)
    return tiles, vectors, histories, halves, through


@gluon.jit
def _tiles_of_block(tiles, block):
    """The tiles; the compiler does not know that their addresses are the same for all blocks.

    Else it makes all of them ahead, and puts them on the stack.
    """
    zero = gl.minimum(block, 0)
    x, dy, B, C, S, R, R_turned, until = tiles
    return (
        x.index(zero), dy.index(zero), B.index(zero), C.index(zero), S.index(zero), R.index(zero),
        R_turned.index(zero), until.index(zero),
    )  # fmt: skip


# Steps and sums.


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _add_in_history(a, a_number, b, b_number):
    return gl.where(a_number == b_number, a + b, b), b_number


@gluon.jit
def _sums_up_to(x, number, PACKED: gl.constexpr):
    """Sums of [64] up to each entry; if `PACKED` over entries of its own number, which do not fall."""
    if PACKED:
        result, _ = gl.associative_scan((x, number), 0, _add_in_history)
        return result
    return gl.associative_scan(x, 0, _add)


@gluon.jit
def _last(x):
    return gl.sum(gl.where(gl.arange(0, L, STEPS) == L - 1, x, gl.zeros_like(x)), 0)


@gluon.jit
def _put_steps(vectors, histories, raw, numbers_row, A, bias, row_length, first, PACKED: gl.constexpr):
    """Stores numbers per position; returns steps and their derivative, and the decay of the block."""
    at = gl.arange(0, L, STEPS)
    delta, slope = softplus(raw + bias)
    delta = gl.where(first + at < row_length, delta, 0.0)
    slope = gl.where(first + at < row_length, slope, 0.0)
    number = at
    if PACKED:
        number = gl.load(numbers_row + (first + 1) + at)
        histories.store(number)
    # To the base of 2. The first part has no error (`kernels.decays`), as many positions are added up.
    log2 = gl.maximum(delta * A, -128.0) * 1.4426950408889634
    coarse = gl.floor(log2 * 64.0) * 0.015625
    fine = _sums_up_to(log2 - coarse, number, PACKED)
    coarse = _sums_up_to(coarse, number, PACKED)
    coarse_total = _last(coarse)
    fine_total = _last(fine)
    from_start = exp2(coarse + fine)
    to_end = exp2((coarse_total - coarse) + (fine_total - fine))
    total = gl.exp2(coarse_total + fine_total)
    if PACKED:
        before = gl.load(numbers_row + first)
        last = gl.load(numbers_row + (first + L))
        from_start = gl.where(number == before, from_start, 0.0)
        to_end = gl.where(number == last, to_end, 0.0)
        total = gl.where(before == last, total, 0.0)
    vectors.index(0).store(delta)
    vectors.index(1).store(coarse)
    vectors.index(2).store(fine)
    vectors.index(3).store(from_start)
    vectors.index(4).store(to_end)
    return delta, slope, total


@gluon.jit
def _decays_between(vectors, histories, PACKED: gl.constexpr):
    """Decay factors to a position (row) from an earlier one (column), 0 where nothing is reached."""
    row: gl.constexpr = sum_rows(L)
    column: gl.constexpr = sum_columns(L)
    log2 = vectors.index(1).load(row)[:, None] - vectors.index(1).load(column)[None, :]
    log2 += vectors.index(2).load(row)[:, None] - vectors.index(2).load(column)[None, :]
    reached = gl.arange(0, L, row)[:, None] >= gl.arange(0, L, column)[None, :]
    if PACKED:
        reached &= histories.load(row)[:, None] == histories.load(column)[None, :]
    return gl.where(reached, exp2(log2), 0.0)


@gluon.jit
def _put_row_sums(pair, tile):
    """Stores what each warpgroup has of the sums of rows."""
    rows: gl.constexpr = tile.shape[0]
    columns: gl.constexpr = tile.shape[1]
    _turned(pair).store(gl.sum(tile.reshape([rows, 2, columns // 2]), 2))


@gluon.jit
def _row_sums(pairs, number, layout: gl.constexpr):
    lines = pairs.reinterpret(gl.float32, [pairs.numel // L, L], VECTOR)
    return lines.index(2 * number).load(layout) + lines.index(2 * number + 1).load(layout)


# A block.


@gluon.jit
def _begin(a, b, total):
    """Begins total + a b^T."""
    return warpgroup_mma(a, _turned(b), total, precision="tf32", is_async=True)


@gluon.jit
def _put_states(tiles, through, R, HAS_STATES: gl.constexpr):
    """Stores R both ways, turns S, and shows all tiles to the tensor cores; S o R is added up on the way."""
    _turned(tiles[5]).store(R)
    tiles[6].store(R)
    async_copy.wait_group(0)
    if HAS_STATES:
        S = tiles[4].load(turning(P))
        dots = (S * tiles[5].load(turning(P))).reshape([P, N // 8, 2, 4])
        _turned(through).store(gl.sum(gl.sum(dots, 3), 1))
        _turned(tiles[4].reinterpret(gl.float32, [N, P], TURNED)).store(S)
    fence_async_shared()
    gl.barrier()


@gluon.jit
def _products_as_copied(tiles, vectors, histories, halves, PACKED: gl.constexpr, HAS_STATES: gl.constexpr):
    """Scores, G, decays between positions, and what the states give to the gradients of B, C and u."""
    x, dy, B, C, S, R, R_turned, _ = tiles
    scores = _begin(C, B, gl.zeros([L, L], gl.float32, sums(L)))
    G = _begin(dy, x, gl.zeros([L, L], gl.float32, sums(L)))
    dB = _begin(x, R_turned, gl.zeros([L, N], gl.float32, sums(N)))
    du = _begin(B, R, gl.zeros([L, P], gl.float32, sums(P)))
    dC = gl.zeros([L, N], gl.float32, sums(N))
    if HAS_STATES:
        dC_begun = _begin(dy, S.reinterpret(gl.float32, [N, P], TURNED), dC)
        weights = _decays_between(vectors, histories, PACKED)
        scores, G, dB, du, dC = warpgroup_mma_wait(0, [scores, G, dB, du, dC_begun])
        dC = apply_decay(vectors.index(3).load(sum_rows(N))[:, None], dC, PACKED)
        _put_row_sums(halves.index(0), dC * C.load(sums(N)))
    else:
        weights = _decays_between(vectors, histories, PACKED)
        scores, G, dB, du = warpgroup_mma_wait(0, [scores, G, dB, du])
    dB = apply_decay(vectors.index(4).load(sum_rows(N))[:, None], dB, PACKED)
    dB *= vectors.index(0).load(sum_rows(N))[:, None]
    _put_row_sums(halves.index(1), dB * B.load(sums(N)))
    du = apply_decay(vectors.index(4).load(sum_rows(P))[:, None], du, PACKED)
    return scores, G, weights, dB, dC, du


@gluon.jit
def _places(tiles):
    """Where S, R^T and R were: M^T, gradients of scores, these turned, flows turned, dy turned; B and C, turned."""
    _, _, B, C, S, R, R_turned, _ = tiles
    early = S.reinterpret(gl.float32, [2, L, L], TURNED)
    late = R_turned.reinterpret(gl.float32, [2, L, L], TURNED)
    return (
        early.index(0), S.reinterpret(gl.float32, [2, L, L], TILE).index(1), late.index(0), late.index(1),
        R.reinterpret(gl.float32, [P, L], TURNED), B.reinterpret(gl.float32, [N, L], TURNED),
        C.reinterpret(gl.float32, [N, L], TURNED),
    )  # fmt: skip


@gluon.jit
def _put_factors(tiles, vectors, scores, G, weights, PACKED: gl.constexpr):
    """Stores the factors of the products that sum over positions, and shows them to the tensor cores."""
    mixed_turned, d_scores_tile, d_scores_turned, flows_turned, dy_turned, B_turned, C_turned = _places(tiles)
    B = tiles[2].load(turning(L))
    C = tiles[3].load(turning(L))
    _turned(B_turned).store(B)
    _turned(C_turned).store(C)
    _turned(dy_turned).store(tiles[1].load(turning(L)))
    _turned(mixed_turned).store(apply_decay(weights, scores, PACKED))
    d_scores = apply_decay(weights, G * vectors.index(0).load(sum_columns(L))[None, :], PACKED)
    d_scores_tile.store(d_scores)
    _turned(d_scores_turned).store(d_scores)
    earlier = gl.arange(0, L, sum_rows(L))[:, None] > gl.arange(0, L, sum_columns(L))[None, :]
    flows = gl.where(earlier, d_scores * scores, 0.0)
    if PACKED:
        flows = gl.where(weights == 0.0, 0.0, flows)
    _turned(flows_turned).store(flows)
    fence_async_shared()
    gl.barrier()


@gluon.jit
def _products_over_positions(
    tiles, vectors, histories, halves, dx_row, first, skip, total, R, dB, dC, du,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, PACKED: gl.constexpr, HAS_STATES: gl.constexpr,
):  # fmt: skip
    """Completes the gradients, and stores that of x; returns those of B and C, and R before the block."""
    x, dy, _, _, _, _, _, until = tiles
    mixed_turned, d_scores_tile, d_scores_turned, flows_turned, dy_turned, B_turned, C_turned = _places(tiles)
    du = _begin(mixed_turned, dy_turned, du)
    # Of each position (column), what flows on to a later one (row) or behind it.
    onward = _begin(until, flows_turned, gl.zeros([L, L], gl.float32, sums(L)))
    dC = _begin(d_scores_tile, B_turned, dC)
    dB = _begin(d_scores_turned, C_turned, dB)
    from_start = vectors.index(3).load(gl.SliceLayout(0, factor(P)))[None, :]
    R = _begin(C_turned.load(factor(P)) * from_start, dy_turned, apply_decay(total, R, PACKED))
    # The gradient of x while the others are computed.
    du = warpgroup_mma_wait(4, [du])
    x = x.load(sums(P))
    dy = dy.load(sums(P))
    _put_row_sums(halves.index(3), x * du)
    _put_row_sums(halves.index(4), x * dy)
    position = first + gl.arange(0, L, sum_rows(P))[:, None]
    p = gl.arange(0, P, sum_columns(P))[None, :]
    dx = vectors.index(0).load(sum_rows(P))[:, None] * du + skip * dy
    gl.store(dx_row + position * (HEADS * P) + p, dx, mask=(position < LENGTH) & (p >= 0))
    onward, dC, dB, R = warpgroup_mma_wait(0, [onward, dC, dB, R])
    # What flows over each position (row): from those before it (columns), and into those from it on.
    column: gl.constexpr = sum_columns(L)
    leaving = _row_sums(halves, 1, column)[None, :]
    arriving = gl.zeros([L], gl.float32, column)[None, :]
    if HAS_STATES:
        arriving = _row_sums(halves, 0, column)[None, :]
    before = gl.arange(0, L, sum_rows(L))[:, None] > gl.arange(0, L, column)[None, :]
    over = gl.where(before, onward + leaving, arriving)
    if PACKED:
        # Also where what flows in another history has overflowed.
        over = gl.where(histories.load(sum_rows(L))[:, None] == histories.load(column)[None, :], over, 0.0)
    _put_row_sums(halves.index(2), over)
    return dB, dC, R


@gluon.jit
def _store_maps(dB_row, dC_row, dB, dC, first, LENGTH: gl.constexpr, GROUPS: gl.constexpr):
    position = first + gl.arange(0, L, sum_rows(N))[:, None]
    n = gl.arange(0, N, sum_columns(N))[None, :]
    inside = (position < LENGTH) & (n >= 0)
    gl.store(dC_row + position * (GROUPS * N) + n, dC, mask=inside)
    gl.store(dB_row + position * (GROUPS * N) + n, dB, mask=inside)


@gluon.jit
def _store_steps(
    ddt_row, halves, through, A, delta, slope, total, first,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, PACKED: gl.constexpr, HAS_STATES: gl.constexpr,
):  # fmt: skip
    """Stores the gradient of the steps, and returns what a block adds to those of A and D."""
    d_log = _row_sums(halves, 2, STEPS)
    if HAS_STATES:
        flow = gl.sum(_row_sums(through, 0, STEPS) + _row_sums(through, 1, STEPS), 0)
        d_log += apply_decay(total, flow, PACKED)
    position = first + gl.arange(0, L, STEPS)
    d_delta = A * d_log + _row_sums(halves, 3, STEPS)
    gl.store(ddt_row + position * HEADS, d_delta * slope, mask=position < LENGTH)
    return d_log * delta, _row_sums(halves, 4, STEPS)


@gluon.jit
def ssd_backward_wgmma(
    x, dt, A, B, C, D, bias, lengths, states, dy, after, numbers,
    dx, ddt, dB, dC, dA, dD, d_initial,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, SEGMENTS: gl.constexpr,
    SEGMENT_BLOCKS: gl.constexpr, PACKED: gl.constexpr, BATCH: gl.constexpr,
    HAS_STATES: gl.constexpr, HAS_BEFORE: gl.constexpr, HAS_AFTER: gl.constexpr, WANTS_INITIAL: gl.constexpr,
):  # fmt: skip
    """All gradients of a head of a row, or of a segment of one."""
    # Neighbours share a row, so that its B and C stay in the cache.
    program = gl.program_id(0)
    head = program % HEADS
    segment = program // HEADS % SEGMENTS
    row = program // (HEADS * SEGMENTS)
    wide_row = row.to(gl.int64)
    values = wide_row * (LENGTH * HEADS * P) + head * P
    maps = wide_row * (LENGTH * GROUPS * N) + head // (HEADS // GROUPS) * N
    part = (head % (HEADS // GROUPS)).to(gl.int64) * (BATCH * LENGTH * GROUPS * N) + maps
    steps = wide_row * (LENGTH * HEADS) + head
    size: gl.constexpr = HEADS * P * N
    state = head * (P * N)
    states_row = states + wide_row * ((LENGTH + L - 1) // L * size) + state
    numbers_row = numbers + wide_row * (SEGMENTS * SEGMENT_BLOCKS * L + 1)
    rows = (x + values, dy + values, B + maps, C + maps, states_row, dt + steps, numbers_row)
    decay_rate = gl.load(A + head)
    step_bias = gl.load(bias + head)
    skip = gl.load(D + head)
    row_length = gl.minimum(gl.load(lengths + row), LENGTH)

    all_tiles, vectors, histories, halves, through = _allocate()
    state_at = gl.arange(0, P, sum_columns(P))[None, :] * N + gl.arange(0, N, sum_rows(P))[:, None]
    R = gl.zeros([N, P], gl.float32, sums(P))
    if HAS_AFTER:
        R += gl.load(after + (wide_row * SEGMENTS + segment) * size + state + state_at)
    sum_A = gl.zeros([L], gl.float32, STEPS)
    sum_D = gl.zeros([L], gl.float32, STEPS)
    begin = segment * SEGMENT_BLOCKS
    end = gl.minimum(begin + SEGMENT_BLOCKS, (LENGTH + L - 1) // L)
    last_tiles = _tiles_of_block(all_tiles, opaque(end - 1))
    raw = _ask_for(last_tiles, rows, end - 1, LENGTH, HEADS, GROUPS, HAS_STATES, HAS_BEFORE)
    for back in range(0, end - begin):
        block = opaque(end - 1 - back)
        first = block * L
        tiles = _tiles_of_block(all_tiles, block)
        delta, slope, total = _put_steps(
            vectors, histories, raw, numbers_row, decay_rate, step_bias, row_length, first, PACKED
        )
        _put_states(tiles, through, R, HAS_STATES)
        scores, G, weights, dB_part, dC_part, du = _products_as_copied(
            tiles, vectors, histories, halves, PACKED, HAS_STATES
        )
        _put_factors(tiles, vectors, scores, G, weights, PACKED)
        dB_part, dC_part, R = _products_over_positions(
            tiles, vectors, histories, halves, dx + values, first, skip, total, R, dB_part, dC_part, du,
            LENGTH, HEADS, PACKED, HAS_STATES,
        )  # fmt: skip
        # Before the first block there is nothing: it is read once more.
        raw = _ask_for(tiles, rows, gl.maximum(block - 1, begin), LENGTH, HEADS, GROUPS, HAS_STATES, HAS_BEFORE)
        _store_maps(dB + part, dC + part, dB_part, dC_part, first, LENGTH, GROUPS)
        added_A, added_D = _store_steps(
            ddt + steps, halves, through, decay_rate, delta, slope, total, first, LENGTH, HEADS, PACKED, HAS_STATES
        )
        sum_A += added_A
        sum_D += added_D
    async_copy.wait_group(0)
    at = (wide_row * SEGMENTS + segment) * HEADS + head
    gl.store(dA + at, gl.sum(sum_A, 0))
    gl.store(dD + at, gl.sum(sum_D, 0))
    if WANTS_INITIAL:
        gl.store(d_initial + (wide_row * SEGMENTS + segment) * size + state + state_at, R)
