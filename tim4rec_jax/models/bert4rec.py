"""BERT4Rec: self-attention in both directions, trained to fill in masked events."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from tim4rec_jax.checks import require
from tim4rec_jax.layers.attention import AttentionEncoder
from tim4rec_jax.layers.dense import INIT_STD, Linear, layer_norm, wide
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import AttentionConfig
from tim4rec_jax.models.cloze import MASK
from tim4rec_jax.models.recommender import Cache, SequentialModel
from tim4rec_jax.typing import Array


@dataclass(frozen=True)
class BERT4RecConfig(AttentionConfig):
    """Settings of `BERT4Rec`."""

    name: str = "bert4rec"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_len >= 2, f"max_len={self.max_len} must be at least 2: an event, and the mask behind it")

    @property
    def table_width(self) -> int:
        """A row of the item table is an item's vector and the bias of its score."""
        return self.d_model + 1


class BERT4Rec(SequentialModel[BERT4RecConfig]):
    """Bidirectional self-attention with the cloze objective (Sun et al. 2019, arXiv 1904.06690), post-norm layers.

      x_0 = Dropout(LayerNorm(u + P[position])),  u = E[item], or the mask vector at MASK,    x_i = layer_i(x_{i-1})
      score = E LayerNorm(gelu(W x + b)) + c

    See `layers.attention` for the layer; each position attends to all of its history. The norms behind the embedding
    and the projection are those of the authors' program; the paper's equations leave them out. The bias c is the last
    column of the item table, and hidden states end in a 1 that meets it: scores are products of the two like those of
    every other model, with the table in parts, too.
    """

    Config = BERT4RecConfig
    packable = cloze = True

    def setup(self) -> None:
        super().setup()
        config = self.config
        self.encoder = AttentionEncoder(config, causal=False)
        self.mask = self.param("mask", nn.initializers.normal(INIT_STD), (config.d_model,), wide(config.dtype))
        self.projection = Linear(config.d_model, config.dtype)
        self.projection_norm = layer_norm(config.norm_eps, config.dtype)

    def forward(self, items: Array, timestamps: Array | None, rows: Rows, cache: Cache | None) -> tuple[Array, None]:
        embedded = self.item_embedding(jnp.maximum(items, 0))[..., : self.config.d_model]
        embedded = jnp.where((items == MASK)[..., None], self.mask.astype(embedded.dtype), embedded)
        x = self.encoder(embedded, rows, None)
        hidden = self.projection_norm(nn.gelu(self.projection(x), approximate=False))
        return jnp.pad(hidden, ((0, 0), (0, 0), (0, 1)), constant_values=1), None
