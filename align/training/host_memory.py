"""Freed memory stays with the process, so that a training step on a CPU does not fetch it from the kernel again.

A step makes and drops the same large tensors thousands of times.  glibc by default gives freed memory back to the
kernel, which zeroes every page of it when it is asked for again: a tenth of a step at widths of some hundred.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 2**31 - 1  # bytes at the top of the heap; what mallopt's int can say
_LARGEST = 32 * 2**20  # bytes; larger blocks are the kernel's as before.  glibc takes no larger threshold
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Ask glibc to keep blocks of up to 32 MiB; False where it is not glibc, or where the user has tuned it.

    Both thresholds are set: setting one turns off glibc's own growing of the other.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, _KEPT))
