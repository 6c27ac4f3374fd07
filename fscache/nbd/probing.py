"""Whether this kernel mounts an image from an NBD device, found out by doing it."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack

from erofs.errors import NydusError
from erofs.layout import BLOCK_SIZE
from fscache.fetch.outstanding import Done
from fscache.mounts.mount import create_mount
from fscache.nbd.device import IDENTIFIER_PREFIX, KernelDevice
from fscache.nbd.disk import Data, Disk, Segment
from fscache.nbd.server import DiskServer
from fscache.probe_image import BLOB_SIZE, FILE_NAME, build_probe_image
from fscache.sharing import LazyUnsupported

__all__ = ["require_nbd"]

_lock = threading.Lock()
_tried = False
_PAGE = bytes(range(256)) * (BLOCK_SIZE // 256)


class _Memory:
    """A source of bytes that repeat."""

    slow = False

    def __init__(self, data: bytes) -> None:
        self._data = data

    def request(self, offset: int, length: int, done: Done) -> None:
        """Be ready."""
        done(None)

    def read(self, offset: int, length: int) -> Data:
        """Return a range."""
        start = offset % len(self._data)
        return (self._data * (length // len(self._data) + 2))[start : start + length]


def _try_mount() -> None:
    """Mount a tiny image and read a page of its blob; raise `NydusError` or `OSError`."""
    image = build_probe_image()
    end = BLOCK_SIZE + BLOB_SIZE
    segments = [
        Segment(0, BLOCK_SIZE, _Memory(image), 0),
        Segment(BLOCK_SIZE, end, _Memory(_PAGE), 0),
    ]
    with ExitStack() as stack:
        server = DiskServer(Disk(end, BLOCK_SIZE, segments), 1)
        stack.callback(server.close)
        device = KernelDevice.attach(server, None, f"{IDENTIFIER_PREFIX}probe", 2)
        stack.callback(device.detach)
        mount = create_mount(device.path, [])
        stack.callback(os.close, mount)
        file = os.open(FILE_NAME, os.O_RDONLY | os.O_CLOEXEC, dir_fd=mount)
        stack.callback(os.close, file)
        if os.pread(file, BLOCK_SIZE, BLOB_SIZE // 2) != _PAGE:
            raise LazyUnsupported("no NBD: EROFS of this kernel reads other bytes")


def require_nbd() -> None:
    """Raise `LazyUnsupported` unless an image can be mounted by NBD; asked once."""
    global _tried
    with _lock:
        if _tried:
            return
        try:
            _try_mount()
        except NydusError as error:
            raise LazyUnsupported(f"no NBD: {error} (Linux 6.4 is needed)") from error
        except OSError as error:
            raise LazyUnsupported(f"no NBD: {error.strerror} (Linux 6.4 is needed)") from error
        _tried = True
