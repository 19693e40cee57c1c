"""TiM4Rec with a causal time branch, and (time off) SSD4Rec: any length, whole histories at once or event by event."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.layers.causal_time import DateOffset, gap_features
from tim4rec_jax.layers.dense import Linear, layer_norm, wide
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.item_embedding import item_embedding, table_rows, tied_scores
from tim4rec_jax.layers.ssd_mixer import MixerState
from tim4rec_jax.models.tim4rec import TiM4RecLayer
from tim4rec_jax.typing import Array, Bool, Hidden, Int, Items, LastHidden, Lengths, Scores, Timestamps


class StreamState(NamedTuple):
    """All that a model keeps of `b` histories; its size does not depend on their length.

    Attributes:
      timestamps: int32 [b] seconds of the last event; not read where there was none.
      events: int32 [b] events so far.
      layers: one a layer.
    """

    timestamps: Array
    events: Array
    layers: tuple[MixerState, ...]


class CausalTiM4Rec(nn.Module):
    """Time-aware state space duality in which no position reads a later one.

      x_0 = LayerNorm(Dropout(E[items])),    T_0 = W gap_features + b,    x_i, T_i = layer_i(x_{i-1}, T_{i-1})
      hidden = x + date_offset(timestamp),    score = E hidden

    With `use_time` off this is SSD4Rec as the TiM4Rec authors replicate it. No parameter depends on the length. See
    `models.base.SequentialModel` and `layers.causal_time`; after arXiv 2409.16182, whose time branch mixes positions.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    causal = True
    packable = True
    any_length = True

    @property
    def uses_time(self) -> bool:
        return self.config.use_time

    def setup(self) -> None:
        config = self.config
        self.item_embedding = item_embedding(config)
        self.embedding_dropout = Dropout(config.dropout)
        self.embedding_norm = layer_norm(config.norm_eps, config.dtype)
        if config.use_time:
            self.time_in = Linear(config.num_heads, wide(config.dtype).name)
            if config.date_knots:
                self.date = DateOffset(config)
        self.layers = [TiM4RecLayer(config) for _ in range(config.num_layers)]

    def _embed(self, items: Items, example_ids: Array, deterministic: bool) -> Array:
        embedded = self.embedding_dropout(self.item_embedding(items), example_ids, deterministic=deterministic)
        return self.embedding_norm(embedded)

    def _channel(self, timestamps: Array, previous: Array, firsts: Array) -> Array:
        """Returns T_0 [b, l, h]; `previous` are the timestamps of the events before."""
        config = self.config
        gaps, dtype = timestamps - previous, wide(config.dtype)
        return self.time_in(gap_features(gaps, firsts, mean=config.gap_mean, std=config.gap_std, dtype=dtype))

    def _dated(self, x: Array, timestamps: Array | np.ndarray | None) -> Array:
        """Adds the date's offset to x [..., d]."""
        if not self.config.use_time or not self.config.date_knots:
            return x
        return x + self.date(jnp.asarray(timestamps))

    def _start(
        self, items: Items, timestamps: Timestamps | None, example_ids: Array, deterministic: bool,
        starts: Array | None,
    ) -> tuple[Array, Array | None]:  # fmt: skip
        """Returns the first layer's inputs x [b, l, d] and T [b, l, h]."""
        x = self._embed(items, example_ids, deterministic)
        if not self.config.use_time:
            return x, None
        if timestamps is None or timestamps.shape[0] != items.shape[0] or timestamps.shape[1] < items.shape[1]:
            given = None if timestamps is None else timestamps.shape
            raise ValueError(f"timestamps have shape {given}, expected at least (b, l)={items.shape}")
        if not jnp.issubdtype(timestamps.dtype, jnp.integer):
            raise ValueError(
                f"timestamps are {timestamps.dtype}; time_mode='causal' reads whole seconds: set "
                "data.timestamp_precision='int64'"
            )
        timestamps = jnp.asarray(timestamps)[:, : items.shape[1]]
        previous = jnp.concatenate([timestamps[:, :1], timestamps[:, :-1]], axis=1)
        firsts = jnp.zeros(items.shape, bool) if starts is None else jnp.asarray(starts)
        return x, self._channel(timestamps, previous, firsts.at[:, 0].set(True))

    def encode(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None, starts: Bool[Array | np.ndarray, "b l"] | None = None,
    ) -> Hidden:  # fmt: skip
        """Returns the hidden state at every position.

        Args:
          items: int [b, l] of any length, padded on the right with 0.
          lengths: int [b]; not read, for no position reads a later one.
          timestamps: integer [b, l or more] seconds, padded with 0; may be None with time off.
          deterministic: no dropout.
          example_ids: int [b] names of the rows for their dropout masks; None counts from 0.
          starts: bool [b, l], true where a row's history begins anew: what lies before has no effect from there on.

        Returns:
          [b, l, d].

        Raises:
          ValueError: for timestamps of another shape, or that are not integers.
        """
        example_ids = jnp.arange(items.shape[0]) if example_ids is None else example_ids
        x, channel = self._start(items, timestamps, example_ids, deterministic, starts)
        starts = None if starts is None else jnp.asarray(starts)
        for layer in self.layers:
            x, channel = layer(x, channel, example_ids, deterministic=deterministic, starts=starts)
        return self._dated(x, None if timestamps is None else timestamps[:, : items.shape[1]])

    def encode_last(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> LastHidden:  # fmt: skip
        """Returns `encode` at position length - 1 as [b, d], without computing what is not read.

        `items` may be cut to any static length that holds the longest row.
        """
        example_ids = jnp.arange(items.shape[0]) if example_ids is None else example_ids
        x, channel = self._start(items, timestamps, example_ids, deterministic, None)
        for layer in self.layers[:-1]:
            x, channel = layer(x, channel, example_ids, deterministic=deterministic)
        x = self.layers[-1].last(x, channel, lengths, example_ids, deterministic=deterministic)
        if timestamps is None:
            return self._dated(x, None)
        return self._dated(x, jnp.take_along_axis(jnp.asarray(timestamps), lengths[:, None] - 1, axis=1)[:, 0])

    def init_state(self, batch: int) -> StreamState:
        """Returns the state before the first event of `batch` histories."""
        zeros = jnp.zeros(batch, jnp.int32)
        return StreamState(zeros, zeros, tuple(layer.mixer.init_state(batch) for layer in self.layers))

    def extend(
        self, state: StreamState, items: Items, lengths: Lengths, timestamps: Timestamps | None
    ) -> tuple[StreamState, Hidden]:
        """Goes on with histories where `state` left them: pieces of any size give what one pass gives.

        Args:
          state: of the events so far.
          items: int [b, l], the next events, padded on the right.
          lengths: int [b] events a row, 0 to l; later columns leave the state as it is.
          timestamps: int32 [b, l] seconds; may be None with time off.

        Returns:
          The next state, and the hidden states [b, l, d] at the new positions.
        """
        lengths = jnp.asarray(lengths)
        x, channel = self._embed(items, jnp.arange(items.shape[0]), True), None
        last = state.timestamps
        if self.config.use_time:
            timestamps = jnp.asarray(timestamps)
            previous = jnp.concatenate([last[:, None], timestamps[:, :-1]], axis=1)
            first_column = jnp.arange(items.shape[1]) == 0
            channel = self._channel(timestamps, previous, first_column & (state.events == 0)[:, None])
            ends = jnp.take_along_axis(timestamps, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
            last = jnp.where(lengths > 0, ends, last)
        states = []
        for layer, before in zip(self.layers, state.layers, strict=True):
            x, channel, after = layer.extend(x, channel, before, lengths)
            states.append(after)
        return StreamState(last, state.events + lengths, tuple(states)), self._dated(x, timestamps)

    def item_table(self) -> Array:
        """Returns E, [v, d] in the arithmetic's dtype."""
        return table_rows(self.item_embedding)

    def score(self, hidden: LastHidden) -> Scores:
        """Returns hidden E^T over all rows of the embedding, [b, v], float32 or wider."""
        return tied_scores(hidden, self.item_embedding)
