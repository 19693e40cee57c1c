"""Position-wise feed-forward block with residual and norm."""

from collections.abc import Callable

from flax import linen as nn
from jax import Array

from tim4rec_jax.layers.dense import Linear, layer_norm
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import ModelConfig

FEED_FORWARD_EPS = 1e-12


class FeedForward(nn.Module):
    """out = LayerNorm(Dropout(fc2(Dropout(act(fc1 h)))) + h), inner width 4d, eps 1e-12 in every setting.

    Attributes:
      config: the model's settings.
      activation: act.
    """

    config: ModelConfig
    activation: Callable[[Array], Array]

    def setup(self) -> None:
        config = self.config
        self.fc1 = Linear(4 * config.d_model, config.dtype)
        self.fc2 = Linear(config.d_model, config.dtype)
        self.inner_dropout = Dropout(config.dropout)
        self.outer_dropout = Dropout(config.dropout)
        self.norm = layer_norm(FEED_FORWARD_EPS, config.dtype)

    def __call__(self, h: Array, rows: Rows) -> Array:
        """Maps h [b, m, d] at `rows.positions` (None: all) to [b, m, d]."""
        inner = self.inner_dropout(self.activation(self.fc1(h)), rows.example_ids, **rows.drop)
        return self.norm(self.outer_dropout(self.fc2(inner), rows.example_ids, **rows.drop) + h)
