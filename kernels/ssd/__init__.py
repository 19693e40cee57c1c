"""State space duality (Mamba-2): `ssd`, at the last position, one position on, and the dense mask."""

from kernels.ssd.api import IMPLEMENTATIONS, dense_mask, ssd, ssd_last, step_size
from kernels.ssd.config import SsdConfig, default_config
from kernels.ssd.step import ssd_step

__all__ = ["IMPLEMENTATIONS", "SsdConfig", "default_config", "dense_mask", "ssd", "ssd_last", "ssd_step", "step_size"]
