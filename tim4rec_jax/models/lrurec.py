"""LRURec: linear recurrent units over items."""

from dataclasses import dataclass
from functools import cached_property, partial

from flax import linen as nn

from tim4rec_jax.checks import require
from tim4rec_jax.layers.linear_recurrence import LinearRecurrentUnit
from tim4rec_jax.layers.residual_block import ResidualBlock
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models.recommender import StateSpaceModel

_exact_gelu = partial(nn.gelu, approximate=False)


@dataclass(frozen=True)
class LRURecConfig(ModelConfig):
    """Settings of `LRURec`.

    Attributes:
      expand: the state has `expand * d_model` complex numbers.
      r_min, r_max: between which the absolute values of lambda start.
    """

    name: str = "lrurec"
    expand: int = 2
    r_min: float = 0.8
    r_max: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.r_min < self.r_max < 1,
            f"r_min={self.r_min} and r_max={self.r_max} must be 0 < r_min < r_max < 1: the ring on which lambda starts",
        )

    @cached_property
    def state(self) -> int:
        """n, complex numbers in the state."""
        return self.expand * self.d_model


class LRURec(StateSpaceModel[LRURecConfig]):
    """Linear recurrent units for sequential recommendation (Yue et al. 2023, arXiv 2310.02367).

      x_0 = LayerNorm(Dropout(E[items])),    h_i = LayerNorm(Dropout(LRU_i(x_{i-1})) + x_{i-1})
      x_i = FFN_i(h_i),    score = E x_last

    See `layers.linear_recurrence` for the LRU. The feed-forward part has the exact GELU. Scores have no bias per item,
    which the authors' program adds, so that the item table is all that ranking reads.
    """

    Config = LRURecConfig
    causal = packable = streamable = True

    def block(self) -> ResidualBlock:
        config = self.config
        unit = partial(LinearRecurrentUnit, state=config.state, ring=(config.r_min, config.r_max))
        return ResidualBlock(config, unit, _exact_gelu, use_ffn=True, residual=True)
