"""What the forward and backward GPU kernels of state space duality share: who works where, loads, decays.

Tiles are [c, p], [c, n], [c, c] and [p, n] for a chunk of c positions; sides are powers of two, filled with zeros.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels.decays import COARSE_STEP, ENOUGH, decays_between
from kernels.ssd.config import SsdConfig
from kernels.tiling import power_of_two
from kernels.triton import Span, TilePrecision, load_tile, tile_dot

if TYPE_CHECKING:
    from kernels.ssd.gluon_tiles import GluonParams

# How rows are cut. Gluon is not imported for it.
CutRows = Union["KernelParams", "GluonParams"]


@dataclass(frozen=True)
class KernelParams:
    """Static numbers of a call.

    Attributes:
      batch, length, heads, groups, width, state_width: b, l, h, g, p and n.
      config: how the work is cut up.
      precision: what becomes of float32 factors.
      interpret: run as plain JAX.
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
    config: SsdConfig
    precision: TilePrecision
    interpret: bool
    has_initial: bool
    wants_final: bool = False
    packed: bool = False

    @property
    def chunk(self) -> int:
        """c"""
        return self.config.chunk_size

    @cached_property
    def num_chunks(self) -> int:
        """Chunks of a segment."""
        return -(-self.length // (self.chunk * self.config.segments))

    @cached_property
    def segments(self) -> int:
        """s, so many that each has a real position."""
        return -(-self.length // (self.chunk * self.num_chunks))

    @property
    def all_chunks(self) -> int:
        """Chunks of a row."""
        return self.num_chunks * self.segments

    @property
    def starts_from_zero(self) -> bool:
        """The state before a row's first chunk is zero, and is neither kept nor read."""
        return self.segments == 1 and not self.has_initial

    @property
    def states(self) -> Span:
        """The state axis."""
        return Span(0, power_of_two(self.state_width), self.state_width)

    def columns(self, split: Any) -> Span:
        """The columns of a head's width that a program handles."""
        count = power_of_two(self.width) // self.config.width_splits
        return Span(split * count if self.config.width_splits > 1 else 0, count, self.width)

    def barrier(self) -> None:
        """Lets a program's threads see what the others stored before it."""
        if not self.interpret:
            pltriton.debug_barrier()

    def dot(self, a: Array, b: Array, **transposed: bool) -> Array:
        """Product of two tiles."""
        return tile_dot(a, b, precision=self.precision, interpret=self.interpret, **transposed)


class ProgramIndex(NamedTuple):
    """Where a program works: its row, segment, group, first head, part among those that share B and C, first column."""

    row: Any
    segment: Any
    group: Any
    head: Any
    part: Any
    split: Any


def grid_size(params: KernelParams, heads_per_program: int, splits: int) -> int:
    """Size of the grid that `place` divides."""
    return params.batch * params.segments * (params.heads // heads_per_program) * splits


def program_index(params: KernelParams, heads_per_program: int, splits: int) -> ProgramIndex:
    """Finds a program's place; neighbours share a row, so that its B and C stay in the cache."""
    unit = pl.program_id(0)
    split, unit = unit % splits, unit // splits
    blocks = params.heads // heads_per_program
    block, unit = unit % blocks, unit // blocks
    blocks_per_group = blocks // params.groups
    part = (block % blocks_per_group) * splits + split
    row, segment = unit // params.segments, unit % params.segments
    return ProgramIndex(row, segment, block // blocks_per_group, block * heads_per_program, part, split)


class Steps(NamedTuple):
    """Step sizes of a chunk [c], and d delta / d dt."""

    delta: Array
    slope: Array


def load_steps(dt_ref: Any, row: Any, positions: Span, head: Any, bias: Array, row_length: Array) -> Steps:
    """Loads raw steps and applies the softplus; after the row's end both results are 0."""
    raw = load_tile(dt_ref, row, positions, head).astype(jnp.float32) + bias
    real = positions.start + jnp.arange(positions.count) < jnp.minimum(row_length, positions.limit)
    tail = jnp.exp(-jnp.abs(raw))
    delta = jnp.maximum(raw, 0.0) + jnp.log1p(tail)
    slope = jnp.where(raw >= 0, 1.0, tail) / (1.0 + tail)
    return Steps(jnp.where(real, delta, 0.0), jnp.where(real, slope, 0.0))


def scaled(tile: Array, factors: Array) -> Array:
    """Rows of a tile times factors, in the tile's dtype."""
    return (factors[:, None] * tile.astype(jnp.float32)).astype(tile.dtype)


def history_numbers(params: CutRows, segment_ids: Array | None) -> Array | None:
    """Returns ids int32 [b, k c + 1], entry t of the position before t; padding goes on like the last history."""
    if segment_ids is None:
        return None
    ids = jax.lax.cummax(jnp.concatenate([segment_ids[:, :1], segment_ids], axis=1), axis=1)
    return jnp.pad(ids, ((0, 0), (0, params.all_chunks * params.chunk - params.length)), mode="edge")


class Histories(NamedTuple):
    """Ids of the histories that positions of a chunk belong to.

    Attributes:
      number: [c], of each position.
      first, last: [], of the last position before the chunk, and of the chunk's own last position.
    """

    number: Array
    first: Array
    last: Array

    def together(self) -> Array:
        """[c, c] bool, true for positions of one history."""
        return self.number[:, None] == self.number[None, :]

    def edges(self) -> tuple[Array, Array, Array]:
        """Bool [c], [c] and []: which positions go on with what was before, which go on at the end, and whether all."""
        return self.number == self.first, self.number == self.last, self.first == self.last


def load_histories(params: KernelParams, numbers_ref: Any, row: Any, chunk: Any) -> Histories | None:
    """Loads the numbers of a chunk, or gives None where every row is one history."""
    if not params.packed:
        return None
    first = chunk * params.chunk
    number = pltriton.load(numbers_ref.at[row, pl.ds(first + 1, params.chunk)])
    return Histories(number, numbers_ref[row, first], numbers_ref[row, first + params.chunk])


def mask_tile(params: KernelParams, tile: Array, decay: Array) -> Array:
    """Among several histories, sets a tile to 0 where decay factors are: also what has overflowed in another one."""
    return jnp.where(decay == 0.0, 0.0, tile) if params.packed else tile


def apply_decay(params: KernelParams, decay: Array, tile: Array) -> Array:
    """Multiplies by decay factors; 0 wins as in `mask_tile`."""
    return mask_tile(params, decay * tile, decay)


class Decays(NamedTuple):
    """Decay factors of a chunk, 0 from one history to another.

    Attributes:
      between: [c, c], from position j (after it) to position i, with ones on the diagonal and zeros above it.
      from_start: [c], from the chunk's start to the position.
      to_end: [c], from the position to the chunk's end.
      total: [], over the whole chunk.
    """

    between: Array
    from_start: Array
    to_end: Array
    total: Array


def chunk_decays(log_decay: Array, histories: Histories | None) -> Decays:
    """Builds the decay factors from log decays [c], with the exact coarse sums of `kernels.decays`."""
    edges = edge_decays(log_decay, histories)
    coarse, fine = _split(log_decay, histories)
    coarse_sum, fine_sum = jnp.cumsum(coarse), jnp.cumsum(fine)
    segments = (coarse_sum[:, None] - coarse_sum[None, :]) + (fine_sum[:, None] - fine_sum[None, :])
    joined = lower_triangle(log_decay.shape[0])
    if histories is not None:
        joined &= histories.together()
    # The mask comes before exp: above the diagonal the sums are positive and overflow for strong decay.
    between = jnp.exp(jnp.where(joined, segments, -jnp.inf))
    return Decays(between, *edges)


def edge_decays(log_decay: Array, histories: Histories | None) -> tuple[Array, Array, Array]:
    """`from_start`, `to_end` and `total` of `Decays` alone."""
    coarse, fine = _split(log_decay, histories)
    coarse_total, fine_total = jnp.sum(coarse), jnp.sum(fine)
    coarse_sum, fine_sum = jnp.cumsum(coarse), jnp.cumsum(fine)
    from_first, with_last, throughout = (None,) * 3 if histories is None else histories.edges()
    from_start = _exp_where(from_first, coarse_sum + fine_sum)
    to_end = _exp_where(with_last, (coarse_total - coarse_sum) + (fine_total - fine_sum))
    return from_start, to_end, _exp_where(throughout, coarse_total + fine_total)


def _exp_where(mask: Array | None, log_decay: Array) -> Array:
    return jnp.exp(log_decay if mask is None else jnp.where(mask, log_decay, -jnp.inf))


def _split(log_decay: Array, histories: Histories | None) -> tuple[Array, Array]:
    log_decay = jnp.maximum(log_decay, ENOUGH)
    if histories is not None:
        return _split_for_exact_sums(log_decay)
    coarse = jnp.floor(log_decay * (1.0 / COARSE_STEP)) * COARSE_STEP
    return coarse, log_decay - coarse


def _split_for_exact_sums(log_decay: Array) -> tuple[Array, Array]:
    """Rounds log decays [c] so that both parts have exact sums over a chunk, in 24 bits.

    Differences of sums inside one history then lose what others added before it to the last bit, whatever that was, and
    also the step that leads to it. For c = 32 the parts are multiples of 2^-11 and 2^-30.
    """
    size = log_decay.shape[0]
    coarse_step = size * 2.0**-16
    fine_step = size * coarse_step * 2.0**-24
    coarse = jnp.floor(log_decay * (1.0 / coarse_step)) * coarse_step
    return coarse, jnp.floor((log_decay - coarse) * (1.0 / fine_step) + 0.5) * fine_step


def lower_triangle(size: int, *, strict: bool = False) -> Array:
    """[size, size] bool, true where column j <= row i, or j < i."""
    row, column = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
    return row > column if strict else row >= column


def uncut_segments(params: CutRows, numbers: Array | None) -> Array | None:
    """Returns bool [b, s], true where no history begins in a segment; or None where every row is one history."""
    if numbers is None:
        return None
    at_borders = numbers[:, :: params.num_chunks * params.chunk]
    return at_borders[:, 1:] == at_borders[:, :-1]


def _scan_segments(state_update: Array, decay: Array, initial: Array) -> Array:
    """Finds the states step by step, where a decay of 0 lets nothing pass, not even what has overflowed."""

    def join(sooner: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        factor = later[0][..., None, None]
        return sooner[0] * later[0], jnp.where(factor == 0, 0, factor * sooner[1]) + later[1]

    # The initial state counts as what a segment before the first adds; what the last adds is no longer asked for.
    inflow = jnp.concatenate([initial[:, None], state_update[:, :-1]], axis=1)
    decays = jnp.concatenate([jnp.zeros_like(decay[:, :1]), decay[:, :-1]], axis=1)
    return jax.lax.associative_scan(join, (decays, inflow), axis=1)[1]


def states_before(
    state_update: Array, log_decay: Array, initial: Array | None, *, uncut: Array | None = None, reverse: bool = False
) -> Array:
    """Finds the state before each segment.

      state_0 = initial,    state_{s+1} = exp(log_decay_s) state_s + added_s, or added_s where segment s is cut

    Args:
      state_update: [b, s, h, p, n] what a segment adds to its decayed state.
      log_decay: [b, s, h] total log decay of a segment.
      initial: [b, h, p, n] before the first segment, or None for zeros.
      uncut: bool [b, s], false where a history begins in a segment, or None for nowhere.
      reverse: go from the last segment to the first; "before" then means after it in time.

    Returns:
      [b, s, h, p, n], without the state that comes out of the last of them.
    """
    if reverse:
        state_update, log_decay = jnp.flip(state_update, 1), jnp.flip(log_decay, 1)
    first = jnp.zeros_like(state_update[:, 0]) if initial is None else initial
    if uncut is not None:
        uncut = jnp.flip(uncut, 1) if reverse else uncut
        before = _scan_segments(state_update, jnp.where(uncut[..., None], jnp.exp(log_decay), 0), first)
        return jnp.flip(before, 1) if reverse else before
    # Segment s brings what segment s - 1 added: shifted by one, with the initial state as what came first.
    inflow = jnp.concatenate([first[:, None], state_update[:, :-1]], axis=1)
    steps = jnp.concatenate([jnp.zeros_like(log_decay[:, :1]), log_decay[:, :-1]], axis=1)
    between = decays_between(jnp.moveaxis(steps, 1, 2))
    weights = between + jnp.eye(between.shape[-1], dtype=between.dtype)
    before = jnp.einsum("bhst,bthpn->bshpn", weights, inflow, precision=jax.lax.Precision.HIGHEST)
    return jnp.flip(before, 1) if reverse else before
