"""A causal time branch: gaps up to each position become a factor on the SSD step, and its date shifts the output."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike

from tim4rec_jax.checks import require
from tim4rec_jax.layers.convolution import CausalConv
from tim4rec_jax.layers.dense import Linear, layer_norm, wide
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import SSDConfig

_INNER = 4
_NORM_EPS = 1e-5
_DATE_STD = 1e-3

TimeCache = tuple[Array, Array]


@dataclass(frozen=True)
class CausalTiM4RecConfig(SSDConfig):
    """Settings of `CausalTiM4Rec`.

    Attributes:
      time_dropout: rate inside the time branch.
      date_knots: values per channel of a piecewise linear function of the date that is added to the output; 0 for none.
    """

    name: str = "tim4rec_causal"
    time_dropout: float = 0.2
    date_knots: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.date_knots != 1 and self.date_knots >= 0, f"date_knots={self.date_knots} must be 0, or at least 2")


def gap_features(gaps: Array, firsts: Array, *, mean: ArrayLike, std: ArrayLike, dtype: jnp.dtype) -> Array:
    """Describes the time since the event before.

      f = [(log1p(gap) - mean) / std if gap > 0 else 0,  gap == 0,  first event]

    Args:
      gaps: [b, l] seconds, at least 0; not read where `firsts`.
      firsts: bool [b, l], no event before it is known.
      mean, std: of log1p(gap) over the positive gaps of the training part; numbers, or arrays [].
      dtype: of the result.

    Returns:
      [b, l, 3].
    """
    gaps = jnp.where(firsts, 0, gaps)
    scaled = (jnp.log1p(jnp.maximum(gaps, 0).astype(dtype)) - mean) / std
    features = jnp.where(gaps > 0, scaled, 0), (gaps == 0) & ~firsts, firsts
    return jnp.stack([feature.astype(dtype) for feature in features], axis=-1)


class CausalTimeChannel(nn.Module):
    """One layer of the causal time branch; heads are mixed where the paper's branch mixes positions.

      s  = W2 silu(W1 Dropout(T) + b1) + b2
      g  = act(conv2(act(conv1(T * s)))),    the factor is 1 + g
      r  = sigmoid(Wr Dropout(T) + br),      T' = LayerNorm_h(r * T + (1 - r) * g)

    T, s, g and r have a value for each head and position. The factor starts near 1, so that a model starts as it would
    without time, where the paper's factor g starts near 0. After arXiv 2409.16182, section 3.

    Attributes:
      config: the model's settings.
    """

    config: CausalTiM4RecConfig

    def setup(self) -> None:
        config = self.config
        # The branch ends in step sizes, so it stays in float32 beside bfloat16 arithmetic.
        dtype, heads = wide(config.dtype).name, config.num_heads
        conv = (heads, config.d_conv, config.activation, config.kaiming_init, dtype)
        self.scale_dropout = Dropout(config.time_dropout)
        self.scale_in = Linear(_INNER * heads, dtype)
        self.scale_out = Linear(heads, dtype)
        self.conv_1 = CausalConv(*conv)
        self.conv_2 = CausalConv(*conv)
        self.gate_dropout = Dropout(config.time_dropout)
        self.residual_gate = Linear(heads, dtype)
        self.norm = layer_norm(_NORM_EPS, dtype)

    def factor(self, channel: Array, rows: Rows, cache: TimeCache | None = None) -> tuple[Array, TimeCache | None]:
        """Returns 1 + g [b, l, h] from the channel T [b, l, h], and what the convolutions saw last where asked."""
        dropped = self.scale_dropout(channel, rows.example_ids, deterministic=rows.deterministic)
        scaled = channel * self.scale_out(nn.silu(self.scale_in(dropped)))
        if cache is None:
            first, _ = self.conv_1(scaled, segment_ids=rows.segment_ids)
            return 1 + self.conv_2(first, segment_ids=rows.segment_ids)[0], None
        first, cache_1 = self.conv_1(scaled, segment_ids=rows.real_ids, cache=cache[0])
        second, cache_2 = self.conv_2(first, segment_ids=rows.real_ids, cache=cache[1])
        assert cache_1 is not None and cache_2 is not None  # A convolution that is given one gives the next.
        return 1 + second, (cache_1, cache_2)

    def init_cache(self, batch: int) -> TimeCache:
        """Returns the convolutions' inputs before the first event."""
        zeros = jnp.zeros((batch, self.config.d_conv - 1, self.config.num_heads), wide(self.config.dtype))
        return zeros, zeros

    def carry(self, channel: Array, factor: Array, rows: Rows) -> Array:
        """Returns the next layer's channel T' [b, l, h]."""
        dropped = self.gate_dropout(channel, rows.example_ids, deterministic=rows.deterministic)
        gate = jax.nn.sigmoid(self.residual_gate(dropped))
        return self.norm(gate * channel + (1 - gate) * (factor - 1))


class DateOffset(nn.Module):
    """A piecewise linear function of the date for each channel, to be added to the hidden state that scores items.

      offset(t) = (1 - w) K[j] + w K[j + 1],    j + w = (m - 1) (t - first) / (last - first), held constant outside

    Under tied embeddings E (h + offset(t)) lets the popularity of items move with the calendar.

    Attributes:
      config: the model's settings.
    """

    config: CausalTiM4RecConfig

    @nn.compact
    def __call__(self, timestamps: Array, first: ArrayLike, last: ArrayLike, knots_per_second: ArrayLike) -> Array:
        """Maps whole seconds [...] to [..., d]; the rest describes the knots, (m - 1) / (last - first) rounded once."""
        config = self.config
        dtype = wide(config.dtype)
        shape = (config.date_knots, config.d_model)
        knots = self.param("knots", nn.initializers.normal(_DATE_STD), shape, dtype)
        # The difference is exact in whole seconds; its share is not.
        since = jnp.clip(timestamps, first, last) - first
        place = since.astype(dtype) * knots_per_second
        before = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, config.date_knots - 2)
        weight = (place - before)[..., None]
        return ((1 - weight) * knots[before] + weight * knots[before + 1]).astype(config.dtype)
