"""TiM4Rec with a causal time branch: any length, whole histories at once or event by event."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tim4rec_jax.layers.causal_time import CausalTiM4RecConfig, CausalTimeChannel, DateOffset, gap_features
from tim4rec_jax.layers.dense import Linear, wide
from tim4rec_jax.layers.residual_block import ResidualBlock
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.layers.ssd_mixer import SSDMixer
from tim4rec_jax.models.recommender import STATISTICS, Cache, StateSpaceModel
from tim4rec_jax.typing import Array


class CausalTiM4Rec(StateSpaceModel[CausalTiM4RecConfig]):
    """Time-aware state space duality in which no position reads a later one.

      x_0 = LayerNorm(Dropout(E[items])),    T_0 = W gap_features + b,    x_i, T_i = block_i(x_{i-1}, T_{i-1})
      hidden = x + date_offset(timestamp),    score = E hidden

    No parameter depends on the length. What standardises gaps and dates is measured once, in the training part, and
    stands beside the parameters as the collection `data_statistics`; without it gaps have mean 0 and standard deviation
    1, and dates lie between seconds 0 and 1. See `layers.causal_time`; after arXiv 2409.16182, whose time branch mixes
    positions.
    """

    Config = CausalTiM4RecConfig
    causal = packable = streamable = uses_time = whole_seconds = True
    without_time = "ssd4rec"

    def setup(self) -> None:
        super().setup()
        config = self.config
        self.time_in = Linear(config.num_heads, wide(config.dtype).name)
        if config.date_knots:
            self.date = DateOffset(config)

    def block(self) -> ResidualBlock:
        config = self.config
        return ResidualBlock(config, partial(SSDMixer, time_type=CausalTimeChannel), nn.hard_swish, config.use_ffn)

    def data_statistics(
        self,
        *,
        gap_mean: float = 0.0,
        gap_std: float = 1.0,
        first_second: float | int = 0,
        last_second: float | int = 1,
    ) -> dict[str, np.ndarray]:
        floats = {"gap_mean": gap_mean, "gap_std": gap_std}
        # Rounded once, as a constant of the program would be.
        floats["knots_per_second"] = (self.config.date_knots - 1) / (last_second - first_second)
        seconds = {"first_second": first_second, "last_second": last_second}
        return {name: np.asarray(value, wide(self.config.dtype)) for name, value in floats.items()} | {
            name: np.asarray(value, np.int32) for name, value in seconds.items()
        }

    def _statistics(self, *names: str) -> list[Array | np.ndarray]:
        neutral = self.data_statistics()
        return [self.get_variable(STATISTICS, name, neutral[name]) for name in names]

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
                f"timestamps are {timestamps.dtype}; tim4rec_causal reads whole seconds: set "
                "data.timestamp_precision='int64'"
            )
        return timestamps[:, :length]

    def time_channel(self, timestamps: Array | None, rows: Rows, cache: Cache | None) -> Array | None:
        """Returns T_0 [b, l, h]."""
        timestamps = self._whole_seconds(timestamps, rows)
        before = timestamps[:, :1] if cache is None else cache.timestamps[:, None]
        new = jnp.ones(rows.real.shape[0], bool) if cache is None else cache.events == 0
        firsts = (jnp.zeros_like(rows.real) if rows.starts is None else rows.starts).at[:, 0].set(new)
        gaps = timestamps - jnp.concatenate([before, timestamps[:, :-1]], axis=1)
        mean, std = self._statistics("gap_mean", "gap_std")
        return self.time_in(gap_features(gaps, firsts, mean=mean, std=std, dtype=wide(self.config.dtype)))

    def finish(self, x: Array, timestamps: Array | None, rows: Rows) -> Array:
        """Adds the date's offset to x [b, m, d]."""
        if not self.config.date_knots:
            return x
        timestamps = self._whole_seconds(timestamps, rows)
        if rows.positions is not None:
            timestamps = jnp.take_along_axis(timestamps, rows.positions, axis=1)
        return x + self.date(timestamps, *self._statistics("first_second", "last_second", "knots_per_second"))
