"""What the forward and backward GPU kernels of state space duality share: who works where, loads, decays.

Tiles are [c, p], [c, n], [c, c] and [p, n] for a chunk of c positions; sides are powers of two, filled with zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels.ssd.config import SsdConfig
from kernels.triton_call import Products, power_of_two, tile_dot

# See `kernels.ssd.xla_tile`: sums of multiples of 1/64 are exact in float32, and nothing is left after such a decay.
_COARSE_STEPS = 64.0
_ENOUGH = -128.0


@dataclass(frozen=True)
class Plan:
    """Static numbers of a call.

    Attributes:
      batch, length, heads, groups, width, state_width: b, l, h, g, p and n.
      config: how the work is cut up.
      products: what becomes of float32 factors.
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
    products: Products
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
    def states(self) -> "Span":
        """The state axis."""
        return Span(0, power_of_two(self.state_width), self.state_width)

    def columns(self, split: Any) -> "Span":
        """The columns of a head's width that a program handles."""
        count = power_of_two(self.width) // self.config.width_splits
        return Span(split * count if self.config.width_splits > 1 else 0, count, self.width)

    def barrier(self) -> None:
        """Lets a program's threads see what the others stored before it."""
        if not self.interpret:
            pltriton.debug_barrier()

    def dot(self, a: Array, b: Array, **transposed: bool) -> Array:
        """Product of two tiles."""
        return tile_dot(a, b, products=self.products, interpret=self.interpret, **transposed)


class Place(NamedTuple):
    """Where a program works: its row, segment, group, first head, part among those that share B and C, first column."""

    row: Any
    segment: Any
    group: Any
    head: Any
    part: Any
    split: Any


def num_programs(plan: Plan, heads_per_program: int, splits: int) -> int:
    """Size of the grid that `place` divides."""
    return plan.batch * plan.segments * (plan.heads // heads_per_program) * splits


def place(plan: Plan, heads_per_program: int, splits: int) -> Place:
    """Finds a program's place; neighbours share a row, so that its B and C stay in the cache."""
    unit = pl.program_id(0)
    split, unit = unit % splits, unit // splits
    blocks = plan.heads // heads_per_program
    block, unit = unit % blocks, unit // blocks
    blocks_per_group = blocks // plan.groups
    part = (block % blocks_per_group) * splits + split
    row, segment = unit // plan.segments, unit % plan.segments
    return Place(row, segment, block // blocks_per_group, block * heads_per_program, part, split)


class Span(NamedTuple):
    """A run of indices along one axis: first index, power-of-two count, and how many indices the axis has."""

    start: Any
    count: int
    limit: int

    def real(self) -> Array | None:
        """[count] bool, or None where nothing can lie outside."""
        if isinstance(self.start, int) and self.start + self.count <= self.limit:
            return None
        return self.start + jnp.arange(self.count) < self.limit


def _mask(spans: Sequence[Span]) -> Array | None:
    mask = None
    for axis, span in enumerate(spans):
        real = span.real()
        if real is not None:
            shape = [1] * len(spans)
            shape[axis] = span.count
            real = jnp.broadcast_to(real.reshape(shape), [s.count for s in spans])
            mask = real if mask is None else mask & real
    return mask


def _mask_unless(spans: Sequence[Span], unless: Array | None) -> Array | None:
    mask = _mask(spans)
    if unless is None:
        return mask
    wanted = jnp.broadcast_to(jnp.logical_not(unless), [span.count for span in spans])
    return wanted if mask is None else mask & wanted


def _indexer(index: Sequence[Any]) -> tuple[tuple[Any, ...], list[Span]]:
    spans = [i for i in index if isinstance(i, Span)]
    return tuple(pl.ds(i.start, i.count) if isinstance(i, Span) else i for i in index), spans


def load_tile(ref: Any, *index: Any, unless: Array | None = None) -> Array:
    """Loads ref at integers and `Span`s; what lies outside the array is 0, and so is all of it if `unless` is true."""
    at, spans = _indexer(index)
    mask = _mask_unless(spans, unless)
    return pltriton.load(ref.at[at], mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def store_tile(ref: Any, tile: Array, *index: Any, unless: Array | None = None) -> None:
    """Stores a tile at integers and `Span`s; what lies outside the array is left out, and all of it if `unless`."""
    at, spans = _indexer(index)
    pltriton.store(ref.at[at], tile.astype(ref.dtype), mask=_mask_unless(spans, unless))


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


class Histories(NamedTuple):
    """Numbers of the histories that positions of a chunk belong to, as `kernels.starts.history_numbers` gives them.

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


def load_histories(plan: Plan, numbers_ref: Any, row: Any, chunk: Any) -> Histories | None:
    """Loads the numbers of a chunk, or gives None where every row is one history."""
    if not plan.packed:
        return None
    first = chunk * plan.chunk
    number = pltriton.load(numbers_ref.at[row, pl.ds(first + 1, plan.chunk)])
    return Histories(number, numbers_ref[row, first], numbers_ref[row, first + plan.chunk])


def reached(plan: Plan, tile: Array, decay: Array) -> Array:
    """Among several histories, sets a tile to 0 where decay factors are: also what has overflowed in another one."""
    return jnp.where(decay == 0.0, 0.0, tile) if plan.packed else tile


def weigh(plan: Plan, decay: Array, tile: Array) -> Array:
    """Multiplies by decay factors; 0 wins as in `reached`."""
    return reached(plan, decay * tile, decay)


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
    """Builds the decay factors from log decays [c], with the exact coarse sums of `kernels.ssd.xla`."""
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
    log_decay = jnp.maximum(log_decay, _ENOUGH)
    if histories is not None:
        return _split_for_exact_sums(log_decay)
    coarse = jnp.floor(log_decay * _COARSE_STEPS) * (1.0 / _COARSE_STEPS)
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
