"""Compiled programs kept between starts, so that the same program is not compiled again: JAX's persistent cache."""

import contextlib
import hashlib
import os
import pathlib
import platform
from collections.abc import Callable

import jax

# In place of the folder in the home folder; JAX's own JAX_COMPILATION_CACHE_DIR wins over both.
FOLDER = "TIM4REC_JAX_COMPILED"
MOST_BYTES = 2**30
# What compiles faster is not kept.
LEAST_SECONDS = 0.1


def _processor() -> str:
    """Names this kind of processor: what was compiled for one may not run on another that shares the home folder."""
    described = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        described += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def keep_compiled(report: Callable[[str], None] = print) -> None:
    """Sets JAX's persistent cache to a folder of this user, unless something else was set by a variable or in Python.

    The folder is ~/.cache/tim4rec_jax/compiled, or what the environment variable TIM4REC_JAX_COMPILED says ("" for
    none). At most `MOST_BYTES` stay in it from one start to the next, the newest.

    Args:
      report: receives a line if nothing can be kept.
    """
    if jax.config.jax_compilation_cache_dir is not None or os.environ.get(FOLDER) == "":
        return
    folder = pathlib.Path(os.environ.get(FOLDER, "~/.cache/tim4rec_jax/compiled")) / _processor()
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} may not be written")
        prune(folder)
    except (OSError, RuntimeError) as error:
        report(f"note: compiled programs are not kept ({error}); set {FOLDER} to a folder, or to nothing")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def prune(folder: pathlib.Path, most: int = MOST_BYTES) -> None:
    """Removes the oldest files until at most `most` bytes are left; others may do so at the same time."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                about = entry.stat(follow_symlinks=False)
                found.append((about.st_mtime_ns, about.st_size, entry.path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        total -= size
