"""Processes with fake devices, whose number is fixed when JAX starts, and that compile quickly rather than well."""

import os
import pathlib

from tests.quick_flags import quick_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a process that sees `devices` CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {quick_flags()}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
