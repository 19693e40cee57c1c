"""What the backward Gluon kernels of state space duality need of tiles: loads, decays, and gradients of B and C."""

# Kernels are of Gluon's own language, in which constants are given as plain numbers.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportReturnType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.gluon import exp2, fragment, fragment_rows, lane_numbers, lane_xor, lanes, per_warp, to_columns, to_rows
from kernels.ssd.gluon_tiles import load_inside, tile_columns, tile_rows


@gluon.constexpr_function
def _moves(outputs, inputs):
    """Register i of the input is output i."""
    return "\n".join(f"mov.b32 {out[0]}, {value};" for out, value in zip(outputs, inputs[0], strict=True))


@gluon.constexpr_function
def _shuffle(outputs, inputs):
    return f"shfl.sync.idx.b32 {outputs[0][0]}, {inputs[0][0]}, {inputs[1][0]}, 0x1f, -1;"


@gluon.jit
def _thread(W: gl.constexpr):
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %laneid;", "=r,r", [lane_numbers(W)], dtype=gl.int32, is_pure=True, pack=1
    )


# Sums over rows and columns. Those over lanes come last, so that lanes take over sums from each other where they can.


@gluon.constexpr_function
def _add_products(sums, outputs, inputs):
    """Adds up products of two inputs in outputs: register i in that of number sums(i)."""
    begun, lines = set(), []
    for i, (left, right) in enumerate(zip(*inputs, strict=True)):
        total = outputs[sums(i)]
        if total in begun:
            lines.append(f"fma.rn.f32 {total}, {left}, {right}, {total};")
        else:
            lines.append(f"mul.f32 {total}, {left}, {right};")
        begun.add(total)
    return "\n".join(lines)


@gluon.constexpr_function
def _row_products(outputs, inputs):
    # In a fragment bit 1 of a register's number is for a row 8 further down.
    return _add_products(lambda i: i >> 1 & 1, outputs[0], inputs)


@gluon.constexpr_function
def _all_products(outputs, inputs):
    return _add_products(lambda i: i & 3, [registers[0] for registers in outputs], inputs)


@gluon.jit
def row_parts(a, b):
    """[W, 16] in `fragment_rows` of float32 fragments [W, 16, columns]: what each lane has of the sums of a b."""
    W: gl.constexpr = a.shape[0]
    result: gl.constexpr = gl.distributed_type(gl.float32, [W, 16], fragment_rows(W))
    return gl.inline_asm(_row_products, ("=&f", "f", "f"), [a, b], result, is_pure=True)


@gluon.jit
def row_sums(parts):
    """Sums in all lanes of what the four lanes of a row have."""
    parts += lane_xor(parts, 1)
    return parts + lane_xor(parts, 2)


@gluon.jit
def dot_parts(a, b):
    """[W, 16] in `lanes`: 16 numbers of which the sum is that of a b over all of a fragment."""
    W: gl.constexpr = a.shape[0]
    one: gl.constexpr = gl.distributed_type(gl.float32, [W, 16], lanes(W))
    s, t, u, v = gl.inline_asm(
        _all_products, ("=&f", "=&f", "=&f", "=&f", "f", "f"), [a, b], (one, one, one, one), is_pure=True
    )
    total = (s + t) + (u + v)
    return total + lane_xor(total, 16)


@gluon.jit
def lane_total(parts):
    """[W, 16] in `lanes`: the sum over all 16, in each lane."""
    parts += lane_xor(parts, 1)
    parts += lane_xor(parts, 2)
    parts += lane_xor(parts, 4)
    return parts + lane_xor(parts, 8)


@gluon.jit
def sums_from_rows(parts):
    """[W, 16] from `fragment_rows`, of which each of the four lanes of a row has a part, to sums in `lanes`."""
    W: gl.constexpr = parts.shape[0]
    result: gl.constexpr = gl.distributed_type(parts.dtype, [W, 16], lanes(W))
    lane = lane_numbers(W)
    near, far = gl.inline_asm(_moves, ("=r", "=r", "r"), [parts], (result, result), is_pure=True)
    # Odd lanes take over the rows 8 further down.
    odd = (_thread(W) & 1) != 0
    total = gl.where(odd, far, near) + lane_xor(gl.where(odd, near, far), 1)
    total += lane_xor(total, 2)
    source = (lane & 7) * 4 + (lane >> 3)
    return gl.inline_asm(_shuffle, ("=r", "r", "r"), [total, source], result, is_pure=True)


