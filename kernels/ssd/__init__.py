"""State space duality (Mamba-2): `ssd`, its last-position form, and the dense mask for looking at."""

from kernels.ssd.api import IMPLEMENTATIONS, dense_mask, ssd, ssd_last, step_size
from kernels.ssd.config import SsdConfig, default_config

__all__ = ["IMPLEMENTATIONS", "SsdConfig", "default_config", "dense_mask", "ssd", "ssd_last", "step_size"]
