"""The loss, or the log-sum-exp alone, and its gradient from a backend's two passes over the catalogue.

What targets mean is decided here alone.
"""

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array


class Passes(Protocol):
    """What a backend does; hashable, for it is a static argument of the gradient rule.

    hidden [t, d], embedding [v, d], int32 targets [t], masked bool [v] or None.
    """

    def forward(self, hidden: Array, embedding: Array, targets: Array, masked: Array | None) -> tuple[Array, Array]:
        """Returns log sum_v exp(hidden_t . E_v) and hidden_t . E_target, both [t] in float32 or wider.

        The score of a masked target is -inf; that of a target outside 0 to v - 1 may be anything.
        """
        ...

    def backward(
        self, hidden: Array, embedding: Array, targets: Array, masked: Array | None, lse: Array, weights: Array
    ) -> tuple[Array, Array]:
        """Returns the gradients of sum_t weights_t (lse_t - hidden_t . E_target) by hidden and embedding."""
        ...


def from_passes(passes: Passes, hidden: Array, embedding: Array, targets: Array | None, masked: Array | None) -> Array:
    """Returns the loss [t] that `reference` defines, or the log-sum-exp where there are no targets.

    Gradients keep the inputs and the log-sum-exp [t].
    """
    if targets is None:
        return _log_sum_exp(passes, hidden, embedding, masked)
    return _loss(passes, hidden, embedding, targets, masked)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(passes: Passes, hidden: Array, embedding: Array, targets: Array, masked: Array | None) -> Array:
    return _loss_fwd(passes, hidden, embedding, targets, masked)[0]


def _loss_fwd(passes: Passes, hidden: Array, embedding: Array, targets: Array, masked: Array | None):
    lse, at_target = passes.forward(hidden, embedding, targets, masked)
    at_target = jnp.where(targets < embedding.shape[0], at_target, jnp.nan)
    loss = jnp.where(targets < 0, 0.0, lse - at_target)
    return loss, (hidden, embedding, targets, masked, lse)


def _loss_bwd(passes: Passes, residuals: tuple[Any, ...], d_loss: Array):
    hidden, embedding, targets, masked, lse = residuals
    weights = jnp.where(targets < 0, 0.0, d_loss)
    d_hidden, d_embedding = passes.backward(hidden, embedding, targets, masked, lse, weights)
    return d_hidden.astype(hidden.dtype), d_embedding.astype(embedding.dtype), None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum_exp(passes: Passes, hidden: Array, embedding: Array, masked: Array | None) -> Array:
    """Its gradient is that of the loss of absent targets."""
    return _log_sum_exp_fwd(passes, hidden, embedding, masked)[0]


def _log_sum_exp_fwd(passes: Passes, hidden: Array, embedding: Array, masked: Array | None):
    lse, _ = passes.forward(hidden, embedding, _no_targets(hidden), masked)
    return lse, (hidden, embedding, masked, lse)


def _log_sum_exp_bwd(passes: Passes, residuals: tuple[Any, ...], d_lse: Array):
    hidden, embedding, masked, lse = residuals
    # With every item masked it is -inf, which would make exp(score - lse) infinite before the mask makes it 0.
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    d_hidden, d_embedding = passes.backward(hidden, embedding, _no_targets(hidden), masked, lse, d_lse)
    return d_hidden.astype(hidden.dtype), d_embedding.astype(embedding.dtype), None


def _no_targets(hidden: Array) -> Array:
    return jnp.full(hidden.shape[0], -1, jnp.int32)


_log_sum_exp.defvjp(_log_sum_exp_fwd, _log_sum_exp_bwd)
