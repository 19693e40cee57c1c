"""Causal depthwise convolution over positions, with an activation: the public operator and its checks."""

from typing import Literal

import jax.numpy as jnp
from jax import Array

from kernels.activations import activation as activation_named
from kernels.causal_conv1d.config import CausalConv1dConfig, default_implementation
from kernels.causal_conv1d.pallas_triton import causal_conv1d_pallas_triton
from kernels.causal_conv1d.reference import causal_conv1d_reference
from kernels.causal_conv1d.xla import causal_conv1d_last_xla, causal_conv1d_xla
from kernels.starts import real_starts

Implementation = Literal["reference", "xla", "pallas_triton", "pallas_triton_interpreted"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "xla", "pallas_triton", "pallas_triton_interpreted")


def _check_bias(bias: Array | None, channels: int) -> None:
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias has shape {bias.shape}, expected {(channels,)}")


def _check_initial(initial: Array | None, x: Array, taps: int) -> None:
    if initial is None:
        return
    expected = (x.shape[0], taps - 1, x.shape[2])
    if initial.shape != expected:
        raise ValueError(f"initial has shape {initial.shape}, expected [b, K - 1, c] = {expected}")
    if initial.dtype != x.dtype:
        raise ValueError(f"initial is {initial.dtype}, expected {x.dtype}, the dtype of x")


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str = "none",
    starts: Array | None = None,
    initial: Array | None = None,
    implementation: Implementation | None = None,
    config: CausalConv1dConfig | None = None,
) -> Array:
    """Convolves each channel over the current and earlier positions.

      y[t] = act(bias + sum_{k=0..K-1} weight[k] x[t - (K - 1) + k])

    Args:
      x: [b, l, c]; float32, bfloat16 (GPU kernels then sum in float32) or float64.
      weight: [K, c]; the last tap meets the current position.
      bias: [c], or None.
      activation: "none", "silu" or "hard_swish".
      starts: bool [b, l], true where a history begins: it sees 0 in place of all x before, exactly; or None for one
        history a row.
      initial: [b, K - 1, c], x before the first position, as `causal_conv1d_tail` returns it; or None for zeros.
      implementation: "xla" (shifted products), "reference" (window by window), "pallas_triton" (GPU kernels),
        "pallas_triton_interpreted" (the same kernels as slow plain JAX, for tests), or None for the best known on
        this platform that offers what is asked for; the kernels do not offer `initial`.
      config: how the GPU kernels cut up the work, or None to derive it from the shape.

    Returns:
      [b, l, c] in the dtype of x.

    Raises:
      ValueError: for shapes or dtypes that do not fit, an unknown activation or implementation, or what the named
        implementation does not offer.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"x {x.shape} and weight {weight.shape} must be [b, l, c] and [K, c]")
    _check_bias(bias, x.shape[2])
    _check_initial(initial, x, weight.shape[0])
    starts = real_starts(starts, x.shape[:2])
    activation_named(activation)
    implementation = implementation or (default_implementation() if initial is None else "xla")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {IMPLEMENTATIONS}, or None")
    if implementation == "reference":
        return causal_conv1d_reference(x, weight, bias, starts, initial, activation=activation)
    if implementation == "xla":
        return causal_conv1d_xla(x, weight, bias, starts, initial, activation=activation)
    if initial is not None:
        raise ValueError(f"implementation={implementation!r} offers no initial: use implementation='xla'")
    return causal_conv1d_pallas_triton(
        x,
        weight,
        bias,
        starts,
        activation=activation,
        config=config,
        interpret=implementation == "pallas_triton_interpreted",
    )


def causal_conv1d_last(window: Array, weight: Array, bias: Array | None = None, *, activation: str = "none") -> Array:
    """Returns `causal_conv1d`'s output at one position from the K inputs that end there.

    Args:
      window: [b, K, c]; inputs before the first position are 0.
      weight, bias, activation: as in `causal_conv1d`.

    Returns:
      [b, c] in the dtype of window.

    Raises:
      ValueError: for shapes that do not fit or an unknown activation.
    """
    if window.ndim != 3 or window.shape[1:] != weight.shape:
        raise ValueError(f"window {window.shape} must be [b, K, c] for weight {weight.shape}")
    _check_bias(bias, window.shape[2])
    return causal_conv1d_last_xla(window, weight, bias, activation=activation)


def causal_conv1d_tail(x: Array, K: int, lengths: Array | None = None, initial: Array | None = None) -> Array:
    """Returns the inputs that `causal_conv1d` with K taps needs as `initial` to go on where each row ends.

    Args:
      x: [b, l, c].
      K: taps, at least 1.
      lengths: int [b] real positions a row, 0 to l, or None for all.
      initial: [b, K - 1, c] in the dtype of x, inputs before the first position; or None for zeros.

    Returns:
      [b, K - 1, c] in the dtype of x: the last K - 1 inputs up to the row's length, of `initial` where it is shorter.

    Raises:
      ValueError: for shapes or dtypes that do not fit, or K under 1.
    """
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}, expected [b, l, c]")
    if K < 1:
        raise ValueError(f"K={K} must be at least 1")
    batch, length, channels = x.shape
    _check_initial(initial, x, K)
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {lengths.shape}, expected {(batch,)}")
    if initial is None:
        initial = jnp.zeros((batch, K - 1, channels), x.dtype)
    known = jnp.concatenate([initial, x], axis=1)
    if lengths is None:
        return known[:, length:]
    at = jnp.minimum(lengths, length)[:, None] + jnp.arange(K - 1)
    return jnp.take_along_axis(known, at[..., None], axis=1)
