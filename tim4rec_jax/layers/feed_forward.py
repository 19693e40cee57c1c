"""Position-wise feed-forward block with residual and norm."""

from flax import linen as nn
from jax import Array

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.layers.dense import Linear, layer_norm
from tim4rec_jax.layers.dropout import Dropout

FEED_FORWARD_EPS = 1e-12


class FeedForward(nn.Module):
    """out = LayerNorm(Dropout(fc2(Dropout(hard_swish(fc1 h)))) + h), inner width 4d, eps 1e-12 in every setting.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.fc1 = Linear(4 * config.d_model, config.dtype)
        self.fc2 = Linear(config.d_model, config.dtype)
        self.inner_dropout = Dropout(config.dropout)
        self.outer_dropout = Dropout(config.dropout)
        self.norm = layer_norm(FEED_FORWARD_EPS, config.dtype)

    def __call__(self, h: Array, example_ids: Array, *, deterministic: bool, positions: Array | None = None) -> Array:
        """Maps h [b, m, d] to [b, m, d]; `positions` [b, m] are those of the rows' entries (None: 0, 1, ...)."""
        drop = {"deterministic": deterministic, "positions": positions}
        inner = self.inner_dropout(nn.hard_swish(self.fc1(h)), example_ids, **drop)
        return self.norm(self.outer_dropout(self.fc2(inner), example_ids, **drop) + h)
