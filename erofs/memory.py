"""How the C library keeps free memory: enough for the next chunk, in few places.

Each thread of glibc gets an arena of its own, and what is freed in one serves no other. Workers
that take turns with buffers of megabytes made 130 MB of that, where two arenas take 40 in the same
time. Buffers of the size of a chunk have to come from an arena, not from a mapping of their own:
that has each page zeroed by a fault, which takes longer than to decompress into it (0.55 ms
beside 0.04 for 1 MiB).
"""

from __future__ import annotations

import ctypes

__all__ = ["bound_arenas"]

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_ARENAS = 2
_KEPT_BYTES = 8 << 20


def bound_arenas() -> None:
    """Limit arenas, and what each of them keeps; before threads are started.

    A C library that knows nothing of this is left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_M_ARENA_MAX, _ARENAS)
    mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
