"""Causal depthwise convolution with an activation, and what it needs to go on later."""

from kernels.causal_conv1d.api import IMPLEMENTATIONS, causal_conv1d, causal_conv1d_last, causal_conv1d_tail

__all__ = ["IMPLEMENTATIONS", "causal_conv1d", "causal_conv1d_last", "causal_conv1d_tail"]
