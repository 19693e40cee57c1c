"""A learned filter over the frequencies of a sequence."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from tim4rec_jax.layers.dense import INIT_STD, layer_norm, wide
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import ModelConfig


def spectral_filter(x: Array, weight: Array) -> Array:
    """Multiplies every frequency of every channel by a complex number: irfft(rfft(x) W), both orthonormal.

    Args:
      x: [b, l, d], float32 or float64; all l positions count.
      weight: [l // 2 + 1, d, 2], real and imaginary parts of W.

    Returns:
      [b, l, d] in the dtype of x.

    Raises:
      ValueError: for a weight of another shape.

    Source: Zhou et al. 2022 (FMLP-Rec, arXiv 2202.13556), section 4.2.
    """
    expected = (x.shape[1] // 2 + 1, x.shape[2], 2)
    if weight.shape != expected:
        raise ValueError(f"weight has shape {weight.shape}, expected (l // 2 + 1, d, 2)={expected} for x {x.shape}")
    spectrum = jnp.fft.rfft(x, axis=1, norm="ortho")
    filtered = spectrum * jax.lax.complex(weight[..., 0], weight[..., 1])
    return jnp.fft.irfft(filtered, n=x.shape[1], axis=1, norm="ortho")


class SpectralFilter(nn.Module):
    """out = LayerNorm(Dropout(irfft(rfft(x) W)) + x) over the max_len positions of a padded row.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        shape = (config.max_len // 2 + 1, config.d_model, 2)
        self.weight = self.param("weight", nn.initializers.normal(INIT_STD), shape, wide(config.dtype))
        self.dropout = Dropout(config.dropout)
        self.norm = layer_norm(config.norm_eps, config.dtype)

    def __call__(self, x: Array, rows: Rows) -> Array:
        """Maps x [b, max_len, d] to [b, max_len, d]; the transform runs in float32 or wider."""
        filtered = spectral_filter(x.astype(self.weight.dtype), self.weight).astype(x.dtype)
        return self.norm(self.dropout(filtered, rows.example_ids, deterministic=rows.deterministic) + x)
