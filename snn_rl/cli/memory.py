"""How this process keeps the memory that it has freed."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks of any size for reuse; returns whether it does (not where the C library is another).

    By default blocks over 32 MiB, such as a layer's activations in a batch of 256, go back to the kernel when they are
    freed and come again page by page: a fifth of a training step's time on the CPU. A process that does so keeps the
    most memory that it ever had; this is for programs, not for a library to do behind its caller's back.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
