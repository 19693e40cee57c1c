"""Causal depthwise convolution with an activation."""

from kernels.causal_conv1d.api import causal_conv1d, causal_conv1d_last

__all__ = ["causal_conv1d", "causal_conv1d_last"]
