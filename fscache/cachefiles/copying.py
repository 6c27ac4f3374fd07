"""Copies what is ready into files of the kernel's cache (spec ondemand 1.8).

The kernel takes direct I/O alone: pages in a page-aligned buffer, at offsets of whole pages. What
is in a file already is what is not a hole of it, so zeros are written, too.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from erofs.errors import error_context
from fscache.cachefiles.errors import CachefilesError
from fscache.cachefiles.machine import KernelObject, Phase
from fscache.cachefiles.sources import PIECE_BYTES, Extent, Source

__all__ = ["Withdrawn", "copy"]

_T = TypeVar("_T")

# For the moment that the kernel needs to attach a file after `copen`; 0.1 s in all.
_PAUSES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.032)
_HINTS = {
    errno.ENOBUFS: "the kernel's cache takes no data: less than 1 % of its file system is free"
    " (blocks or inodes)",
    errno.ENOSPC: "the file system of the kernel's cache is full",
    errno.EROFS: "the file system of the kernel's cache is read-only",
}
_buffers = threading.local()


class Withdrawn(Exception):
    """The kernel has let go of the file meanwhile: there is nobody to tell."""


def _buffer() -> memoryview:
    """Return this thread's page-aligned buffer."""
    view: memoryview | None = getattr(_buffers, "view", None)
    if view is None:
        view = _buffers.view = memoryview(mmap.mmap(-1, PIECE_BYTES))
    return view


def _patiently(target: KernelObject, call: Callable[[], _T]) -> _T:
    """Call again while the kernel still attaches the file.

    Raises:
        Withdrawn: the file is gone.
        CachefilesError: the kernel does not take it.
    """
    for pause in (*_PAUSES, 0.0):
        try:
            return call()
        except OSError as error:
            if target.phase is Phase.GONE:
                raise Withdrawn from error
            if error.errno != errno.ENOBUFS or not pause:
                code = error.errno or errno.EIO
                hint = _HINTS.get(code, "the kernel's cache cannot be written")
                raise CachefilesError(f"{hint} ({error.strerror})", code) from error
        time.sleep(pause)
    raise AssertionError  # the last pause is none


def _next(target: KernelObject, offset: int, whence: int) -> int | None:
    """Return where the next data or hole begins, None when there is none."""

    def seek() -> int | None:
        try:
            return os.lseek(target.fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise

    return _patiently(target, seek)


def _holes(target: KernelObject, extent: Extent) -> Iterator[Extent]:
    position, end = extent
    while position < end:
        hole = _next(target, position, os.SEEK_HOLE)
        # Behind the end of a file that is shorter everything is a hole.
        hole = position if hole is None else hole
        if hole >= end:
            return
        data = _next(target, hole, os.SEEK_DATA)
        position = end if data is None else min(data, end)
        yield hole, position


def copy(target: KernelObject, source: Source, extent: Extent) -> int:
    """Copy what the kernel lacks of an extent that is ready; return how many bytes.

    The descriptor has to be held (`Machine.hold`).

    Raises:
        Withdrawn: the kernel has let go of the file.
        CachefilesError: the kernel does not take it; `errno` tells why.
        NydusError: the source cannot be read.
    """
    copied = 0
    for start, end in _holes(target, extent):
        for offset in range(start, end, PIECE_BYTES):
            if target.phase is Phase.GONE:
                raise Withdrawn
            view = _buffer()[: min(PIECE_BYTES, end - offset)]
            source.copy(offset, view)
            _write(target, offset, view)
            copied += len(view)
    return copied


def _write(target: KernelObject, offset: int, view: memoryview) -> None:
    with error_context(blob=target.cookie.decode("ascii", "backslashreplace"), offset=offset):
        while view:
            count = _patiently(target, partial(os.pwritev, target.fd, [view], offset))
            if count <= 0 or count % mmap.PAGESIZE:
                raise CachefilesError("the kernel's cache takes a part of a page", got=count)
            view, offset = view[count:], offset + count
