"""Fake devices, JAX's 64-bit mode, and where the reference vectors and the real logs lie, if they are there."""

import atexit
import os
import pathlib
import shutil
import tempfile

from tests.quick_flags import quick_flags

# Before JAX starts: several devices to shard over, all of them this processor.
os.environ["XLA_FLAGS"] = f"{quick_flags()} {os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

# What takes long to compile is compiled once for all workers of a test run and for the programs that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tim4rec_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes that a model promises are checked in tests, and cost users nothing.
install_import_hook("tim4rec_jax.models", "beartype.beartype")


# The rooms whose files take longest come first, so that no worker is left with one of them at the end.
_LONGEST_FIRST = ("training", "kernels", "models", "experiments")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [item.path.parent.name == room for room in _LONGEST_FIRST], reverse=True)


_MEMORY_MAPS = pathlib.Path("/proc/self/maps")
# Linux gives a process 65,530 by default. A file of tests leaves some thousands.
_MOST_MEMORY_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Each compiled program holds several memory maps, and XLA crashes when there are no more to be had."""
    yield
    if _MEMORY_MAPS.exists() and _MEMORY_MAPS.read_bytes().count(b"\n") > _MOST_MEMORY_MAPS:
        jax.clear_caches()


_SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def _folder(name: str) -> pathlib.Path:
    folder = _SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{name} files are kept outside the project and are absent here ({folder})")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """Numbers printed by the original PyTorch programs."""
    return _folder("golden")


@pytest.fixture(scope="session")
def datasets_dir() -> pathlib.Path:
    """Real interaction logs."""
    return _folder("datasets")


@pytest.fixture
def x64():
    """JAX's 64-bit mode for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def log():
    """The small log of `tests.serving.tiny_run`; a file may have one of its own."""
    from tests.serving.tiny_run import make_log

    return make_log()
