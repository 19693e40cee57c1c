"""State space duality (Mamba-2): `ssd`, its last-position form, and the dense mask for looking at."""

from kernels.ssd.api import IMPLEMENTATIONS, dense_mask, ssd, ssd_last, step_size

__all__ = ["IMPLEMENTATIONS", "dense_mask", "ssd", "ssd_last", "step_size"]
