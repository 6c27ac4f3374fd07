"""Backend `localdisk`: blobs as partitions of a disk with GPT, or a disk that is one blob.

A partition of the type "basic data" is called by the first 32 characters of the blob's id; of any
other by its name and its GUID, 32 hexadecimal digits each (tools 4.4). A blob has as many bytes as
its partition, which may be more than were put there.
"""

from __future__ import annotations

import os
import stat
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from erofs.errors import FormatError, error_context
from erofs.gpt import HEAD_SECTORS, SECTOR_SIZE, parse_gpt
from fscache.backend.base import (
    BackendError,
    BackendMetrics,
    NotFound,
    ShortRead,
    check_blob_id,
)
from fscache.backend.localfs import file_pieces, read_exactly
from fscache.backend.settings import LocalDiskConfig

__all__ = ["LocalDiskBackend", "LocalDiskReader"]

_BASIC_DATA = uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")
_SHORT_ID = 32


class _Extent(NamedTuple):
    start: int
    size: int


class LocalDiskReader:
    """Reads one blob of a disk; safe to use from many threads."""

    def __init__(self, blob_id: str, disk: LocalDiskBackend) -> None:
        self.blob_id = blob_id
        self._disk = disk

    def size(self) -> int:
        """Return the length of the partition or disk in bytes; raise `BackendError`."""
        with self._disk.opened() as fd:
            return self._disk.extent(fd, self.blob_id).size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`; raise `BackendError`."""
        with self._disk.metrics.measure(length), self._disk.opened() as fd:
            extent = self._disk.extent(fd, self.blob_id)
            if offset + length > extent.size:
                raise ShortRead(
                    "partition ends too early", path=self._disk.path, blob=self.blob_id,
                    offset=offset, expected=f"{length} bytes", got=max(0, extent.size - offset),
                )  # fmt: skip
            with error_context(blob=self.blob_id):
                return read_exactly(fd, self._disk.path, extent.start + offset, length)

    @contextmanager
    def stream(self, offset: int) -> Iterator[Iterator[bytes]]:
        """Open the blob for reading from `offset` to its end; raise `BackendError`."""
        with self._disk.metrics.measure_pieces() as add, self._disk.opened() as fd:
            start, size = self._disk.extent(fd, self.blob_id)
            with error_context(blob=self.blob_id):
                yield file_pieces(fd, self._disk.path, start + offset, start + size, add)


class LocalDiskBackend:
    """Blobs of one disk (tools 4.4); its table is read with the first blob."""

    def __init__(self, config: LocalDiskConfig) -> None:
        self.metrics = BackendMetrics("localdisk")
        self.path = config.device_path
        self._has_table = not config.disable_gpt
        self._lock = threading.Lock()
        self._extents: dict[str, _Extent] | None = None

    def open(self, blob_id: str) -> LocalDiskReader:
        """Return a reader; raise `BackendError` for an id that is refused."""
        return LocalDiskReader(check_blob_id(blob_id), self)

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Have the disk open within the block; raise `BackendError`."""
        try:
            # A FIFO of that name must not block the reader.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise BackendError(f"cannot open ({error.strerror})", path=self.path) from error
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
                raise BackendError("neither a block device nor a file", path=self.path)
            yield fd
        finally:
            os.close(fd)

    def extent(self, fd: int, blob_id: str) -> _Extent:
        """Return where a blob is; raise `BackendError`."""
        size = os.lseek(fd, 0, os.SEEK_END)
        if not self._has_table:
            return _Extent(0, size)
        with self._lock:
            if self._extents is None:
                self._extents = self._read_table(fd, size)
        found = self._extents.get(blob_id) or self._extents.get(blob_id[:_SHORT_ID])
        if found is None:
            raise NotFound("no such blob", path=self.path, blob=blob_id)
        return found

    def _read_table(self, fd: int, size: int) -> dict[str, _Extent]:
        head = read_exactly(fd, self.path, 0, min(size, HEAD_SECTORS * SECTOR_SIZE))
        try:
            entries = parse_gpt(head)
        except FormatError as error:
            raise BackendError(f"no partition table of blobs: {error}", path=self.path) from error
        found: dict[str, _Extent] = {}
        for entry in entries:
            name = entry.name if entry.kind == _BASIC_DATA else entry.name + entry.guid.hex
            extent = _Extent(
                entry.first * SECTOR_SIZE, (entry.last - entry.first + 1) * SECTOR_SIZE
            )
            if not name or name in found or extent.start + extent.size > size:
                raise BackendError(
                    "partition without a name of its own, or behind the end of the disk",
                    path=self.path, blob=ascii(name)[:80],
                )  # fmt: skip
            found[name] = extent
        return found

    def close(self) -> None:
        """Do nothing: the disk is open only while it is read."""
