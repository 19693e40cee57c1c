"""TiM4Rec: state space duality with a time-aware mask, as the paper and its program have it."""

from functools import partial

from flax import linen as nn

from tim4rec_jax.layers.dense import layer_norm, wide
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.residual_block import ResidualBlock
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.layers.ssd_mixer import SSDMixer
from tim4rec_jax.layers.time_channel import TiM4RecConfig, TimeChannel, time_gaps
from tim4rec_jax.models.recommender import Cache, StateSpaceModel
from tim4rec_jax.typing import Array


class TiM4Rec(StateSpaceModel[TiM4RecConfig]):
    """Time-aware Mamba for sequential recommendation (Fan et al. 2025, arXiv 2409.16182).

      x_0 = LayerNorm(Dropout(E[items])),    T_0 = LayerNorm_l(Dropout(gaps)),    x_i, T_i = block_i(x_{i-1}, T_{i-1})
      score = E x_last

    The time branch mixes positions, so the model is not causal and its length is fixed. Only timestamps need max_len
    columns: the item branch is causal, so items may be cut.
    """

    Config = TiM4RecConfig
    uses_time = True
    without_time = "ssd4rec"

    def setup(self) -> None:
        super().setup()
        config = self.config
        self.time_dropout = Dropout(config.dropout)
        self.time_norm = layer_norm(config.norm_eps, wide(config.dtype).name)

    def block(self) -> ResidualBlock:
        config = self.config
        return ResidualBlock(config, partial(SSDMixer, time_type=TimeChannel), nn.hard_swish, config.use_ffn)

    def time_channel(self, timestamps: Array | None, rows: Rows, cache: Cache | None) -> Array | None:
        """Returns T_0 [b, 1, max_len], shared by the heads."""
        config = self.config
        gaps = time_gaps(
            self.full_timestamps(timestamps, rows.real),
            rows.lengths,
            mask_padded=config.mask_padded_time,
            log=config.log_time,
            dtype=wide(config.dtype),
        )
        dropped = self.time_dropout(gaps[:, None], rows.example_ids, deterministic=rows.deterministic)
        return self.time_norm(dropped)

    def forward(
        self, items: Array, timestamps: Array | None, rows: Rows, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        if items.shape[1] > self.config.max_len:
            raise ValueError(f"items have {items.shape[1]} positions, more than max_len={self.config.max_len}")
        return super().forward(items, timestamps, rows, cache)
