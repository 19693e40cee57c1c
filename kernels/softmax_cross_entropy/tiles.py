"""Tiles of the kernels: rows of a matrix a few columns at a time, and products of such rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as pltriton

from kernels.tiling import power_of_two
from kernels.triton import Span, load_tile


def load_vector(ref: Any, start: Array | int, size: int) -> Array:
    """Loads [size] of a vector; what lies beyond its end is 0."""
    return load_tile(ref, Span(start, size, ref.shape[0]))


class Columns:
    """Columns of matrices [., d] in strips, so that a wide row need not be on the chip at once.

    Attributes:
      starts: first column of each strip.
      size: columns of a strip, a power of two.
    """

    def __init__(self, width: int, largest: int):
        self.width = width
        self.size = min(power_of_two(width), largest)
        self.starts = range(0, width, self.size)

    def _place(self, rows: Array, real: Array, column: int) -> tuple[tuple[Array, Array], Array]:
        """Returns indices of a strip [rows, size], and which of its places are real, given which rows are."""
        # Not a slice: one with a fixed start may not reach beyond the last column, even where that is masked.
        columns = column + jnp.arange(self.size)
        mask = jnp.broadcast_to(real[:, None], (rows.size, self.size))
        if column + self.size > self.width:
            mask &= columns[None, :] < self.width
        return (rows[:, None], columns[None, :]), mask

    def load(self, ref: Any, rows: Array, real: Array, column: int) -> Array:
        """Loads [rows, size] of a matrix from a column on, with 0 beyond the last one and where rows are not real."""
        place, mask = self._place(rows, real, column)
        return pltriton.load(ref.at[place], mask=mask, other=0.0)

    def store(self, ref: Any, rows: Array, real: Array, column: int, strip: Array) -> None:
        """Stores what `load` would load."""
        place, mask = self._place(rows, real, column)
        pltriton.store(ref.at[place], strip, mask=mask)

    def loader(self, ref: Any, start: Array | int, rows: int, dtype: Any) -> Callable[[int], Array]:
        """Returns a function that loads the strip at a column; a matrix of one strip is loaded here and now."""
        ids = start + jnp.arange(rows)

        def load(column: int) -> Array:
            return self.load(ref, ids, ids < ref.shape[0], column).astype(dtype)

        if len(self.starts) > 1:
            return load
        whole = load(0)
        return lambda column: whole

    def scores(self, a: Callable[[int], Array], b: Callable[[int], Array], dot: Any) -> Array:
        """Multiplies every row of a by every row of b."""
        return functools.reduce(jnp.add, [dot(a(column), b(column), trans_b=True) for column in self.starts])
