"""TiM4Rec: state space duality with a time-aware mask, and (time off) the SSD-only model."""

import jax.numpy as jnp
from flax import linen as nn

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.layers.dense import layer_norm, wide
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.feed_forward import FeedForward
from tim4rec_jax.layers.item_embedding import item_embedding, table_rows, tied_scores
from tim4rec_jax.layers.ssd_mixer import MixerState, SSDMixer, take_at
from tim4rec_jax.layers.time_channel import time_gaps
from tim4rec_jax.typing import Array, Hidden, Int, Items, LastHidden, Lengths, Scores, Timestamps


class TiM4RecLayer(nn.Module):
    """h = LayerNorm(Dropout(mixer(u)) + u), then the feed-forward block; no "+ u" in a model of one layer.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.mixer = SSDMixer(config)
        self.dropout = Dropout(config.dropout)
        self.norm = layer_norm(config.norm_eps, config.dtype)
        if config.use_ffn:
            self.ffn = FeedForward(config)

    def _residual_block(
        self, mixed: Array, u: Array, example_ids: Array, deterministic: bool, positions: Array | None
    ) -> Array:
        drop = {"deterministic": deterministic, "positions": positions}
        h = self.dropout(mixed, example_ids, **drop)
        h = self.norm(h if self.config.num_layers == 1 else h + u)
        return self.ffn(h, example_ids, **drop) if self.config.use_ffn else h

    def __call__(
        self, u: Array, channel: Array | None, example_ids: Array, *, deterministic: bool, starts: Array | None = None
    ) -> tuple[Array, Array | None]:
        """Maps u [b, L, d] and the time channel to the next layer's; see `SSDMixer`."""
        mixed, channel = self.mixer(u, channel, example_ids, deterministic=deterministic, starts=starts)
        return self._residual_block(mixed, u, example_ids, deterministic, None), channel

    def extend(
        self, u: Array, channel: Array | None, state: MixerState, lengths: Lengths
    ) -> tuple[Array, Array | None, MixerState]:
        """Maps u [b, L, d] at the positions after `state`, without dropout; see `SSDMixer.extend`."""
        mixed, channel, state = self.mixer.extend(u, channel, state, lengths)
        return self._residual_block(mixed, u, jnp.arange(u.shape[0]), True, None), channel, state

    def last(
        self, u: Array, channel: Array | None, lengths: Lengths, example_ids: Array, *, deterministic: bool
    ) -> Array:
        """Returns the first output of `__call__` at each row's last real position, [b, d]."""
        mixed = self.mixer.last(u, channel, lengths, example_ids, deterministic=deterministic)
        positions = jnp.asarray(lengths)[:, None] - 1
        return self._residual_block(mixed[:, None], take_at(u, positions), example_ids, deterministic, positions)[:, 0]


class TiM4Rec(nn.Module):
    """Time-aware Mamba for sequential recommendation (Fan et al. 2025, arXiv 2409.16182).

      x_0 = LayerNorm(Dropout(E[items])),    T_0 = LayerNorm_l(Dropout(gaps)),    x_i, T_i = layer_i(x_{i-1}, T_{i-1})
      score = E x_last

    With `use_time` off this is SSD4Rec as the TiM4Rec authors replicate it. See `models.base.SequentialModel`.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    @property
    def causal(self) -> bool:
        """The time branch mixes positions, so only the model without it is causal."""
        return not self.config.use_time

    @property
    def uses_time(self) -> bool:
        return self.config.use_time

    def setup(self) -> None:
        config = self.config
        dtype = wide(config.dtype)
        self.item_embedding = item_embedding(config)
        self.embedding_dropout = Dropout(config.dropout)
        self.embedding_norm = layer_norm(config.norm_eps, config.dtype)
        if config.use_time:
            self.time_dropout = Dropout(config.dropout)
            self.time_norm = layer_norm(config.norm_eps, dtype.name)
        self.layers = [TiM4RecLayer(config) for _ in range(config.num_layers)]

    def _start(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, example_ids: Array, deterministic: bool
    ) -> tuple[Array, Array | None]:
        """Returns the first layer's inputs: x [b, L, d] and T [b, 1, max_len], shared by the heads."""
        config = self.config
        drop = {"deterministic": deterministic}
        x = self.embedding_norm(self.embedding_dropout(self.item_embedding(items), example_ids, **drop))
        if not config.use_time:
            return x, None
        if timestamps is None or timestamps.shape != (items.shape[0], config.max_len):
            given = None if timestamps is None else timestamps.shape
            raise ValueError(
                f"timestamps have shape {given}, expected (b, max_len)=({items.shape[0]}, {config.max_len})"
            )
        gaps = time_gaps(
            timestamps, lengths, mask_padded=config.mask_padded_time, log=config.log_time, dtype=wide(config.dtype)
        )
        return x, self.time_norm(self.time_dropout(gaps[:, None], example_ids, **drop))

    def _check(self, items: Items) -> None:
        if items.shape[1] > self.config.max_len:
            raise ValueError(f"items have {items.shape[1]} positions, more than max_len={self.config.max_len}")

    def encode(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> Hidden:  # fmt: skip
        """Returns the hidden state at every position.

        Args:
          items: int [b, l], padded on the right with 0.
          lengths: int [b], 1 to l.
          timestamps: [b, max_len] seconds, float32 or integer, padded with 0; may be None with time off.
          deterministic: no dropout.
          example_ids: int [b] names of the rows for their dropout masks; None counts from 0.

        Returns:
          [b, l, d].

        Raises:
          ValueError: for more positions than max_len, or timestamps of another shape.
        """
        self._check(items)
        example_ids = jnp.arange(items.shape[0]) if example_ids is None else example_ids
        x, channel = self._start(items, lengths, timestamps, example_ids, deterministic)
        for layer in self.layers:
            x, channel = layer(x, channel, example_ids, deterministic=deterministic)
        return x

    def encode_last(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> LastHidden:  # fmt: skip
        """Returns `encode` at position length - 1 as [b, d], without computing what is not read.

        `items` may be cut to any static length that holds the longest row: the item branch is causal, so later
        positions never matter. The time branch is not, so `timestamps` keep max_len columns.
        """
        self._check(items)
        example_ids = jnp.arange(items.shape[0]) if example_ids is None else example_ids
        x, channel = self._start(items, lengths, timestamps, example_ids, deterministic)
        for layer in self.layers[:-1]:
            x, channel = layer(x, channel, example_ids, deterministic=deterministic)
        return self.layers[-1].last(x, channel, lengths, example_ids, deterministic=deterministic)

    def item_table(self) -> Array:
        """Returns E, [v, d] in the arithmetic's dtype."""
        return table_rows(self.item_embedding)

    def score(self, hidden: LastHidden) -> Scores:
        """Returns hidden E^T over all rows of the embedding, [b, v], float32 or wider."""
        return tied_scores(hidden, self.item_embedding)
