"""The C allocator, told how these services use memory."""

from __future__ import annotations

import ctypes
from typing import Final

# mallopt(3), glibc
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
#: What a process keeps of freed memory, at the most.
KEEP_BYTES: Final = 64 << 20


def keep_large_blocks() -> None:
    """Let freed batches stay with the process instead of going back to the kernel each time.

    A batch is some hundred kilobytes, over glibc's threshold for a mapping of its own, so every one would be
    mapped, faulted in page by page, zeroed and unmapped again: a tenth of the pipeline's CPU time.  Does
    nothing where the C library has no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, KEEP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES)
        mallopt(_M_ARENA_MAX, 2)
