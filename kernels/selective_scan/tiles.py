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

from kernels.triton_call import power_of_two


class Tile(NamedTuple):
    """A row and a block of its channels, with all state entries.

    Attributes:
      row: index into b.
      block: which block of channels.
      positions: l.
      channels, states: where the tile lies along e and n; tiles may reach over the end.
      in_channels, in_states: [tile e] and [tile n], which of its entries exist.
    """

    row: Array
    block: Array
    positions: int
    channels: Any
    states: Any
    in_channels: Array
    in_states: Array

    @property
    def mask(self) -> Array:
        """[tile n, tile e]"""
        return self.in_states[:, None] & self.in_channels[None, :]

    def channels_exist(self, t: Array) -> Array:
        """Mask of one position's channels."""
        return self.in_channels & (t < self.positions)

    def states_exist(self, t: Array) -> Array:
        """Mask of one position's state entries."""
        return self.in_states & (t < self.positions)

    def load_channels(self, ref: Any, t: Array) -> Array:
        """Reads [tile e] of an array [b, l, e] in float32."""
        part = pltriton.load(ref.at[self.row, t, self.channels], mask=self.channels_exist(t), other=0.0)
        return part.astype(jnp.float32)

    def load_states(self, ref: Any, t: Array) -> Array:
        """Reads [tile n] of an array [b, l, n] in float32."""
        part = pltriton.load(ref.at[self.row, t, self.states], mask=self.states_exist(t), other=0.0)
        return part.astype(jnp.float32)

    def load_start(self, ref: Any, t: Array) -> Array | None:
        """Reads whether a history begins at a position from an int8 array [b, l], where there is one."""
        if ref is None:
            return None
        return pltriton.load(ref.at[self.row, t], mask=t < self.positions, other=0) != 0

    def load_parameter(self, ref: Any) -> Array:
        """Reads [tile e] of an array [e]."""
        return pltriton.load(ref.at[self.channels], mask=self.in_channels, other=0.0)


def this_tile(x_shape: tuple[int, ...], state_width: int, channels: int) -> Tile:
    """Returns the tile of the running program: blocks of `channels` channels, then rows."""
    _, positions, width = x_shape
    blocks = pl.cdiv(width, channels)
    program = pl.program_id(0)
    row = divide(program, blocks)
    block = program - row * blocks
    first, tile_states = block * channels, power_of_two(state_width)
    return Tile(
        row=row,
        block=block,
        positions=positions,
        channels=pl.ds(first, channels),
        states=pl.ds(0, tile_states),
        in_channels=first + jnp.arange(channels) < width,
        in_states=jnp.arange(tile_states) < state_width,
    )


def from_before(a: Array, start: Array | None) -> Array:
    """What of a tile [n, e] passes between a position and the one before: nothing where a history begins."""
    return a if start is None else jnp.where(start, jnp.zeros_like(a), a)


def divide(index: Array, by: int) -> Array:
    """Returns index // by for an index that is not negative, whatever its integer type."""
    return jax.lax.div(index, jax.lax.full_like(index, by))


def exp2(a: Array, interpret: bool) -> Array:
    """Returns 2^a by the one instruction that GPUs have for it; what is under 2^-126 becomes 0."""
    if interpret:
        return jnp.exp2(a)
    [power] = pltriton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[a],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, a.dtype)],
    )
    return power
