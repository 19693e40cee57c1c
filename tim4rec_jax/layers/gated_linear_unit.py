"""Gated linear unit with residual and norm."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from tim4rec_jax.layers.dense import Linear, layer_norm
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import ModelConfig

GATED_LINEAR_UNIT_EPS = 1e-12


class GatedLinearUnit(nn.Module):
    """out = LayerNorm(Dropout(fc2(v * sigmoid(u))) + x), [v, u] = fc1 x, eps 1e-12 in every setting.

    Source: Dauphin et al. 2017 (arXiv 1612.08083), equation 1.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.fc1 = Linear(2 * config.d_model, config.dtype)
        self.fc2 = Linear(config.d_model, config.dtype)
        self.dropout = Dropout(config.dropout)
        self.norm = layer_norm(GATED_LINEAR_UNIT_EPS, config.dtype)

    def __call__(self, x: Array, rows: Rows) -> Array:
        """Maps x [b, m, d] at `rows.positions` (None: all) to [b, m, d]."""
        value, gate = jnp.split(self.fc1(x), 2, axis=-1)
        out = self.fc2(value * jax.nn.sigmoid(gate))
        return self.norm(self.dropout(out, rows.example_ids, **rows.drop) + x)
