"""Softmax cross-entropy fused with the product by the catalogue, its log-sum-exp alone, and their configurations."""

from kernels.softmax_cross_entropy.api import IMPLEMENTATIONS, log_sum_exp, softmax_cross_entropy
from kernels.softmax_cross_entropy.config import TritonConfig, Walk, XlaConfig

__all__ = ["IMPLEMENTATIONS", "TritonConfig", "Walk", "XlaConfig", "log_sum_exp", "softmax_cross_entropy"]
