"""Softmax cross-entropy fused with the product by the catalogue: `softmax_cross_entropy` and its configurations."""

from kernels.softmax_cross_entropy.api import IMPLEMENTATIONS, softmax_cross_entropy
from kernels.softmax_cross_entropy.config import TritonConfig, Walk, XlaConfig

__all__ = ["IMPLEMENTATIONS", "TritonConfig", "Walk", "XlaConfig", "softmax_cross_entropy"]
