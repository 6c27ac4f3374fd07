"""Let the kernel write a file to the disk while it grows: the sync at the end has little left."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

__all__ = ["begin_writeback"]

# <fcntl.h>: begin to write what is dirty, wait for nothing.
_SYNC_FILE_RANGE_WRITE = 2


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).sync_file_range
    except AttributeError:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def begin_writeback(descriptor: int, offset: int, length: int) -> None:
    """Begin to write a range of an open file; a hint, whose failing the sync at the end will tell.

    A C library that knows nothing of this is left alone.
    """
    function = _sync_file_range()
    if function is not None:
        function(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)
