"""Mamba4Rec: selective state spaces over items."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.layers.dense import INIT_STD, Linear, layer_norm, wide
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.feed_forward import FEED_FORWARD_EPS
from tim4rec_jax.layers.mamba_mixer import MambaMixer
from tim4rec_jax.layers.ssd_mixer import take_at
from tim4rec_jax.typing import Array, Hidden, Int, Items, LastHidden, Lengths, Scores, Timestamps


class GeluFeedForward(nn.Module):
    """out = LayerNorm(Dropout(fc2(Dropout(gelu(fc1 h)))) + h), inner width 4d, exact GELU, eps 1e-12.

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
        inner = self.inner_dropout(jax.nn.gelu(self.fc1(h), approximate=False), example_ids, **drop)
        return self.norm(self.outer_dropout(self.fc2(inner), example_ids, **drop) + h)


class Mamba4RecLayer(nn.Module):
    """h = LayerNorm(Dropout(mixer(u)) + u), then the feed-forward block; no "+ u" in a model of one layer.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.mixer = MambaMixer(config)
        self.dropout = Dropout(config.dropout)
        self.norm = layer_norm(config.norm_eps, config.dtype)
        if config.use_ffn:
            self.ffn = GeluFeedForward(config)

    def __call__(self, u: Array, example_ids: Array, *, deterministic: bool, read: Array | None = None) -> Array:
        """Maps u [b, L, d] to [b, L, d], or to [b, m, d] at the positions `read` [b, m]."""
        drop = {"deterministic": deterministic, "positions": read}
        h = self.dropout(self.mixer(u, read), example_ids, **drop)
        if self.config.num_layers > 1:
            h = h + (u if read is None else take_at(u, read))
        h = self.norm(h)
        return self.ffn(h, example_ids, **drop) if self.config.use_ffn else h


class Mamba4Rec(nn.Module):
    """Mamba for sequential recommendation (Liu et al. 2024, arXiv 2403.03900).

      x_0 = LayerNorm(Dropout(E[items])),    x_i = layer_i(x_{i-1}),    score = E x_last

    See `models.base.SequentialModel`.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    causal = True
    uses_time = False

    def setup(self) -> None:
        config = self.config
        self.item_embedding = nn.Embed(
            config.vocab_size, config.d_model, dtype=jnp.dtype(config.dtype), param_dtype=wide(config.dtype),
            embedding_init=nn.initializers.normal(INIT_STD),
        )  # fmt: skip
        self.embedding_dropout = Dropout(config.dropout)
        self.embedding_norm = layer_norm(config.norm_eps, config.dtype)
        self.layers = [Mamba4RecLayer(config) for _ in range(config.num_layers)]

    def encode(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> Hidden:  # fmt: skip
        """Returns the hidden state at every position.

        Args:
          items: int [b, l], padded on the right with 0.
          lengths: int [b]; not read, for no position reads a later one.
          timestamps: not read.
          deterministic: no dropout.
          example_ids: int [b] names of the rows for their dropout masks; None counts from 0.

        Returns:
          [b, l, d].

        Raises:
          ValueError: for more positions than max_len.
        """
        return self._encode(items, deterministic, example_ids, None)

    def encode_last(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> LastHidden:  # fmt: skip
        """Returns `encode` at position length - 1 as [b, d], without computing what is not read.

        `items` may be cut to any static length that holds the longest row.
        """
        return self._encode(items, deterministic, example_ids, jnp.asarray(lengths)[:, None] - 1)[:, 0]

    def _encode(self, items: Items, deterministic: bool, example_ids: Array | None, read: Array | None) -> Array:
        if items.shape[1] > self.config.max_len:
            raise ValueError(f"items have {items.shape[1]} positions, more than max_len={self.config.max_len}")
        example_ids = jnp.arange(items.shape[0]) if example_ids is None else example_ids
        drop = {"deterministic": deterministic}
        x = self.embedding_norm(self.embedding_dropout(self.item_embedding(items), example_ids, **drop))
        for layer in self.layers[:-1]:
            x = layer(x, example_ids, **drop)
        return self.layers[-1](x, example_ids, **drop, read=read)

    def item_table(self) -> Array:
        """Returns E, [v, d] in the arithmetic's dtype."""
        return self.item_embedding.embedding.astype(self.config.dtype)

    def score(self, hidden: LastHidden) -> Scores:
        """Returns hidden E^T over all rows of the embedding, [b, v], float32 or wider."""
        return jnp.einsum(
            "bd,vd->bv", hidden.astype(self.config.dtype), self.item_table(),
            preferred_element_type=wide(self.config.dtype),
        )  # fmt: skip
