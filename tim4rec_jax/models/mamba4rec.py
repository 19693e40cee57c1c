"""Mamba4Rec: selective state spaces over items."""

from dataclasses import dataclass
from functools import partial

import jax

from tim4rec_jax.layers.mamba_mixer import MambaMixer
from tim4rec_jax.layers.residual_block import ResidualBlock
from tim4rec_jax.model_config import MixerConfig
from tim4rec_jax.models.recommender import StateSpaceModel

_exact_gelu = partial(jax.nn.gelu, approximate=False)


@dataclass(frozen=True)
class Mamba4RecConfig(MixerConfig):
    """Settings of `Mamba4Rec`.

    Attributes:
      use_ffn: a feed-forward block follows each mixer.
    """

    name: str = "mamba4rec"
    use_ffn: bool = True


class Mamba4Rec(StateSpaceModel[Mamba4RecConfig]):
    """Mamba for sequential recommendation (Liu et al. 2024, arXiv 2403.03900).

      x_0 = LayerNorm(Dropout(E[items])),    x_i = block_i(x_{i-1}),    score = E x_last

    The feed-forward part has the exact GELU.
    """

    Config = Mamba4RecConfig
    causal = packable = streamable = True

    def block(self) -> ResidualBlock:
        config = self.config
        return ResidualBlock(config, MambaMixer, _exact_gelu, config.use_ffn)
