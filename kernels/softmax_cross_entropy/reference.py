"""The definition of the loss and of the log-sum-exp: all scores at once."""

import jax
import jax.numpy as jnp
from jax import Array

from kernels.dispatch import Precision


def softmax_cross_entropy_reference(
    hidden: Array, embedding: Array, targets: Array | None, masked: Array | None, *, precision: Precision = None
) -> Array:
    """Computes the loss from the [t, v] scores, in the widest dtype of the inputs, float32 at least.

      loss_t = log sum_{v not masked} exp(hidden_t . E_v) - hidden_t . E_target

    Args:
      hidden: [t, d].
      embedding: [v, d].
      targets: int [t], negative for loss 0, v or more for NaN; or None for the log-sum-exp alone.
      masked: bool [v] rows of probability 0, or None. The log-sum-exp of nothing is -inf with gradient 0.
      precision: changes nothing here, where products are as precise as can be.

    Returns:
      [t].
    """
    scores = _scores(hidden, embedding, masked)
    if targets is None:
        nothing = jnp.zeros((), bool) if masked is None else jnp.all(masked)
        return jnp.where(nothing, -jnp.inf, jax.nn.logsumexp(jnp.where(nothing, 0.0, scores), axis=1))
    at_target = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[:, None], axis=1, mode="fill", fill_value=jnp.nan)
    return jnp.where(targets < 0, 0.0, jax.nn.logsumexp(scores, axis=1) - at_target[:, 0])


def _scores(hidden: Array, embedding: Array, masked: Array | None) -> Array:
    dtype = jnp.result_type(hidden, embedding, jnp.float32)
    scores = jnp.matmul(hidden.astype(dtype), embedding.astype(dtype).T, precision=jax.lax.Precision.HIGHEST)
    return scores if masked is None else jnp.where(masked, -jnp.inf, scores)
