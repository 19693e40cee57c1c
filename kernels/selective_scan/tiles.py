"""What the forward and backward kernels share: the part of the arrays that a program handles.

A program holds states as a tile [n, e], channels last. Loads of single positions are then contiguous, and the compiler
lays such a tile out over a warp so that sums over n (outputs) and over e (gradients of B and C) both take few exchanges
between threads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels.tiling import power_of_two
from kernels.triton import Span, load_tile, store_tile


class Tile(NamedTuple):
    """A row and a block of its channels, with all state entries.

    Attributes:
      row: index into b.
      block: which block of channels.
      positions: l.
      channels, states: where the tile lies along e and n.
    """

    row: Array
    block: Array
    positions: int
    channels: Span
    states: Span

    @property
    def shape(self) -> tuple[int, int]:
        """Of a state: n, e."""
        return self.states.count, self.channels.count

    def load(self, ref: Any, t: Array, span: Span) -> Array:
        """Reads channels or state entries of a position from an array [b, l, ..] in float32; 0 behind the row."""
        return load_tile(ref, self.row, t, span, when=t < self.positions).astype(jnp.float32)

    def store(self, ref: Any, tile: Array, t: Array, span: Span, *block: Array) -> None:
        """Stores what `load` would load; into [b, block, l, ..] with a block."""
        store_tile(ref, tile, self.row, *block, t, span, when=t < self.positions)

    def load_start(self, ref: Any, t: Array) -> Array | None:
        """Reads whether a history begins at a position from an int8 array [b, l], where there is one."""
        if ref is None:
            return None
        return pltriton.load(ref.at[self.row, t], mask=t < self.positions, other=0) != 0


def this_tile(x_shape: tuple[int, ...], state_width: int, channels: int) -> Tile:
    """Returns the tile of the running program: blocks of `channels` channels, then rows."""
    _, positions, width = x_shape
    blocks = pl.cdiv(width, channels)
    program = pl.program_id(0)
    row = divide(program, blocks)
    block = program - row * blocks
    states = Span(0, power_of_two(state_width), state_width)
    return Tile(row, block, positions, Span(block * channels, channels, width), states)


def from_before(a: Array, start: Array | None) -> Array:
    """What of a tile [n, e] passes between a position and the one before: nothing where a history begins."""
    return a if start is None else jnp.where(start, jnp.zeros_like(a), a)


def divide(index: Array, by: int) -> Array:
    """Returns index // by for an index that is not negative, whatever its integer type."""
    return jax.lax.div(index, jax.lax.full_like(index, by))
