"""Gated recurrent units over rows of histories."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from tim4rec_jax.layers.dense import wide
from tim4rec_jax.layers.rows import Rows


def gated_recurrence(driven: Array, kernel: Array, bias: Array | None, before: Array, starts: Array | None) -> Array:
    """Runs gated recurrent units over positions.

      r, z = sigmoid(driven_rz + h_{t-1} W_rz + b_rz),    n = tanh(driven_n + r * (h_{t-1} W_n + b_n))
      h_t = (1 - z) * n + z * h_{t-1},    h_{t-1} = 0 where a history begins

    The bias b_n lies inside the reset gate, as in PyTorch and cuDNN.

    Args:
      driven: [b, l, 3h] what the inputs give the gates r, z and n.
      kernel: W, [h, 3h]; its dtype is that of the products' factors.
      bias: b, [3h], or None.
      before: h_0, [b, h], whose dtype, float32 or wider, is that of the sums and of h.
      starts: bool [b, l], true where a history begins; or None.

    Returns:
      h_1 .. h_l, [b, l, h], in the dtype of `before`.

    Source: Cho et al. 2014, arXiv 1406.1078.
    """
    width = before.shape[-1]

    def step(h: Array, inputs: tuple[Array, Array | None]) -> tuple[Array, Array]:
        given, start = inputs
        h = h if start is None else jnp.where(start[:, None], 0, h)
        own = jnp.matmul(h.astype(kernel.dtype), kernel, preferred_element_type=h.dtype)
        own = own if bias is None else own + bias.astype(h.dtype)
        gates = jax.nn.sigmoid(given[:, : 2 * width] + own[:, : 2 * width])
        r, z = jnp.split(gates, 2, axis=1)
        n = jnp.tanh(given[:, 2 * width :] + r * own[:, 2 * width :])
        h = (1 - z) * n + z * h
        return h, h

    by_position = jnp.swapaxes(driven.astype(before.dtype), 0, 1), None if starts is None else starts.T
    _, states = jax.lax.scan(step, before, by_position)
    return jnp.swapaxes(states, 0, 1)


class GRU(nn.Module):
    """One layer of gated recurrent units, see `gated_recurrence`; driven = x W_x (+ b_x) for all positions at once.

    Matrices start uniform as Glorot & Bengio 2010 have it, biases at 0.

    Attributes:
      width: h.
      dtype: of the products; the state is kept in float32 or wider.
      use_bias: add b_x and b.
    """

    width: int
    dtype: str
    use_bias: bool

    @nn.compact
    def __call__(
        self, x: Array, channel: None, rows: Rows, cache: Array | None = None
    ) -> tuple[Array, None, Array | None]:
        """Maps x [b, l, d] to the states.

        Args:
          x: [b, l, d].
          channel: handed on; no time is read.
          rows: of x.
          cache: [b, h] state before, or None.

        Returns:
          [b, l, h], or [b, m, h] at `rows.positions`; the channel; the state [b, h] behind these positions (None
          without a cache).
        """
        parameters = wide(self.dtype)

        def matrix(name: str, inputs: int) -> Array:
            shape = (inputs, 3 * self.width)
            return self.param(name, nn.initializers.glorot_uniform(), shape, parameters).astype(self.dtype)

        def bias(name: str) -> Array | None:
            if not self.use_bias:
                return None
            return self.param(name, nn.initializers.zeros_init(), (3 * self.width,), parameters).astype(self.dtype)

        driven, added = x @ matrix("input_kernel", x.shape[-1]), bias("input_bias")
        driven = driven if added is None else driven + added
        before = self.init_cache(x.shape[0]) if cache is None else cache
        starts = rows.starts if cache is None else None
        states = gated_recurrence(
            driven, matrix("recurrent_kernel", self.width), bias("recurrent_bias"), before, starts
        )
        after = None if cache is None else rows.behind(before, states)
        return rows.at(states.astype(self.dtype)), channel, after

    def init_cache(self, batch: int) -> Array:
        """Returns the state before the first event of `batch` histories."""
        return jnp.zeros((batch, self.width), wide(self.dtype))
