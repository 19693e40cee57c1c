"""The Mamba-2 mixer with an optional time factor on its steps."""

import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from kernels.ssd import ssd, ssd_last, ssd_step, step_size
from tim4rec_jax.layers.causal_time import TimeCache
from tim4rec_jax.layers.convolution import CausalConv
from tim4rec_jax.layers.dense import Linear, wide
from tim4rec_jax.layers.norms import gated_rms_norm
from tim4rec_jax.layers.rows import Rows, take_at
from tim4rec_jax.model_config import SSDConfig

STEP_RANGE = (1e-3, 1e-1)
STEP_FLOOR = 1e-4
DECAY_RANGE = (1.0, 16.0)

Settings = TypeVar("Settings", bound=SSDConfig)


def _dt_bias_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Inverse softplus of a step drawn log-uniformly from STEP_RANGE."""
    low, high = (math.log(v) for v in STEP_RANGE)
    step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), STEP_FLOOR)
    return step + jnp.log(-jnp.expm1(-step))


def _decay_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, *DECAY_RANGE))


class MixerState(NamedTuple):
    """What a mixer keeps of a history: constant in its length.

    Attributes:
      conv: [b, K - 1, e + 2n] last inputs of the convolution.
      ssm: [b, h, p, n] state of the SSD, float32 or wider.
      time: tails of the time branch's two convolutions, [b, K - 1, h] each, or None with time off.
    """

    conv: Array
    ssm: Array
    time: TimeCache | None


class SSDMixer(nn.Module, Generic[Settings]):
    """Projection, causal convolution, state space duality, gate and norm, projection.

      z, xBC, dt = in_proj(u);   x, B, C = act(conv(xBC));   delta = softplus(dt * g + dt_bias)
      out = out_proj(RMSNorm(SSD(x, delta, A, B, C, D) * silu(z)))

    g is the time factor of `TimeChannel`, or 1 with time off. Source: arXiv 2409.16182, section 3; Dao & Gu 2024.

    Attributes:
      config: the model's settings.
      time_type: makes the time branch from them, `TimeChannel` or `CausalTimeChannel`; None is time off.
    """

    config: Settings
    time_type: Callable[[Settings], nn.Module] | None = None

    def setup(self) -> None:
        config = self.config
        dtype = wide(config.dtype)
        inner, state, heads = config.d_inner, config.d_state, config.num_heads
        self.in_proj = Linear(2 * inner + 2 * state + heads, config.dtype)
        self.conv = CausalConv(
            inner + 2 * state,
            config.d_conv,
            config.activation,
            config.kaiming_init,
            config.dtype,
            config.backend("causal_conv1d"),
        )
        self.dt_bias = self.param("dt_bias", _dt_bias_init, (heads,), dtype)
        self.A_log = self.param("A_log", _decay_init, (heads,), dtype)
        self.D = self.param("D", nn.initializers.ones_init(), (heads,), dtype)
        self.norm_scale = self.param("norm_scale", nn.initializers.ones_init(), (inner,), dtype)
        self.out_proj = Linear(config.d_model, config.dtype)
        if self.time_type is not None:
            self.time = self.time_type(config)

    def __call__(
        self, u: Array, channel: Array | None, rows: Rows, cache: MixerState | None = None
    ) -> tuple[Array, Array | None, MixerState | None]:
        """Mixes u [b, l, d].

        Args:
          u: [b, l, d].
          channel: T, [b, h or 1, max_len] in the paper's time branch and [b, l, h] in the causal one; None with time
            off.
          rows: of u; several histories in one not with the paper's time branch.
          cache: of the positions before, or None; not with the paper's time branch.

        Returns:
          [b, l, d] or [b, m, d] at `rows.positions`, the next layer's channel (None with time off, and at single
          positions), and the cache behind these positions (None without one).
        """
        if cache is None and rows.segment_ids is None and rows.positions is not None and rows.positions.shape[1] == 1:
            return self._at_one_position(u, channel, rows), None, None
        config = self.config
        inner, state = config.d_inner, config.d_state
        conv_cache, state_before, time_cache = (None, None, None) if cache is None else cache
        segment_ids = rows.segment_ids if cache is None else rows.real_ids
        z, conv_in, dt = jnp.split(self.in_proj(u), [inner, 2 * inner + 2 * state], axis=-1)
        mixed, conv_cache = self.conv(conv_in, segment_ids=segment_ids, cache=conv_cache)
        x, B, C = jnp.split(mixed, [inner, inner + state], axis=-1)
        dt, factor, time_cache = self._timed_steps(dt, channel, rows, time_cache)
        if channel is not None:
            channel = self.time.carry(channel, factor, rows)
        x = x.reshape(*x.shape[:2], config.num_heads, config.head_dim)
        A, options = -jnp.exp(self.A_log), {"D": self.D, "dt_bias": self.dt_bias, "segment_ids": segment_ids}
        self.sow("intermediates", "step_size", step_size(dt, self.dt_bias))
        how = {"chunk_size": config.chunk_size, "implementation": config.backend("ssd")}
        if cache is not None and u.shape[1] == 1:
            scanned = ssd_step(x, dt, A, B, C, cache.ssm, **options)
        else:
            how |= {"initial_state": state_before, "return_final_state": cache is not None}
            scanned = ssd(x, dt, A, B, C, **options, **how)
        y, after = scanned if isinstance(scanned, tuple) else (scanned, None)
        self.sow("intermediates", "scan", y)
        y = gated_rms_norm(rows.at(y.reshape(z.shape)), rows.at(z), self.norm_scale, eps=config.norm_eps)
        cache = None if conv_cache is None or after is None else MixerState(conv_cache, after, time_cache)
        return self.out_proj(y), channel, cache

    def _at_one_position(self, u: Array, channel: Array | None, rows: Rows) -> Array:
        """Returns the output [b, 1, d] at one position per row.

        What reads one position is computed there alone: the gate z, the output map C, norm and output projection.
        """
        config = self.config
        inner, state, taps = config.d_inner, config.d_state, config.d_conv
        z_columns, x_B, C_columns = (
            slice(0, inner),
            slice(inner, 2 * inner + state),
            slice(2 * inner + state, -config.num_heads),
        )
        conv_in, dt = jnp.split(self.in_proj(u, [x_B, slice(-config.num_heads, None)]), [inner + state], axis=-1)
        x, B = jnp.split(self.conv(conv_in, slice(0, inner + state))[0], [inner], axis=-1)
        dt, _, _ = self._timed_steps(dt, channel, rows, None)

        assert rows.positions is not None  # Whoever calls this has read them.
        window = rows.positions + 1 - taps + jnp.arange(taps)
        u_window = take_at(u, jnp.maximum(window, 0))
        C_window = jnp.where((window >= 0)[..., None], self.in_proj(u_window, [C_columns]), jnp.zeros((), u.dtype))
        C_last = self.conv.last(C_window, slice(inner + state, None))
        z = self.in_proj(u_window[:, -1], [z_columns])
        x = x.reshape(*x.shape[:2], config.num_heads, config.head_dim)
        y = ssd_last(x, dt, -jnp.exp(self.A_log), B, C_last, rows.positions[:, 0], D=self.D, dt_bias=self.dt_bias)
        y = gated_rms_norm(y.reshape(z.shape), z, self.norm_scale, eps=config.norm_eps)
        return self.out_proj(y)[:, None]

    def _timed_steps(
        self, dt: Array, channel: Array | None, rows: Rows, cache: TimeCache | None
    ) -> tuple[Array, Array | None, TimeCache | None]:
        """Returns dt times the time factor in float32 or wider, the factor, and the time branch's next cache."""
        dt = dt.astype(wide(self.config.dtype))
        if channel is None:
            return dt, None, None
        factor, cache = self.time.factor(channel, rows, cache)
        return dt * factor[:, : dt.shape[1]], factor, cache

    def init_cache(self, batch: int) -> MixerState:
        """Returns the cache before the first event of `batch` histories; with the causal time branch or none."""
        config = self.config
        return MixerState(
            jnp.zeros((batch, config.d_conv - 1, config.d_inner + 2 * config.d_state), config.dtype),
            jnp.zeros((batch, config.num_heads, config.head_dim, config.d_state), wide(config.dtype)),
            None if self.time_type is None else self.time.init_cache(batch),
        )
