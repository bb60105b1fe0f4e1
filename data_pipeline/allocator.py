"""How freed memory is kept on a CPU."""

import ctypes
import sys

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


def keep_freed_memory() -> None:
    """Have glibc keep blocks of up to a gigabyte that tensors give back, instead of returning them to the kernel.

    The next training step or batch of samples asks for the same blocks again, and each page of memory that is fresh
    from the kernel costs a fault (docs/performance.md). Resident memory stays at its peak.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc
            libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