@gluon.constexpr_function
def _column_pairs(outputs, inputs):
    """Sums of both rows of a thread, for its four columns."""
    columns = [registers[0] for registers in outputs]
    return "\n".join(
        f"add.f32 {out}, {inputs[0][at]}, {inputs[0][at + 2]};" for out, at in zip(columns, (0, 1, 4, 5), strict=True)
    )


@gluon.jit
def column_sums(x):
    """[W, 16] in `lanes` of a fragment [W, 16, 16]: sums over rows."""
    W: gl.constexpr = x.shape[0]
    result: gl.constexpr = gl.distributed_type(x.dtype, [W, 16], lanes(W))
    lane = lane_numbers(W)
    even, odd, far_even, far_odd = gl.inline_asm(
        _column_pairs, ("=&f", "=&f", "=&f", "=&f", "f"), [x], (result, result, result, result), is_pure=True
    )
    # Half of the lanes take over the columns 8 further on, half of these the odd ones.
    thread = _thread(W)
    far = (thread & 16) != 0
    even, far_even = gl.where(far, far_even, even), gl.where(far, even, far_even)
    odd, far_odd = gl.where(far, far_odd, odd), gl.where(far, odd, far_odd)
    even += lane_xor(far_even, 16)
    odd += lane_xor(far_odd, 16)
    other = (thread & 8) != 0
    total = gl.where(other, odd, even) + lane_xor(gl.where(other, even, odd), 8)
    total += lane_xor(total, 4)
    source = ((lane & 7) >> 1) + (lane & 1) * 8 + (lane >> 3) * 16
    return gl.inline_asm(_shuffle, ("=r", "r", "r"), [total, source], result, is_pure=True)


@gluon.constexpr_function
def _joined_layout(W, JOIN, N):
    """Layout of [W, 16, N] in which a thread has what JOIN neighbouring warps add up."""
    columns = [[0, 0, 1 << i] for i in range(N.bit_length() - 1)]
    rows = [[0, 1 << i, 0] for i in range(4)]
    register = [[1 << i, 0, 0] for i in range(JOIN.bit_length() - 1)] + columns[:2]
    rest = columns[2:] + rows
    lane, rest = rest[:5], rest[5:]
    width = JOIN.bit_length() - 1
    warp, rest = rest[:width], rest[width:]
    warp = warp + [[0, 0, 0]] * (width - len(warp))
    lane = lane + [[0, 0, 0]] * (5 - len(lane))
    warp = warp + [[1 << i, 0, 0] for i in range(width, W.bit_length() - 1)]
    return gl.DistributedLinearLayout(register + rest, lane, warp, [], [W, 16, N])


