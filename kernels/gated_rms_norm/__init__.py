"""Gated root-mean-square norm."""

from kernels.gated_rms_norm.api import gated_rms_norm, project_normed

__all__ = ["gated_rms_norm", "project_normed"]
