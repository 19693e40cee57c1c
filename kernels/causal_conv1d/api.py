"""Causal depthwise convolution over positions, with an activation: the public operator and its checks."""

from typing import Literal

from jax import Array

from kernels.activations import activation as activation_named
from kernels.causal_conv1d.config import CausalConv1dConfig, default_implementation
from kernels.causal_conv1d.pallas_triton import causal_conv1d_pallas_triton
from kernels.causal_conv1d.reference import causal_conv1d_reference
from kernels.causal_conv1d.xla import causal_conv1d_last_xla, causal_conv1d_xla

Implementation = Literal["reference", "xla", "pallas_triton", "pallas_triton_interpreted"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "xla", "pallas_triton", "pallas_triton_interpreted")


def _check_bias(bias: Array | None, channels: int) -> None:
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias has shape {bias.shape}, expected {(channels,)}")


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str = "none",
    implementation: Implementation | None = None,
    config: CausalConv1dConfig | None = None,
) -> Array:
    """Convolves each channel over the current and earlier positions.

      y[t] = act(bias + sum_{k=0..K-1} weight[k] x[t - (K - 1) + k]),    x before the first position is 0

    Args:
      x: [b, l, c]; float32, bfloat16 (GPU kernels then sum in float32) or float64.
      weight: [K, c]; the last tap meets the current position.
      bias: [c], or None.
      activation: "none", "silu" or "hard_swish".
      implementation: "xla" (shifted products), "reference" (window by window), "pallas_triton" (GPU kernels),
        "pallas_triton_interpreted" (the same kernels as slow plain JAX, for tests), or None for the best known on
        this platform.
      config: how the GPU kernels cut up the work, or None to derive it from the shape.

    Returns:
      [b, l, c] in the dtype of x.

    Raises:
      ValueError: for shapes that do not fit, an unknown activation or implementation, or what the named
        implementation does not offer.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"x {x.shape} and weight {weight.shape} must be [b, l, c] and [K, c]")
    _check_bias(bias, x.shape[2])
    activation_named(activation)
    implementation = implementation or default_implementation()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {IMPLEMENTATIONS}, or None")
    if implementation == "reference":
        return causal_conv1d_reference(x, weight, bias, activation=activation)
    if implementation == "xla":
        return causal_conv1d_xla(x, weight, bias, activation=activation)
    return causal_conv1d_pallas_triton(
        x,
        weight,
        bias,
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
