"""Selective scan (Mamba-1): `selective_scan`."""

from kernels.selective_scan.api import IMPLEMENTATIONS, selective_scan, step_size
from kernels.selective_scan.config import SelectiveScanConfig

__all__ = ["IMPLEMENTATIONS", "SelectiveScanConfig", "selective_scan", "step_size"]
