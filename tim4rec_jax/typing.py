"""Array aliases and the axis legend of the whole library.

Axis letters: `b` batch, `l` length (position), `d` model width, `e` inner width (expand * d), `h` heads, `p` head
width, `n` state width, `v` catalogue size with the padding row, `k` list length, `c` chunk.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

# What callers hand in may be NumPy's.
Items: TypeAlias = Int[Array | np.ndarray, "b l"]
Lengths: TypeAlias = Int[Array | np.ndarray, " b"]
Timestamps: TypeAlias = Shaped[Array | np.ndarray, "b t"]
Hidden: TypeAlias = Float[Array, "b _ d"]
Scores: TypeAlias = Float[Array, "b v"]
Params: TypeAlias = Mapping[str, Any]

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Hidden",
    "Int",
    "Items",
    "Key",
    "Lengths",
    "Params",
    "Scores",
    "Shaped",
    "Timestamps",
]
