"""The time branch of TiM4Rec: gaps between events become a factor on the SSD step of every head and position."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from tim4rec_jax.layers.convolution import CausalConv
from tim4rec_jax.layers.dense import Linear, layer_norm, wide
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import SSDConfig


@dataclass(frozen=True)
class TiM4RecConfig(SSDConfig):
    """Settings of `TiM4Rec`, some of whose parameters are of size max_len.

    Attributes:
      time_dropout: rate inside the time branch; the raw gaps have `dropout`.
      time_gate_per_position: the time channel's residual gate has a value per position (`p2p_residual`), else per head.
      mask_padded_time: a padded position has a gap of 0 (the original: minus the last timestamp).
      log_time: gaps are compressed to sign(gap) * log1p(|gap|) (the original: raw seconds).
    """

    time_dropout: float = 0.2
    time_gate_per_position: bool = False
    mask_padded_time: bool = False
    log_time: bool = False


def time_gaps(timestamps: Array, lengths: Array, *, mask_padded: bool, log: bool, dtype: jnp.dtype) -> Array:
    """Returns the time since the event before, 0 for the first.

      diff_1 = 0,    diff_t = timestamp_t - timestamp_{t-1}

    Integer timestamps are subtracted exactly. Padded timestamps are 0, so by default the first padded position holds
    minus the last timestamp, as in the original program.

    Args:
      timestamps: [b, l] seconds; float32 or an integer dtype.
      lengths: int [b] real events per row.
      mask_padded: padded positions have a gap of 0 instead.
      log: compress to sign(diff) * log1p(|diff|).
      dtype: of the result.

    Returns:
      [b, l].
    """
    gaps = jnp.diff(timestamps, axis=1, prepend=timestamps[:, :1])
    if mask_padded:
        real = jnp.arange(timestamps.shape[1]) < lengths[:, None]
        gaps = jnp.where(real, gaps, jnp.zeros((), gaps.dtype))
    gaps = gaps.astype(dtype)
    return jnp.sign(gaps) * jnp.log1p(jnp.abs(gaps)) if log else gaps


class TimeChannel(nn.Module):
    """One layer of the time branch (arXiv 2409.16182, section 3; positions are mixed, so nothing here is causal).

      s  = W2 silu(W1 Dropout(T) + b1) + b2
      g  = act(conv2(act(conv1(T * s))))
      r  = sigmoid(Wr Dropout(T) + br),    T' = LayerNorm_l(r * T + (1 - r) * g)

    W1 and W2 act on positions and are shared by the heads.

    Attributes:
      config: the model's settings.
    """

    config: TiM4RecConfig

    def setup(self) -> None:
        config = self.config
        # The branch ends in step sizes, so it stays in float32 beside bfloat16 arithmetic.
        dtype = wide(config.dtype).name
        conv = (config.num_heads, config.d_conv, config.activation, config.kaiming_init, dtype)
        self.scale_dropout = Dropout(config.time_dropout)
        self.scale_in = Linear(config.max_len, dtype)
        self.scale_out = Linear(config.max_len, dtype)
        self.conv_1 = CausalConv(*conv)
        self.conv_2 = CausalConv(*conv)
        self.gate_dropout = Dropout(config.time_dropout)
        self.residual_gate = Linear(config.max_len if config.time_gate_per_position else 1, dtype)
        self.norm = layer_norm(config.norm_eps, dtype)

    def _dropped(self, dropout: Dropout, channel: Array, rows: Rows) -> Array:
        """Heads that share one channel drop different values of it, so they are told apart here and not before."""
        if not rows.deterministic and dropout.rate > 0:
            channel = jnp.broadcast_to(channel, (channel.shape[0], self.config.num_heads, channel.shape[2]))
        return dropout(channel, rows.example_ids, deterministic=rows.deterministic)

    def factor(self, channel: Array, rows: Rows, cache: None = None) -> tuple[Array, None]:
        """Returns g [b, l, h] from the channel T [b, h, l], or [b, 1, l] where all heads still share it."""
        dropped = self._dropped(self.scale_dropout, channel, rows)
        scale = self.scale_out(nn.silu(self.scale_in(dropped)))
        scaled = jnp.swapaxes(channel * scale, 1, 2)
        scaled = jnp.broadcast_to(scaled, (*scaled.shape[:2], self.config.num_heads))
        return self.conv_2(self.conv_1(scaled)[0])[0], None

    def carry(self, channel: Array, factor: Array, rows: Rows) -> Array:
        """Returns the next layer's channel T' [b, h, l]."""
        dropped = self._dropped(self.gate_dropout, channel, rows)
        gate = jax.nn.sigmoid(self.residual_gate(dropped))
        return self.norm(gate * channel + (1 - gate) * jnp.swapaxes(factor, 1, 2))
