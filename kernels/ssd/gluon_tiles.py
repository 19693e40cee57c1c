"""What the forward and backward Gluon kernels of state space duality share: who works where, steps, decays."""

# Kernels are of Gluon's own language, in which constants are given as plain numbers.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportReturnType=false

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.gluon import (
    exp2,
    fragment_columns,
    fragment_rows,
    lane_at,
    lane_numbers,
    lane_sums,
    lanes,
    per_warp,
    softplus,
    to_columns,
    to_rows,
)
from kernels.ssd.config import GluonConfig
from kernels.tiling import power_of_two

CHUNK = 16


@dataclass(frozen=True)
class GluonParams:
    """Static numbers of a call.

    Attributes:
      batch, length, heads, groups, width, state_width: b, l, h, g, p and n.
      config: how the work is cut up.
      exact: float32 factors keep their digits.
      has_initial: there is an initial state.
      wants_final: the final state is an output.
      packed: rows hold several histories.
    """

    batch: int
    length: int
    heads: int
    groups: int
    width: int
    state_width: int
    config: GluonConfig
    exact: bool
    has_initial: bool
    wants_final: bool = False
    packed: bool = False

    @property
    def chunk(self) -> int:
        """Positions handled densely at once."""
        return CHUNK

    @property
    def states(self) -> int:
        """Columns of B and C that a warp handles, n or more."""
        return max(16, power_of_two(self.state_width))

    @property
    def splits(self) -> int:
        """Warps that share the width of a head."""
        return -(-self.width // self.config.columns)

    @property
    def parts(self) -> int:
        """Programs that share a row, or a segment of one."""
        return self.heads * self.splits // self.config.warps

    @cached_property
    def blocks(self) -> int:
        """Blocks of a row, between which states are kept."""
        return -(-self.length // self.config.block)

    @cached_property
    def segment_blocks(self) -> int:
        """Blocks of a segment."""
        return -(-self.blocks // self.config.segments)

    @cached_property
    def segments(self) -> int:
        """s, so many that each has a real position."""
        return -(-self.blocks // self.segment_blocks)

    @property
    def num_chunks(self) -> int:
        """Chunks of a segment."""
        return self.segment_blocks * self.config.block // CHUNK

    @property
    def all_chunks(self) -> int:
        """Chunks of a row, those behind its end included."""
        return self.num_chunks * self.segments

    @property
    def starts_from_zero(self) -> bool:
        """The state before a row's first block is zero, and is neither kept nor read."""
        return self.segments == 1 and not self.has_initial

    @property
    def grid(self) -> int:
        """Number of programs."""
        return self.batch * self.segments * self.parts

    @property
    def constants(self) -> dict[str, Any]:
        """Of every kernel: sizes and flags."""
        return {
            "LENGTH": self.length,
            "HEADS": self.heads,
            "GROUPS": self.groups,
            "WIDTH": self.width,
            "STATE_WIDTH": self.state_width,
            "COLUMNS": self.config.columns,
            "STATES": self.states,
            "W": self.config.warps,
            "SEGMENTS": self.segments,
            "SEGMENT_CHUNKS": self.num_chunks,
            "EXACT": self.exact,
            "PACKED": self.packed,
        }


# Inside kernels. A row of a segment belongs to PARTS programs of W warps.


@gluon.jit
def slot_head(slot, WIDTH: gl.constexpr, COLUMNS: gl.constexpr):
    """The head that a warp of a row works on."""
    return slot // ((WIDTH + COLUMNS - 1) // COLUMNS)


@gluon.jit
def slot_column(slot, WIDTH: gl.constexpr, COLUMNS: gl.constexpr):
    """The first column of the width that a warp of a row works on."""
    return slot % ((WIDTH + COLUMNS - 1) // COLUMNS) * COLUMNS


@gluon.jit
def lane_slots(first_slot, W: gl.constexpr):
    """[W, 1] in `lanes`: the number of a warp in its row."""
    return first_slot + gl.arange(0, W, gl.SliceLayout(1, lanes(W)))[:, None]


@gluon.jit
def tile_slots(first_slot, W: gl.constexpr):
    """[W, 1, 1] beside fragments: the number of a warp in its row."""
    return first_slot + gl.arange(0, W, per_warp(W))[:, None, None]


@gluon.jit
def tile_rows(count: gl.constexpr, W: gl.constexpr):
    """[1, count, 1] beside fragments."""
    return gl.arange(0, count, gl.SliceLayout(0, fragment_rows(W)))[None, :, None]


@gluon.jit
def tile_columns(count: gl.constexpr, W: gl.constexpr):
    """[1, 1, count] beside fragments."""
    return gl.arange(0, count, gl.SliceLayout(0, fragment_columns(W)))[None, None, :]


@gluon.jit
def load_inside(pointers, inside, MASKED: gl.constexpr):
    """Loads a tile; what is not inside is 0 if `MASKED`."""
    if MASKED:
        return gl.load(pointers, mask=inside, other=0.0)
    return gl.load(pointers)


@gluon.jit
def load_raw_steps(
    dt_row, first, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, WIDTH: gl.constexpr, COLUMNS: gl.constexpr, W: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """dt of 16 positions, one per lane; the last one stands in for those behind the row's end if `TAIL`."""
    position = first + lane_numbers(W)
    if TAIL:
        position = gl.minimum(position, LENGTH - 1)
    head = slot_head(lane_slots(first_slot, W), WIDTH, COLUMNS)
    return gl.load(dt_row + (position * HEADS + head))


@gluon.jit
def steps_of(raw, bias, row_length, first):
    """Step sizes of 16 positions and their derivative, one per lane; both are 0 behind the row's end."""
    delta, slope = softplus(raw + bias)
    real = first + lane_numbers(raw.shape[0]) < row_length
    return gl.where(real, delta, 0.0), gl.where(real, slope, 0.0)


@gluon.jit
def load_steps(
    dt_row, bias, row_length, first, first_slot,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, WIDTH: gl.constexpr, COLUMNS: gl.constexpr, W: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """Both at once."""
    raw = load_raw_steps(dt_row, first, first_slot, LENGTH, HEADS, WIDTH, COLUMNS, W, TAIL)
    return steps_of(raw, bias, row_length, first)


@gluon.jit
def load_histories(numbers_row, first, W: gl.constexpr, PACKED: gl.constexpr):
    """Histories of 16 positions, one per lane, of the one before them, and of the last; anything unless `PACKED`."""
    lane = lane_numbers(W)
    if PACKED:
        return (
            gl.load(numbers_row + (first + 1) + lane),
            gl.load(numbers_row + first + lane * 0),
            gl.load(numbers_row + (first + 16) + lane * 0),
        )
    return lane, lane, lane


@gluon.jit
def log2_sums(log_decay, number, EXACT: gl.constexpr, PACKED: gl.constexpr):
    """Sums of log decays, to the base of 2, up to each position (among several histories: from where its own begins).

    If `EXACT` they are of two parts, of which the first has no error (`kernels.decays`).
    """
    log2 = gl.maximum(log_decay, -128.0) * 1.4426950408889634
    if EXACT:
        coarse = gl.floor(log2 * 64.0) * 0.015625
        return lane_sums(coarse, number, PACKED), lane_sums(log2 - coarse, number, PACKED)
    sums = lane_sums(log2, number, PACKED)
    return sums, sums


@gluon.jit
def edge_decays(coarse, fine, number, first_number, last_number, EXACT: gl.constexpr, PACKED: gl.constexpr):
    """Decay factors from the chunk's start to a position, from there to the end, and over all, per lane."""
    total = lane_at(coarse, 15)
    since_start = coarse
    until_end = total - coarse
    if EXACT:
        fine_total = lane_at(fine, 15)
        since_start += fine
        until_end += fine_total - fine
        total += fine_total
    from_start = exp2(since_start)
    to_end = exp2(until_end)
    throughout = exp2(total)
    if PACKED:
        from_start = gl.where(number == first_number, from_start, 0.0)
        to_end = gl.where(number == last_number, to_end, 0.0)
        throughout = gl.where(first_number == last_number, throughout, 0.0)
    return from_start, to_end, throughout


@gluon.jit
def decays_between(coarse, fine, number, EXACT: gl.constexpr, PACKED: gl.constexpr):
    """Decay factors [W, i, j] from position j to i, of which only those count that are reached, and which these are."""
    W: gl.constexpr = coarse.shape[0]
    log2 = to_rows(coarse)[:, :, None] - to_columns(coarse)[:, None, :]
    if EXACT:
        log2 += to_rows(fine)[:, :, None] - to_columns(fine)[:, None, :]
    reached = tile_rows(16, W) >= tile_columns(16, W)
    if PACKED:
        reached &= to_rows(number)[:, :, None] == to_columns(number)[:, None, :]
    return exp2(log2), reached
