"""TiM4Rec with a causal time branch, and (time off) SSD4Rec: any length, whole histories at once or event by event."""

import jax.numpy as jnp
from flax import linen as nn

from tim4rec_jax.layers.causal_time import DateOffset, gap_features
from tim4rec_jax.layers.dense import Linear, wide
from tim4rec_jax.layers.residual_block import ResidualBlock
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.layers.ssd_mixer import SSDMixer
from tim4rec_jax.models.recommender import Cache, StateSpaceModel
from tim4rec_jax.typing import Array


class CausalTiM4Rec(StateSpaceModel):
    """Time-aware state space duality in which no position reads a later one.

      x_0 = LayerNorm(Dropout(E[items])),    T_0 = W gap_features + b,    x_i, T_i = block_i(x_{i-1}, T_{i-1})
      hidden = x + date_offset(timestamp),    score = E hidden

    With `use_time` off this is SSD4Rec as the TiM4Rec authors replicate it. No parameter depends on the length. See
    `layers.causal_time`; after arXiv 2409.16182, whose time branch mixes positions.
    """

    causal = packable = streamable = True

    @property
    def uses_time(self) -> bool:
        return self.config.use_time

    def setup(self) -> None:
        super().setup()
        config = self.config
        if config.use_time:
            self.time_in = Linear(config.num_heads, wide(config.dtype).name)
            if config.date_knots:
                self.date = DateOffset(config)

    def block(self) -> ResidualBlock:
        return ResidualBlock(self.config, SSDMixer, nn.hard_swish)

    def _whole_seconds(self, timestamps: Array | None, rows: Rows) -> Array:
        """Returns timestamps [b, l].

        Raises:
          ValueError: for fewer of them, or none, or such that are not whole.
        """
        batch, length = rows.real.shape
        if timestamps is None or timestamps.shape[0] != batch or timestamps.shape[1] < length:
            given = None if timestamps is None else timestamps.shape
            raise ValueError(f"timestamps have shape {given}, expected at least (b, l)={(batch, length)}")
        if not jnp.issubdtype(timestamps.dtype, jnp.integer):
            raise ValueError(
                f"timestamps are {timestamps.dtype}; time_mode='causal' reads whole seconds: set "
                "data.timestamp_precision='int64'"
            )
        return timestamps[:, :length]

    def time_channel(self, timestamps: Array | None, rows: Rows, cache: Cache | None) -> Array | None:
        """Returns T_0 [b, l, h]."""
        config = self.config
        if not config.use_time:
            return None
        timestamps = self._whole_seconds(timestamps, rows)
        before = timestamps[:, :1] if cache is None else cache.timestamps[:, None]
        new = jnp.ones(rows.real.shape[0], bool) if cache is None else cache.events == 0
        firsts = (jnp.zeros_like(rows.real) if rows.starts is None else rows.starts).at[:, 0].set(new)
        gaps = timestamps - jnp.concatenate([before, timestamps[:, :-1]], axis=1)
        features = gap_features(gaps, firsts, mean=config.gap_mean, std=config.gap_std, dtype=wide(config.dtype))
        return self.time_in(features)

    def finish(self, x: Array, timestamps: Array | None, rows: Rows) -> Array:
        """Adds the date's offset to x [b, m, d]."""
        if not self.config.use_time or not self.config.date_knots:
            return x
        timestamps = self._whole_seconds(timestamps, rows)
        if rows.positions is not None:
            timestamps = jnp.take_along_axis(timestamps, rows.positions, axis=1)
        return x + self.date(timestamps)