@gluon.jit
def store_maps(
    out, gradient, first, first_slot, size,
    LENGTH: gl.constexpr, GROUPS: gl.constexpr, STATE_WIDTH: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr,
    JOIN: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Stores a gradient of B or C [W, 16, n], added up over JOIN neighbouring warps in a fixed order."""
    if JOIN == 1:
        layout: gl.constexpr = fragment(W)
        slot = first_slot + gl.arange(0, W, per_warp(W))[:, None, None]
        summed = gradient
    else:
        wide: gl.constexpr = _joined_layout(W, JOIN, STATES)
        split = gl.convert_layout(gradient, wide).reshape([W // JOIN, JOIN, 16, STATES])
        summed = gl.sum(split, 1)
        layout: gl.constexpr = summed.type.layout
        group: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
        slot = first_slot + gl.arange(0, W // JOIN, group)[:, None, None] * JOIN
    position = first + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    n = gl.arange(0, STATES, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    part = (slot % SLOTS) // JOIN
    at = position * (GROUPS * STATE_WIDTH) + slot // SLOTS * STATE_WIDTH
    inside = (position < LENGTH) & (n < STATE_WIDTH) & (slot >= 0)
    gl.store(out + part.to(gl.int64) * size + at + n, summed.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def opaque(number):
    """A number of which the compiler knows nothing: addresses that are made of it are made where they are used.

    Else it carries an address for each of a loop's arrays, and puts as many other numbers on the stack.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def tile_at(first, turned: gl.constexpr, W: gl.constexpr, LENGTH: gl.constexpr):
    """Positions of a chunk, down or across; the last one stands in for those behind the row's end."""
    position = first + (tile_columns(16, W) if turned else tile_rows(16, W))
    if LENGTH % 16 != 0:
        position = gl.minimum(position, LENGTH - 1)
    return position


@gluon.jit
def load_maps(of_row, position, n, group, GROUPS: gl.constexpr, STATE_WIDTH: gl.constexpr, STATES: gl.constexpr):
    # What is known when the kernel is compiled is added last and by itself: it becomes part of the instruction.
    pointers = of_row + (position * (GROUPS * STATE_WIDTH) + group * STATE_WIDTH) + n
    return load_inside(pointers, n < STATE_WIDTH, STATES != STATE_WIDTH)


@gluon.jit
def load_values(of_row, position, head, column, p, HEADS: gl.constexpr, WIDTH: gl.constexpr, COLUMNS: gl.constexpr):
    pointers = of_row + (position * (HEADS * WIDTH) + (head * WIDTH + column)) + p
    return load_inside(pointers, column + p < WIDTH, WIDTH % COLUMNS != 0)


@gluon.jit
def scaled(tile, factors):
    return (tile.to(gl.float32) * factors).to(tile.dtype)


@gluon.jit
def masked_by(decay, tile, PACKED: gl.constexpr):
    """Among several histories: 0 where a decay is, also over what has overflowed in another one."""
    if PACKED:
        tile = gl.where(decay == 0.0, 0.0, tile)
    return tile


@gluon.jit
def apply_decay(decay, tile, PACKED: gl.constexpr):
    """Multiplies by decay factors; among several histories 0 wins, also over what has overflowed in another one."""
    result = tile * decay
    if PACKED:
        result = gl.where(decay == 0.0, 0.0, result)
    return result


@gluon.jit
def decays_on(coarse, fine, number, first, LENGTH: gl.constexpr, EXACT: gl.constexpr, PACKED: gl.constexpr):
    """Decay factors from a position (row) to a later one (column), 0 where nothing is reached."""
    W: gl.constexpr = coarse.shape[0]
    log2 = to_columns(coarse)[:, None, :] - to_rows(coarse)[:, :, None]
    if EXACT:
        log2 += to_columns(fine)[:, None, :] - to_rows(fine)[:, :, None]
    later = tile_columns(16, W)
    reached = tile_rows(16, W) <= later
    if LENGTH % 16 != 0:
        reached &= first + later < LENGTH
    if PACKED:
        reached &= to_columns(number)[:, None, :] == to_rows(number)[:, :, None]
    return gl.where(reached, exp2(log2), 0.0)


@gluon.jit
def decays_back(coarse, fine, number, first, LENGTH: gl.constexpr, EXACT: gl.constexpr, PACKED: gl.constexpr):
    """Decay factors to a position (row) from an earlier one (column), 0 where nothing is reached."""
    W: gl.constexpr = coarse.shape[0]
    log2 = to_rows(coarse)[:, :, None] - to_columns(coarse)[:, None, :]
    if EXACT:
        log2 += to_rows(fine)[:, :, None] - to_columns(fine)[:, None, :]
    row = tile_rows(16, W)
    reached = row >= tile_columns(16, W)
    if LENGTH % 16 != 0:
        reached &= first + row < LENGTH
    if PACKED:
        reached &= to_rows(number)[:, :, None] == to_columns(number)[:, None, :]
    return gl.where(reached, exp2(log2), 0.0)


@gluon.jit
def zero_behind(x, first, LENGTH: gl.constexpr):
    """[W, 16] in `lanes` with 0 behind the row's end."""
    if LENGTH % 16 != 0:
        return gl.where(first + lane_numbers(x.shape[0]) < LENGTH, x, 0.0)
    return x
