"""XLA flags of all tests: their programs run once or twice and should be compiled quickly, not well."""

import os
import subprocess
import sys

# From all of them to none: XLA ends a process that gives a flag it does not know, and flags come and go.
_CHOICES = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "--xla_backend_optimization_level=0",
    "",
)
_FOUND = "TIM4REC_JAX_TEST_XLA_FLAGS"


def quick_flags() -> str:
    """Returns the flags that this release of XLA knows; tried once for all processes of a test run."""
    if _FOUND not in os.environ:
        os.environ[_FOUND] = next(flags for flags in _CHOICES if not flags or _are_known(flags))
    return os.environ[_FOUND]


def _are_known(flags: str) -> bool:
    given = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=given, capture_output=True).returncode == 0
