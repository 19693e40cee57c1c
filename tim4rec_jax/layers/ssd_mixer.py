"""The Mamba-2 mixer with an optional time factor on its steps."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from kernels.gated_rms_norm import gated_rms_norm
from kernels.ssd import ssd, ssd_last, ssd_step, step_size
from tim4rec_jax.config import ModelConfig
from tim4rec_jax.layers.causal_time import CausalTimeChannel, Tails
from tim4rec_jax.layers.convolution import CausalConv
from tim4rec_jax.layers.dense import Linear, wide
from tim4rec_jax.layers.time_channel import TimeChannel

STEP_RANGE = (1e-3, 1e-1)
STEP_FLOOR = 1e-4
DECAY_RANGE = (1.0, 16.0)


def _dt_bias_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Inverse softplus of a step drawn log-uniformly from STEP_RANGE."""
    low, high = (math.log(v) for v in STEP_RANGE)
    step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), STEP_FLOOR)
    return step + jnp.log(-jnp.expm1(-step))


def _decay_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, *DECAY_RANGE))


def take_at(x: Array, positions: Array) -> Array:
    """Returns x [b, l, d] at positions [b, m] as [b, m, d]."""
    return jnp.take_along_axis(x, positions[..., None], axis=1)


class MixerState(NamedTuple):
    """What a mixer keeps of a history: constant in its length.

    Attributes:
      conv: [b, K - 1, e + 2n] last inputs of the convolution.
      ssm: [b, h, p, n] state of the SSD, float32 or wider.
      time: tails of the time branch's two convolutions, [b, K - 1, h] each, or None with time off.
    """

    conv: Array
    ssm: Array
    time: Tails | None


