"""Causal depthwise convolution with an activation."""

from kernels.causal_conv1d.api import IMPLEMENTATIONS, causal_conv1d, causal_conv1d_last

__all__ = ["IMPLEMENTATIONS", "causal_conv1d", "causal_conv1d_last"]
