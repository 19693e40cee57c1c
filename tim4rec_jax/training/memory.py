"""What memory a training process holds, and how to give back what it no longer needs."""

import ctypes
import pathlib
import resource
import sys

import jax


def return_freed_memory() -> None:
    """Gives memory that compilation used and freed back to the system; glibc keeps gigabytes of it otherwise."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # another C library: nothing to return by this name
            return


def resident_mb() -> float | None:
    """Memory this process holds now, in MiB; None where the system does not say."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize() / 2**20


def peak_resident_bytes() -> int:
    """The most memory this process has held, in bytes."""
    try:
        # getrusage would do, but on Linux it starts from the peak of the process that started this one.
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int | None:
    """The most memory held on the first device; None where it keeps no count, as the CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
