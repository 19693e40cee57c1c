"""Step sizes of state space operators from raw steps."""

import jax
import jax.numpy as jnp
from jax import Array


def step_size(dt: Array, dt_bias: Array | None = None, lengths: Array | None = None) -> Array:
    """Turns raw steps into step sizes, delta = softplus(dt + dt_bias), and stops the clock after a row's end.

    Args:
      dt: [b, l, k] raw steps of k heads or channels.
      dt_bias: [k], or None for 0.
      lengths: int [b] real positions a row, or None for all; later positions get delta = 0 exactly.

    Returns:
      [b, l, k] in float32, or float64 where dt is float64.
    """
    dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
    delta = jax.nn.softplus(dt if dt_bias is None else dt + dt_bias.astype(dt.dtype))
    if lengths is not None:
        real = jnp.arange(dt.shape[1]) < lengths[:, None]
        delta = jnp.where(real[..., None], delta, jnp.zeros((), delta.dtype))
    return delta