class SSDMixer(nn.Module):
    """Projection, causal convolution, state space duality, gate and norm, projection.

      z, xBC, dt = in_proj(u);   x, B, C = act(conv(xBC));   delta = softplus(dt * g + dt_bias)
      out = out_proj(RMSNorm(SSD(x, delta, A, B, C, D) * silu(z)))

    g is the time factor of `TimeChannel`, or 1 with time off. Source: arXiv 2409.16182, section 3; Dao & Gu 2024.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        dtype = wide(config.dtype)
        inner, state, heads = config.d_inner, config.d_state, config.num_heads
        self.in_proj = Linear(2 * inner + 2 * state + heads, config.dtype)
        self.conv = CausalConv(
            inner + 2 * state, config.d_conv, config.activation, config.kaiming_init, config.dtype,
            config.conv_implementation,
        )  # fmt: skip
        self.dt_bias = self.param("dt_bias", _dt_bias_init, (heads,), dtype)
        self.A_log = self.param("A_log", _decay_init, (heads,), dtype)
        self.D = self.param("D", nn.initializers.ones_init(), (heads,), dtype)
        self.norm_scale = self.param("norm_scale", nn.initializers.ones_init(), (inner,), dtype)
        self.out_proj = Linear(config.d_model, config.dtype)
        if config.use_time:
            self.time = CausalTimeChannel(config) if config.time_mode == "causal" else TimeChannel(config)

    def __call__(
        self, u: Array, channel: Array | None, example_ids: Array, *, deterministic: bool, starts: Array | None = None
    ) -> tuple[Array, Array | None]:
        """Mixes u [b, L, d].

        Args:
          u: [b, L, d].
          channel: T, [b, h or 1, max_len] in the paper's time branch and [b, L, h] in the causal one; None with time
            off.
          example_ids: int [b].
          deterministic: no dropout.
          starts: bool [b, L], true where a row's history begins anew; not with the paper's time branch.

        Returns:
          [b, L, d] and the next layer's channel (None with time off).
        """
        config = self.config
        inner, state = config.d_inner, config.d_state
        z, conv_in, dt = jnp.split(self.in_proj(u), [inner, 2 * inner + 2 * state], axis=-1)
        x, B, C = jnp.split(self.conv(conv_in, starts=starts), [inner, inner + state], axis=-1)
        options = {} if starts is None else {"starts": starts}
        dt, channel = self._timed_steps(dt, channel, example_ids, deterministic=deterministic, carry=True, **options)
        x = x.reshape(*x.shape[:2], config.num_heads, config.head_dim)
        self.sow("intermediates", "step_size", step_size(dt, self.dt_bias))
        y = ssd(
            x, dt, -jnp.exp(self.A_log), B, C, D=self.D, dt_bias=self.dt_bias, starts=starts,
            chunk_size=config.chunk_size, implementation=config.ssd_implementation,
        )  # fmt: skip
        self.sow("intermediates", "scan", y)
        y = gated_rms_norm(y.reshape(z.shape), z, self.norm_scale, eps=config.norm_eps)
        return self.out_proj(y), channel

    def last(
        self, u: Array, channel: Array | None, lengths: Array, example_ids: Array, *, deterministic: bool
    ) -> Array:
        """Returns the first output of `__call__` at each row's last real position only, [b, d].

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
        x, B = jnp.split(self.conv(conv_in, slice(0, inner + state)), [inner], axis=-1)
        dt, _ = self._timed_steps(dt, channel, example_ids, deterministic=deterministic, carry=False)

        window = lengths[:, None] - taps + jnp.arange(taps)
        u_window = take_at(u, jnp.maximum(window, 0))
        C_window = jnp.where((window >= 0)[..., None], self.in_proj(u_window, [C_columns]), jnp.zeros((), u.dtype))
        C_last = self.conv.last(C_window, slice(inner + state, None))
        z = self.in_proj(u_window[:, -1], [z_columns])
        x = x.reshape(*x.shape[:2], config.num_heads, config.head_dim)
        y = ssd_last(x, dt, -jnp.exp(self.A_log), B, C_last, lengths, D=self.D, dt_bias=self.dt_bias)
        y = gated_rms_norm(y.reshape(z.shape), z, self.norm_scale, eps=config.norm_eps)
        return self.out_proj(y)

    def init_state(self, batch: int) -> MixerState:
        """Returns the state before the first event of `batch` histories; with the causal time branch or none."""
        config = self.config
        return MixerState(
            jnp.zeros((batch, config.d_conv - 1, config.d_inner + 2 * config.d_state), config.dtype),
            jnp.zeros((batch, config.num_heads, config.head_dim, config.d_state), wide(config.dtype)),
            self.time.init_tails(batch) if config.use_time else None,
        )

    def extend(
        self, u: Array, channel: Array | None, state: MixerState, lengths: Array
    ) -> tuple[Array, Array | None, MixerState]:
        """Goes on with histories where `state` left them, without dropout.

        Args:
          u: [b, L, d] at their next positions.
          channel: T [b, L, h] there, or None with time off.
          state: of the positions before.
          lengths: int [b] real positions of u, 0 to L; later ones leave the state as it is.

        Returns:
          As `__call__`, and the next state.
        """
        config = self.config
        inner, width = config.d_inner, config.d_state
        z, conv_in, dt = jnp.split(self.in_proj(u), [inner, 2 * inner + 2 * width], axis=-1)
        mixed, conv_tail = self.conv.extend(conv_in, state.conv, lengths)
        x, B, C = jnp.split(mixed, [inner, inner + width], axis=-1)
        dt, time_tails = dt.astype(wide(config.dtype)), None
        if channel is not None:
            factor, time_tails = self.time.extend(channel, state.time, lengths)
            dt = dt * factor
            channel = self.time.carry(channel, factor, jnp.arange(u.shape[0]), deterministic=True)
        x = x.reshape(*x.shape[:2], config.num_heads, config.head_dim)
        A, options = -jnp.exp(self.A_log), {"D": self.D, "dt_bias": self.dt_bias, "lengths": lengths}
        if u.shape[1] == 1:
            y, ssm = ssd_step(x, dt, A, B, C, state.ssm, **options)
        else:
            y, ssm = ssd(
                x, dt, A, B, C, **options, initial_state=state.ssm, return_final_state=True,
                chunk_size=config.chunk_size, implementation=config.ssd_implementation,
            )  # fmt: skip
        y = gated_rms_norm(y.reshape(z.shape), z, self.norm_scale, eps=config.norm_eps)
        return self.out_proj(y), channel, MixerState(conv_tail, ssm, time_tails)

    def _timed_steps(
        self,
        dt: Array,
        channel: Array | None,
        example_ids: Array,
        *,
        deterministic: bool,
        carry: bool,
        **options: Array,
    ) -> tuple[Array, Array | None]:
        """Returns dt times the time factor in float32 or wider, and the next channel if it is wanted."""
        dt = dt.astype(wide(self.config.dtype))
        if channel is None:
            return dt, None
        factor = self.time.factor(channel, example_ids, deterministic=deterministic, **options)
        if carry:
            channel = self.time.carry(channel, factor, example_ids, deterministic=deterministic)
        return dt * factor[:, : dt.shape[1]], channel
