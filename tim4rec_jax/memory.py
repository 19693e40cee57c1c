"""Memory of the process: how much it holds, and what becomes of what is freed."""

import ctypes
import pathlib
import resource
import sys

import jax

# Names of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def _c_library() -> ctypes.CDLL | None:
    """Returns glibc, or None where there is another C library."""
    try:
        library = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    except OSError:
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def keep_freed_memory() -> None:
    """Lets the process keep what it frees, for its next allocation, until `return_freed_memory`.

    A program that XLA compiled for the CPU asks for the memory of its intermediate values at each call and frees it at
    the end. From 32 MB on glibc gets that from the system and gives it back each time, and to have its pages zeroed
    and mapped anew costs a training step much of its time. Only glibc's main arena grows without bound, and it is
    what threads share that start from now on, so call this first of all; where threads are there already, programs of
    less than 64 MB are still helped. Where the C library is another, nothing changes.
    """
    if (library := _c_library()) is not None:
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            library.mallopt(option, value)


def return_freed_memory() -> None:
    """Gives memory that compilation used and freed back to the system; glibc keeps gigabytes of it otherwise."""
    if (library := _c_library()) is not None:
        library.malloc_trim(0)


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
