"""What a result depends on besides its settings: versions, device, processors, commit and command line."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax


def processors_allowed() -> int:
    """Returns how many processors this process may use; XLA splits sums among so many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(fingerprint: str | None = None, *, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns what a result depends on besides its settings, ready for JSON.

    Args:
      fingerprint: of the cleaned log.
      command: command line; None is that of this process.
    """
    devices = jax.devices()
    return {
        **{name: _version(name) for name in ("tim4rec_jax", "jax", "jaxlib", "flax", "optax")},
        "orbax": _version("orbax-checkpoint"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "cpu_count": os.cpu_count(),
        "cpus_allowed": processors_allowed(),
        **_git_state(pathlib.Path(__file__)),
        "data_fingerprint": fingerprint,
        "command": list(sys.orig_argv if command is None else command),
        "start_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a checkout that is not installed


def _git_state(file: pathlib.Path) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that tracks `file`; nulls elsewhere, e.g. in site-packages."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # an environment may lie inside someone else's checkout
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": git("status", "--porcelain") != ""}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}
