"""Mamba4Rec: selective state spaces over items."""

from functools import partial

import jax

from tim4rec_jax.layers.mamba_mixer import MambaMixer
from tim4rec_jax.layers.residual_block import ResidualBlock
from tim4rec_jax.models.recommender import StateSpaceModel

_exact_gelu = partial(jax.nn.gelu, approximate=False)


class Mamba4Rec(StateSpaceModel):
    """Mamba for sequential recommendation (Liu et al. 2024, arXiv 2403.03900).

      x_0 = LayerNorm(Dropout(E[items])),    x_i = block_i(x_{i-1}),    score = E x_last

    The feed-forward part has the exact GELU.
    """

    causal = packable = streamable = True

    def block(self) -> ResidualBlock:
        return ResidualBlock(self.config, MambaMixer, _exact_gelu)
