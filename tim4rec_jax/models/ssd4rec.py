"""SSD4Rec: state space duality over items, without their times."""

from dataclasses import dataclass

from flax import linen as nn

from tim4rec_jax.layers.residual_block import ResidualBlock
from tim4rec_jax.layers.ssd_mixer import SSDMixer
from tim4rec_jax.model_config import SSDConfig
from tim4rec_jax.models.recommender import StateSpaceModel


@dataclass(frozen=True)
class SSD4RecConfig(SSDConfig):
    """Settings of `SSD4Rec`."""

    name: str = "ssd4rec"


class SSD4Rec(StateSpaceModel[SSD4RecConfig]):
    """State space duality as the TiM4Rec authors replicate SSD4Rec: their model with time off (arXiv 2409.16182).

      x_0 = LayerNorm(Dropout(E[items])),    x_i = block_i(x_{i-1}),    score = E x_last

    No parameter depends on the length.
    """

    Config = SSD4RecConfig
    causal = packable = streamable = True

    def block(self) -> ResidualBlock:
        config = self.config
        return ResidualBlock(config, SSDMixer, nn.hard_swish, config.use_ffn)
