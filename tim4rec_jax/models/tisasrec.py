"""TiSASRec: causal self-attention that also reads the time between any two events."""

import jax.numpy as jnp
from flax import linen as nn

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.layers.attention import AttentionEncoder, Intervals
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.item_embedding import embedding_table, item_embedding, table_rows, tied_scores
from tim4rec_jax.typing import Array, Hidden, Int, Items, LastHidden, Lengths, Scores, Timestamps


class TiSASRec(nn.Module):
    """Time interval aware self-attention (Li et al. 2020), in the form that TiM4Rec is compared with (2409.16182).

      x_0 = Dropout(LayerNorm(E[items] + P[position])),    x_i = layer_i(x_{i-1}),    score = E x_last
      interval_ij = min(|time_i - time_j|, time_span) whole seconds picks the row of K and V in every layer's attention

    K and V are [time_span + 1, d], shared by the layers. No array of b * l * l * d values is made; see
    `layers.attention`.

    Dropout of the intervals differs from the original program. That one looks up K and V for every pair, [b, l, l, d],
    and drops single values of the result, so pairs drop apart. Here an example drops values of the tables, [b,
    time_span + 1, d]: each value is dropped at the same rate, as there alike in all layers, but pairs of one example
    that are equally far apart (all that are time_span or more apart, too) share what they drop.

    With `use_time` off this is SASRec. See `models.base.SequentialModel`.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    causal = True

    @property
    def uses_time(self) -> bool:
        return self.config.use_time

    def setup(self) -> None:
        self.item_embedding = item_embedding(self.config)
        self.encoder = AttentionEncoder(self.config)
        if self.config.use_time:
            self.interval_keys, self.interval_values = (
                embedding_table(self.config.time_span + 1, self.config) for _ in range(2)
            )
            self.key_dropout, self.value_dropout = (Dropout(self.config.dropout) for _ in range(2))

    def _intervals(
        self, items: Items, timestamps: Timestamps | None, example_ids: Array, deterministic: bool
    ) -> Intervals | None:
        config = self.config
        if not config.use_time:
            return None
        if timestamps is None or timestamps.shape != (items.shape[0], config.max_len):
            given = None if timestamps is None else timestamps.shape
            raise ValueError(
                f"timestamps have shape {given}, expected (b, max_len)=({items.shape[0]}, {config.max_len})"
            )

        def dropped(table: nn.Embed, dropout: Dropout) -> Array:
            rows = table.embedding.astype(table.dtype)
            if deterministic or dropout.rate == 0:
                return rows
            rows = jnp.broadcast_to(rows, (items.shape[0], *rows.shape))
            return dropout(rows, example_ids, deterministic=False)

        keys, values = dropped(self.interval_keys, self.key_dropout), dropped(self.interval_values, self.value_dropout)
        return Intervals(timestamps[:, : items.shape[1]], keys, values)

    def encode(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> Hidden:  # fmt: skip
        """Returns the hidden state at every position.

        Args:
          items: int [b, l], padded on the right with 0.
          lengths: int [b]; not read, for item 0 tells the padding.
          timestamps: [b, max_len] seconds, float32 or integer; may be None with time off.
          deterministic: no dropout.
          example_ids: int [b] names of the rows for their dropout masks; None counts from 0.

        Returns:
          [b, l, d].

        Raises:
          ValueError: for more positions than max_len, or timestamps of another shape.
        """
        return self._encode(items, timestamps, deterministic, example_ids)

    def encode_last(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> LastHidden:  # fmt: skip
        """Returns `encode` at position length - 1 as [b, d], without computing what is not read.

        `items` may be cut to any static length that holds the longest row; `timestamps` keep max_len columns.
        """
        return self._encode(items, timestamps, deterministic, example_ids, read=lengths[:, None] - 1)[:, 0]

    def _encode(
        self, items: Items, timestamps: Timestamps | None, deterministic: bool, example_ids: Array | None,
        **options: Array,
    ) -> Array:  # fmt: skip
        example_ids = jnp.arange(items.shape[0]) if example_ids is None else example_ids
        intervals = self._intervals(items, timestamps, example_ids, deterministic)
        embedded = self.item_embedding(items)
        return self.encoder(embedded, items != 0, intervals, example_ids, deterministic=deterministic, **options)

    def item_table(self) -> Array:
        """Returns E, [v, d] in the arithmetic's dtype."""
        return table_rows(self.item_embedding)

    def score(self, hidden: LastHidden) -> Scores:
        """Returns hidden E^T over all rows of the embedding, [b, v], float32 or wider."""
        return tied_scores(hidden, self.item_embedding)
