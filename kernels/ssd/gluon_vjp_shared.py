"""What the backward Gluon kernel of state space duality has in shared memory: tiles copied ahead, and states."""

# Kernels are of Gluon's own language, in which constants are given as plain numbers.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportReturnType=false

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kernels.dispatch import gpu_capability
from kernels.gluon import fragment
from kernels.ssd.gluon_tiles import GluonParams, load_inside, load_raw_steps, slot_column, slot_head


@gluon.constexpr_function
def staged_layout(count, columns, bits):
    """Layout in shared memory of [count, 16, columns]; fragments read rows and columns of it from different banks."""
    if bits == 32:
        rows = [[1, 8], [2, 16], [4, 8]] if columns >= 32 else [[1, 0], [2, 8], [5, 0]]
    elif columns >= 64:
        rows = [[1, 8], [2, 16], [4, 32]]
    else:
        rows = [[1, 0], [2, 8], [4, 16]] if columns == 32 else [[1, 0], [2, 0], [4, 8]]
    bases = [[0, 0, 1 << i] for i in range(columns.bit_length() - 1)]
    bases += [[0, *row] for row in [*rows, [8, 0]]]
    return gl.SharedLinearLayout(bases + [[1 << i, 0, 0] for i in range(count.bit_length() - 1)])


@gluon.constexpr_function
def kept_layout(W, rows, columns):
    """Layout in shared memory of [W, rows, columns]; fragments of it and of its transpose are at different banks."""
    bases = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 5, 0]]
    bases += [[0, 0, 8 << i] for i in range(columns.bit_length() - 4)]
    bases += [[0, 8 << i, 0] for i in range(rows.bit_length() - 4)]
    return gl.SharedLinearLayout(bases + [[1 << i, 0, 0] for i in range(W.bit_length() - 1)])


