"""Mamba4Rec: selective state spaces over items."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.layers.dense import Linear, layer_norm
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.feed_forward import FEED_FORWARD_EPS
from tim4rec_jax.layers.item_embedding import item_embedding, table_rows, tied_scores
from tim4rec_jax.layers.mamba_mixer import MambaMixer, MambaState
from tim4rec_jax.layers.ssd_mixer import take_at
from tim4rec_jax.typing import Array, Bool, Hidden, Int, Items, LastHidden, Lengths, Scores, Timestamps


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

    def __call__(
        self, u: Array, example_ids: Array, *, deterministic: bool, read: Array | None = None,
        starts: Array | np.ndarray | None = None,
    ) -> Array:  # fmt: skip
        """Maps u [b, L, d] to [b, L, d], or to [b, m, d] at the positions `read` [b, m]; see `MambaMixer`."""
        drop = {"deterministic": deterministic, "positions": read}
        mixed = self.mixer(u, read, starts)
        return self._residual_block(mixed, u if read is None else take_at(u, read), example_ids, drop)

    def _residual_block(self, mixed: Array, u: Array, example_ids: Array, drop: dict[str, Any]) -> Array:
        h = self.dropout(mixed, example_ids, **drop)
        h = self.norm(h + u if self.config.num_layers > 1 else h)
        return self.ffn(h, example_ids, **drop) if self.config.use_ffn else h

    def extend(self, u: Array, state: MambaState, lengths: Array) -> tuple[Array, MambaState]:
        """Maps u [b, L, d] at the positions after `state`, without dropout; see `MambaMixer.extend`."""
        mixed, state = self.mixer.extend(u, state, lengths)
        return self._residual_block(mixed, u, jnp.arange(u.shape[0]), {"deterministic": True}), state


class Mamba4Rec(nn.Module):
    """Mamba for sequential recommendation (Liu et al. 2024, arXiv 2403.03900).

      x_0 = LayerNorm(Dropout(E[items])),    x_i = layer_i(x_{i-1}),    score = E x_last

    See `models.base.SequentialModel`.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    causal = True
    packable = True
    uses_time = False

    def setup(self) -> None:
        config = self.config
        self.item_embedding = item_embedding(config)
        self.embedding_dropout = Dropout(config.dropout)
        self.embedding_norm = layer_norm(config.norm_eps, config.dtype)
        self.layers = [Mamba4RecLayer(config) for _ in range(config.num_layers)]

    def encode(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None, starts: Bool[Array | np.ndarray, "b l"] | None = None,
    ) -> Hidden:  # fmt: skip
        """Returns the hidden state at every position.

        Args:
          items: int [b, l], padded on the right with 0; any length.
          lengths: int [b]; not read, for no position reads a later one.
          timestamps: not read.
          deterministic: no dropout.
          example_ids: int [b] names of the rows for their dropout masks; None counts from 0.
          starts: bool [b, l], true where a row's history begins anew: what lies before has no effect from there on.
            None is one history a row.

        Returns:
          [b, l, d].
        """
        return self._encode(items, deterministic, example_ids, starts=starts)

    def encode_last(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> LastHidden:  # fmt: skip
        """Returns `encode` at position length - 1 as [b, d], without computing what is not read.

        `items` may be cut to any static length that holds the longest row.
        """
        return self._encode(items, deterministic, example_ids, read=jnp.asarray(lengths)[:, None] - 1)[:, 0]

    def _encode(
        self, items: Items, deterministic: bool, example_ids: Array | None, *, read: Array | None = None,
        starts: Array | np.ndarray | None = None,
    ) -> Array:  # fmt: skip
        example_ids = jnp.arange(items.shape[0]) if example_ids is None else example_ids
        drop = {"deterministic": deterministic}
        x = self.embedding_norm(self.embedding_dropout(self.item_embedding(items), example_ids, **drop))
        for layer in self.layers[:-1]:
            x = layer(x, example_ids, **drop, starts=starts)
        return self.layers[-1](x, example_ids, **drop, read=read, starts=starts)

    def init_state(self, batch: int) -> tuple[MambaState, ...]:
        """Returns the state before the first event of `batch` histories; its size does not depend on their length."""
        return tuple(layer.mixer.init_state(batch) for layer in self.layers)

    def extend(
        self, state: tuple[MambaState, ...], items: Items, lengths: Lengths, timestamps: Timestamps | None
    ) -> tuple[tuple[MambaState, ...], Hidden]:
        """Goes on with histories where `state` left them: pieces of any size give what one pass gives.

        Args:
          state: of the events so far, one entry a layer.
          items: int [b, l], the next events, padded on the right.
          lengths: int [b] events a row, 0 to l; later columns leave the state as it is.
          timestamps: not read.

        Returns:
          The next state, and the hidden states [b, l, d] at the new positions.
        """
        example_ids = jnp.arange(items.shape[0])
        embedded = self.embedding_dropout(self.item_embedding(items), example_ids, deterministic=True)
        x, states = self.embedding_norm(embedded), []
        for layer, before in zip(self.layers, state, strict=True):
            x, after = layer.extend(x, before, jnp.asarray(lengths))
            states.append(after)
        return tuple(states), x

    def item_table(self) -> Array:
        """Returns E, [v, d] in the arithmetic's dtype."""
        return table_rows(self.item_embedding)

    def score(self, hidden: LastHidden) -> Scores:
        """Returns hidden E^T over all rows of the embedding, [b, v], float32 or wider."""
        return tied_scores(hidden, self.item_embedding)
