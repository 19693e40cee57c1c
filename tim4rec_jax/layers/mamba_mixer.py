"""The Mamba-1 mixer: a selective scan with a state of its own in every channel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from kernels.selective_scan import selective_scan
from tim4rec_jax.layers.convolution import CausalConv
from tim4rec_jax.layers.dense import Linear, wide
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import MixerConfig

_WIDTH_A_RANK = 16


def dt_rank(config: MixerConfig) -> int:
    """Returns the rank of the map to the steps, ceil(d / 16)."""
    return -(-config.d_model // _WIDTH_A_RANK)


def _decay_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Logarithms of 1, 2, ..., n in every channel (Gu & Dao 2023, section 3.6: S4D-Real)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


class MambaState(NamedTuple):
    """What a mixer keeps of a history: constant in its length.

    Attributes:
      conv: [b, K - 1, e] last inputs of the convolution.
      ssm: [b, e, n] state of the scan, float32 or wider.
    """

    conv: Array
    ssm: Array


class MambaMixer(nn.Module):
    """Projection, causal convolution, selective scan, gate, projection.

      x, z = in_proj(u);   x = silu(conv(x));   r, B, C = x_proj(x);   delta = softplus(dt_proj(r) + dt_bias)
      out = out_proj(scan(x, delta, -exp(A_log), B, C, D) * silu(z))

    No projection has a bias but that of the steps, which starts at 0: the first delta is near log 2 in every channel.
    Source: Gu & Dao 2023 (Mamba, arXiv 2312.00752), section 3.4, with the initial values of Mamba4Rec.

    Attributes:
      config: the model's settings.
    """

    config: MixerConfig

    def setup(self) -> None:
        config = self.config
        dtype, inner = wide(config.dtype), config.d_inner
        self.in_proj = Linear(2 * inner, config.dtype, use_bias=False)
        backend = config.backend("causal_conv1d")
        self.conv = CausalConv(inner, config.d_conv, "silu", config.kaiming_init, config.dtype, backend)
        self.x_proj = Linear(dt_rank(config) + 2 * config.d_state, config.dtype, use_bias=False)
        self.dt_proj = Linear(inner, config.dtype, use_bias=False)
        self.dt_bias = self.param("dt_bias", nn.initializers.zeros_init(), (inner,), dtype)
        self.A_log = self.param("A_log", _decay_init, (inner, config.d_state), dtype)
        self.D = self.param("D", nn.initializers.ones_init(), (inner,), dtype)
        self.out_proj = Linear(config.d_model, config.dtype, use_bias=False)

    def __call__(
        self, u: Array, channel: None, rows: Rows, cache: MambaState | None = None
    ) -> tuple[Array, None, MambaState | None]:
        """Mixes u [b, l, d].

        Args:
          u: [b, l, d].
          channel: handed on; this mixer reads no time.
          rows: of u; gate and output map run at `rows.positions` alone.
          cache: of the positions before, or None.

        Returns:
          [b, l, d] or [b, m, d] at `rows.positions`, the channel, and the cache behind these positions (None without
          one).
        """
        config = self.config
        inner, state, rank = config.d_inner, config.d_state, dt_rank(config)
        segment_ids = rows.segment_ids if cache is None else rows.real_ids
        conv_cache, before = (None, None) if cache is None else cache
        x = self.in_proj(u, [slice(0, inner)])
        x, conv_cache = self.conv(x, segment_ids=segment_ids, cache=conv_cache)
        r, B, C = jnp.split(self.x_proj(x), [rank, rank + state], axis=-1)
        scanned = selective_scan(
            x,
            self.dt_proj(r),
            -jnp.exp(self.A_log),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            initial_state=before,
            return_final_state=cache is not None,
            segment_ids=segment_ids,
            implementation=config.backend("selective_scan"),
        )
        y, after = scanned if isinstance(scanned, tuple) else (scanned, None)
        z = self.in_proj(rows.at(u), [slice(inner, None)])
        out = self.out_proj(rows.at(y) * jax.nn.silu(z))
        return out, channel, None if conv_cache is None or after is None else MambaState(conv_cache, after)

    def init_cache(self, batch: int) -> MambaState:
        """Returns the cache before the first event of `batch` histories."""
        config = self.config
        return MambaState(
            jnp.zeros((batch, config.d_conv - 1, config.d_inner), config.dtype),
            jnp.zeros((batch, config.d_inner, config.d_state), wide(config.dtype)),
        )
