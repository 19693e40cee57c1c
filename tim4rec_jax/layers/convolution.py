"""Parameters of a causal depthwise convolution."""

import math

import jax
from flax import linen as nn
from jax import Array

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_last, causal_conv1d_tail
from tim4rec_jax.layers.dense import wide


class CausalConv(nn.Module):
    """Causal depthwise convolution with bias and activation (`kernels.causal_conv1d`).

    Attributes:
      channels: c.
      taps: K, positions seen.
      activation: "silu", "hard_swish" or "none".
      kaiming_init: weights N(0, 2 / (c K)) and zero bias; else both uniform(+-1/sqrt(K)).
      dtype: arithmetic.
      implementation: backend of the operator, or None to pick one.
    """

    channels: int
    taps: int
    activation: str
    kaiming_init: bool
    dtype: str
    implementation: str | None = None

    def setup(self) -> None:
        bound = 1.0 / math.sqrt(self.taps)

        def uniform(key: Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        normal = nn.initializers.normal(math.sqrt(2.0 / (self.channels * self.taps)))
        weight_init, bias_init = (normal, nn.initializers.zeros_init()) if self.kaiming_init else (uniform, uniform)
        dtype = wide(self.dtype)
        self.kernel = self.param("kernel", weight_init, (self.taps, self.channels), dtype)
        self.bias = self.param("bias", bias_init, (self.channels,), dtype)

    def __call__(self, x: Array, channels: slice = slice(None), *, starts: Array | None = None) -> Array:
        """Convolves x [b, l, c], which holds the given channels only; `starts` [b, l] mark where histories begin."""
        return causal_conv1d(
            x, self.kernel[:, channels], self.bias[channels], activation=self.activation, starts=starts,
            implementation=self.implementation,
        )  # fmt: skip

    def extend(self, x: Array, tail: Array, lengths: Array) -> tuple[Array, Array]:
        """Goes on after the inputs `tail` [b, K - 1, c]; returns the outputs [b, l, c] and the next tail.

        Args:
          x: [b, l, c] further inputs.
          tail: [b, K - 1, c] inputs before them, 0 where there are none.
          lengths: int [b] real positions of x, 0 to l.
        """
        tail = tail.astype(x.dtype)
        y = causal_conv1d(x, self.kernel, self.bias, activation=self.activation, initial=tail)
        return y, causal_conv1d_tail(x, self.taps, lengths, tail)

    def last(self, window: Array, channels: slice = slice(None)) -> Array:
        """Returns the output [b, c] at one position from its window [b, K, c] of inputs (0 before the first)."""
        return causal_conv1d_last(window, self.kernel[:, channels], self.bias[channels], activation=self.activation)
