"""TiSASRec: causal self-attention that also reads the time between any two events."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from flax import linen as nn

from tim4rec_jax.checks import require
from tim4rec_jax.layers.attention import AttentionEncoder, Intervals, shortest_gap
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.item_embedding import embedding_table
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import AttentionConfig
from tim4rec_jax.models.recommender import Cache, SequentialModel
from tim4rec_jax.typing import Array

IntervalUnit = Literal["second", "shortest"]


@dataclass(frozen=True)
class TiSASRecConfig(AttentionConfig):
    """Settings of `TiSASRec`.

    Attributes:
      time_span: largest gap that is told apart, in the unit.
      interval_unit: of gaps: a "second", as in the form that TiM4Rec is compared with; or the "shortest" positive gap
        between two events read so far, as in the model's own paper, which looks through a user's whole history.
    """

    name: str = "tisasrec"
    time_span: int = 256
    interval_unit: IntervalUnit = "second"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = get_args(IntervalUnit)
        require(self.interval_unit in known, f"interval_unit={self.interval_unit!r} must be one of {known}")


class TiSASRec(SequentialModel[TiSASRecConfig]):
    """Time interval aware self-attention (Li et al. 2020), in the form that TiM4Rec is compared with (2409.16182).

      x_0 = Dropout(LayerNorm(E[items] + P[position])),    x_i = layer_i(x_{i-1}),    score = E x_last
      interval_ij = min(floor(|time_i - time_j| / unit), time_span) picks the row of K and V in every layer's attention

    K and V are [time_span + 1, d], shared by the layers. No array of b * l * l * d values is made; see
    `layers.attention`.

    Dropout of the intervals differs from the original program. That one looks up K and V for every pair, [b, l, l, d],
    and drops single values of the result, so pairs drop apart. Here an example drops values of the tables, [b,
    time_span + 1, d]: each value is dropped at the same rate, as there alike in all layers, but pairs of one example
    that are equally far apart (all that are time_span or more apart, too) share what they drop.
    """

    Config = TiSASRecConfig
    causal = uses_time = True
    without_time = "sasrec"

    def setup(self) -> None:
        super().setup()
        self.encoder = AttentionEncoder(self.config)
        self.interval_keys, self.interval_values = (
            embedding_table(self.config.time_span + 1, self.config) for _ in range(2)
        )
        self.key_dropout, self.value_dropout = (Dropout(self.config.dropout) for _ in range(2))

    def _intervals(self, items: Array, timestamps: Array | None, rows: Rows) -> Intervals:
        timestamps = self.full_timestamps(timestamps, items)

        def dropped(table: nn.Embed, dropout: Dropout) -> Array:
            values = table.embedding.astype(table.dtype)
            if rows.deterministic or dropout.rate == 0:
                return values
            values = jnp.broadcast_to(values, (items.shape[0], *values.shape))
            return dropout(values, rows.example_ids, deterministic=False)

        keys, values = dropped(self.interval_keys, self.key_dropout), dropped(self.interval_values, self.value_dropout)
        timestamps = timestamps[:, : items.shape[1]]
        unit = shortest_gap(timestamps, rows.real) if self.config.interval_unit == "shortest" else None
        return Intervals(timestamps, keys, values, unit)

    def forward(self, items: Array, timestamps: Array | None, rows: Rows, cache: Cache | None) -> tuple[Array, None]:
        intervals = self._intervals(items, timestamps, rows)
        return self.encoder(self.item_embedding(items), rows, intervals), None
