"""Linear recurrent units: a complex diagonal recurrence between two projections."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from tim4rec_jax.layers.dense import Linear, wide
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import ModelConfig


def by_position(decay: Array, x: Array, before: Array, starts: Array | None) -> Array:
    """What `linear_recurrence` returns, one position after the other."""

    def step(h: Array, inputs: tuple[Array, Array | None]) -> tuple[Array, Array]:
        x_t, start = inputs
        h = decay * (h if start is None else jnp.where(start[:, None], 0, h)) + x_t
        return h, h

    _, states = jax.lax.scan(step, before, (jnp.swapaxes(x, 0, 1), None if starts is None else starts.T))
    return jnp.swapaxes(states, 0, 1)


def by_association(decay: Array, x: Array, before: Array, starts: Array | None) -> Array:
    """What `linear_recurrence` returns, in some log2(l) steps: (a, u) then (b, v) is (a b, b u + v)."""
    decays = jnp.broadcast_to(decay, x.shape)
    decays = decays if starts is None else jnp.where(starts[:, :, None], 0, decays)
    x = x.at[:, 0].add(decays[:, 0] * before)

    def then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(then, (decays, x), axis=1)[1]


def linear_recurrence(decay: Array, x: Array, before: Array, starts: Array | None) -> Array:
    """Runs h_t = decay * h_{t-1} + x_t, with h_{t-1} = 0 where a history begins.

    On a CPU position by position, which is the least work; elsewhere by association, for a GPU would wait for every
    position.

    Args:
      decay: complex [n].
      x: complex [b, l, n].
      before: h_0, complex [b, n].
      starts: bool [b, l], true where a history begins; or None.

    Returns:
      h_1 .. h_l, complex [b, l, n].
    """
    run = by_position if jax.default_backend() == "cpu" else by_association
    return run(decay, x, before, starts)


def _to_complex(pair: Array) -> Array:
    """[.., 2n], real parts first -> complex [.., n]."""
    return jax.lax.complex(*jnp.split(pair, 2, axis=-1))


def _to_pair(values: Array) -> Array:
    """Complex [.., n] -> [.., 2n], real parts first."""
    return jnp.concatenate([values.real, values.imag], axis=-1)


class LinearRecurrentUnit(nn.Module):
    """A linear recurrent unit, whose parameters are all real.

      lambda = exp(-exp(nu_log) + i exp(theta_log)),    h_t = lambda * h_{t-1} + exp(gamma_log) * (B u_t + b)
      out_t = Re(C h_t) + c

    B, b and C are complex: `in_proj` holds the real parts of B and b in its first n columns and the imaginary ones
    behind them, `out_proj` the real parts of C in its first n rows and minus the imaginary ones behind them. At the
    start lambda lies uniformly on the ring r_min <= |lambda| <= r_max, and gamma = sqrt(1 - |lambda|^2), with which h
    is about as large as what drives it. The recurrence is complex64, or complex128 with float64.
    Source: Orvieto et al. 2023 (arXiv 2303.06349), section 3.

    Attributes:
      config: the model's settings.
      state: n.
      ring: r_min and r_max, 0 < r_min < r_max < 1.
    """

    config: ModelConfig
    state: int
    ring: tuple[float, float]

    def setup(self) -> None:
        config, shape, dtype = self.config, (self.state,), wide(self.config.dtype)
        self.in_proj = Linear(2 * self.state, config.dtype)
        self.nu_log = self.param("nu_log", self._decay_init, shape, dtype)
        self.theta_log = self.param("theta_log", _angle_init, shape, dtype)
        self.gamma_log = self.param("gamma_log", lambda key: 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(self.nu_log))))
        self.out_proj = Linear(config.d_model, config.dtype)

    def _decay_init(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        """log(-log |lambda|) with |lambda|^2 uniform, as it is where lambda is uniform on the ring."""
        low, high = self.ring
        return jnp.log(-0.5 * jnp.log(jax.random.uniform(key, shape, dtype, low**2, high**2)))

    def __call__(
        self, u: Array, channel: None, rows: Rows, cache: Array | None = None
    ) -> tuple[Array, None, Array | None]:
        """Mixes u [b, l, d].

        Args:
          u: [b, l, d].
          channel: handed on; no time is read.
          rows: of u; the output map runs at `rows.positions` alone.
          cache: [b, 2n] h before, real parts first; or None.

        Returns:
          [b, l, d] or [b, m, d] at `rows.positions`, the channel, and h behind these positions (None without a cache).
        """
        before = self.init_cache(u.shape[0]) if cache is None else cache
        decay = jnp.exp(jax.lax.complex(-jnp.exp(self.nu_log), jnp.exp(self.theta_log)))
        driven = jnp.exp(self.gamma_log) * _to_complex(self.in_proj(u).astype(before.dtype))
        starts = rows.starts if cache is None else None
        states = _to_pair(linear_recurrence(decay, driven, _to_complex(before), starts))
        return self.out_proj(rows.at(states)), channel, None if cache is None else rows.behind(before, states)

    def init_cache(self, batch: int) -> Array:
        """Returns h before the first event of `batch` histories, [b, 2n]."""
        return jnp.zeros((batch, 2 * self.state), wide(self.config.dtype))


def _angle_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Logarithms of angles that are uniform in (0, 2 pi)."""
    smallest = float(jnp.finfo(dtype).tiny)
    return jnp.log(jax.random.uniform(key, shape, dtype, smallest, 2 * math.pi))