@gluon.jit
def allocate(
    dtype: gl.constexpr, W: gl.constexpr, MAPS: gl.constexpr, COLUMNS: gl.constexpr, STATES: gl.constexpr,
    CHUNKS: gl.constexpr,
):  # fmt: skip
    """Tiles of x, dy, B and C, two of each; what flows through a chunk; the state before each chunk of a block.

    There is one tile of B and C if all warps have one group, or MAPS = W of them.
    """
    bits: gl.constexpr = dtype.primitive_bitwidth
    values: gl.constexpr = staged_layout(W, COLUMNS, bits)
    maps: gl.constexpr = staged_layout(MAPS, STATES, bits)
    x_tiles = gl.allocate_shared_memory(dtype, [2, W, 16, COLUMNS], values)
    dy_tiles = gl.allocate_shared_memory(dtype, [2, W, 16, COLUMNS], values)
    B_tiles = gl.allocate_shared_memory(dtype, [2, MAPS, 16, STATES], maps)
    C_tiles = gl.allocate_shared_memory(dtype, [2, MAPS, 16, STATES], maps)
    flow = gl.allocate_shared_memory(gl.float32, [W, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    kept = gl.allocate_shared_memory(gl.float32, [CHUNKS, W, STATES, COLUMNS], kept_layout(W, STATES, COLUMNS))
    return x_tiles, dy_tiles, B_tiles, C_tiles, flow, kept


@gluon.constexpr_function
def _copy_layout(count, columns, bits, W):
    """Who copies what of [count, 16, columns]: 16 bytes per thread and instruction."""
    vector = min(columns, 128 // bits)
    across = min(32, columns // vector)
    warps = [W, 1, 1] if count > 1 else [1, W, 1]
    return gl.BlockedLayout([1, 1, vector], [1, 32 // across, across], warps, [2, 1, 0])


@gluon.jit
def _copy(tile, pointers, inside, MASKED: gl.constexpr, ALIGNED: gl.constexpr):
    if ALIGNED:
        if MASKED:
            async_copy.async_load(tile, pointers, mask=inside)
        else:
            async_copy.async_load(tile, pointers)
    else:
        # Rows that do not begin at a multiple of 16 bytes.
        tile.store(load_inside(pointers, inside, MASKED))


@gluon.jit
def copy_values(
    tile, of_row, first, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, WIDTH: gl.constexpr, COLUMNS: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Begins to copy x or dy [W, 16, COLUMNS]; the last position stands in for those behind the row's end."""
    bits: gl.constexpr = of_row.dtype.element_ty.primitive_bitwidth
    layout: gl.constexpr = _copy_layout(W, COLUMNS, bits, W)
    slot = first_slot + gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    position = first + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    p = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    if LENGTH % 16 != 0:
        position = gl.minimum(position, LENGTH - 1)
    column = slot_column(slot, WIDTH, COLUMNS)
    pointers = of_row + (position * (HEADS * WIDTH) + (slot_head(slot, WIDTH, COLUMNS) * WIDTH + column)) + p
    _copy(tile, pointers, column + p + position * 0 < WIDTH, WIDTH % COLUMNS != 0, WIDTH * bits % 128 == 0)


@gluon.jit
def copy_maps(
    tile, of_row, first, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Begins to copy B or C: [1, 16, STATES] of the group of all warps, or [W, 16, STATES] of a group for each."""
    bits: gl.constexpr = of_row.dtype.element_ty.primitive_bitwidth
    count: gl.constexpr = tile.shape[0]
    layout: gl.constexpr = _copy_layout(count, STATES, bits, W)
    slot = first_slot + gl.arange(0, count, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    position = first + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    n = gl.arange(0, STATES, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    if LENGTH % 16 != 0:
        position = gl.minimum(position, LENGTH - 1)
    group = slot_head(slot, WIDTH, COLUMNS) // (HEADS // GROUPS)
    pointers = of_row + (position * (GROUPS * STATE_WIDTH) + group * STATE_WIDTH) + n
    inside = n + (position + group) * 0 < STATE_WIDTH
    _copy(tile, pointers, inside, STATE_WIDTH != STATES, STATE_WIDTH * bits % 128 == 0)


@gluon.jit
def staged(tile, W: gl.constexpr):
    """A tile as a fragment of each warp."""
    loaded = tile.load(fragment(W))
    if tile.shape[0] != W:
        loaded = loaded.broadcast_to(W, tile.shape[1], tile.shape[2])
    return loaded


@gluon.jit
def staged_turned(tile, W: gl.constexpr):
    """The same with rows and columns exchanged."""
    return staged(tile.permute((0, 2, 1)), W)


@gluon.jit
def ask_for(
    tiles, maps, stage, of_row, maps_row, first, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Begins to copy the tiles of a chunk, of x and B or of dy and C."""
    copy_values(tiles.index(stage), of_row, first, first_slot, LENGTH, HEADS, WIDTH, COLUMNS, W)
    copy_maps(
        maps.index(stage), maps_row, first, first_slot, LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W
    )


@gluon.jit
def ask_first(
    x_tiles, dy_tiles, B_tiles, C_tiles, first, last_chunk, x_row, dt_row, B_row, C_row, dy_row, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Begins to copy what the first step needs; returns its dt.

    Later on, each step asks for the next one's: x, B and dt of a block's chunks forwards and then backwards, dy and C
    backwards.
    """
    ask_for(
        x_tiles, B_tiles, 0, x_row, B_row, first, first_slot,
        LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W,
    )  # fmt: skip
    ask_for(
        dy_tiles, C_tiles, last_chunk & 1, dy_row, C_row, last_chunk * 16, first_slot,
        LENGTH, HEADS, GROUPS, WIDTH, STATE_WIDTH, COLUMNS, STATES, W,
    )  # fmt: skip
    async_copy.commit_group()
    return load_raw_steps(dt_row, first, first_slot, LENGTH, HEADS, WIDTH, COLUMNS, W, LENGTH % 16 != 0)


def warps_joined(params: GluonParams) -> int:
    """Warps of one group in a program, whose gradients of B and C are added up there."""
    return math.gcd(params.config.warps, params.heads // params.groups * params.splits)


def shared_bytes(params: GluonParams, itemsize: int) -> int:
    """Shared memory of a program of the backward kernel.

    Args:
      params: as the kernel has them.
      itemsize: bytes of a number of x.
    """
    config, join = params.config, warps_joined(params)
    maps = 1 if join == config.warps else config.warps
    tiles = 2 * 2 * 16 * (config.warps * config.columns + maps * params.states) * itemsize
    kept = config.block // 16 * config.warps * params.states * config.columns * 4
    joined = 16 * config.warps * params.states * 4 if join > 1 else 0
    return tiles + kept + joined + 16 * config.warps * 4


def shared_limit() -> tuple[tuple[int, int], int]:
    """Returns the compute capability at hand, or the one with most, and the bytes that a program has there."""
    capability = gpu_capability() or (9, 0)
    large = capability in ((8, 0), (8, 7))
    return capability, 1024 * (163 if large else 99 if capability[0] in (8, 12) else 227)


def check_shared_memory(params: GluonParams, itemsize: int) -> None:
    """Refuses what the GPU at hand cannot hold; where there is none, what no GPU can.

    Raises:
      ValueError: naming block and warps.
    """
    capability, limit = shared_limit()
    needed = shared_bytes(params, itemsize)
    if needed > limit:
        raise ValueError(
            f"block={params.config.block} and warps={params.config.warps} take {needed} bytes of shared memory for the "
            f"gradient, and a program has {limit} on compute capability {capability[0]}.{capability[1]}: make one of "
            "them smaller in a GluonConfig"
        )
