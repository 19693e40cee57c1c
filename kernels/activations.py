"""Pointwise activations that several operators offer by name."""

from collections.abc import Callable

import jax
from jax import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "silu": jax.nn.silu,
    "hard_swish": jax.nn.hard_swish,
}


def activation(name: str) -> Callable[[Array], Array]:
    """Returns the activation called `name`.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} must be one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]
