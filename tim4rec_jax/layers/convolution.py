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

    def __call__(
        self,
        x: Array,
        channels: slice = slice(None),
        *,
        segment_ids: Array | None = None,
        cache: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """Convolves x [b, l, c], which holds the given channels only.

        Args:
          x: [b, l, c].
          channels: those of x.
          segment_ids: int32 [b, l], which history a position belongs to, 0 for padding; or None. With a cache a row is
            one history.
          cache: [b, K - 1, c] inputs before x, 0 where there are none; or None.

        Returns:
          [b, l, c], and the next cache or None.
        """
        kernel, bias = self.kernel[:, channels], self.bias[channels]
        if cache is None:
            options = {"segment_ids": segment_ids, "implementation": self.implementation}
            return causal_conv1d(x, kernel, bias, activation=self.activation, **options), None
        cache = cache.astype(x.dtype)
        y = causal_conv1d(x, kernel, bias, activation=self.activation, initial=cache)
        return y, causal_conv1d_tail(x, self.taps, segment_ids, cache)

    def last(self, window: Array, channels: slice = slice(None)) -> Array:
        """Returns the output [b, c] at one position from its window [b, K, c] of inputs (0 before the first)."""
        return causal_conv1d_last(window, self.kernel[:, channels], self.bias[channels], activation=self.activation)
