"""Backend `localfs`: blobs as files of a directory, or one file for every id.

A file is opened for each read: the path is the truth, so a file that was replaced is read
anew and one that was removed is missing, and thousands of blobs hold no descriptors.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from erofs.errors import error_context
from fscache.backend.base import (
    BackendError,
    BackendMetrics,
    NotFound,
    ShortRead,
    check_blob_id,
)
from fscache.backend.settings import LocalFsConfig

__all__ = ["LocalFsBackend", "LocalFsReader", "file_pieces", "read_exactly"]

logger = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 18


def read_exactly(fd: int, path: Path, offset: int, length: int) -> bytes:
    """Return so many bytes of a file; raise `BackendError`, a permanent `ShortRead` at its end."""
    data = _pread(fd, path, offset, length)
    while len(data) < length:
        more = _pread(fd, path, offset + len(data), length - len(data))
        if not more:
            raise ShortRead(
                "file ends too early",
                path=path,
                offset=offset,
                expected=f"{length} bytes",
                got=len(data),
            )
        data += more
    return data


def file_pieces(
    fd: int, path: Path, offset: int, end: int | None, add: Callable[[int], None]
) -> Iterator[bytes]:
    """Yield a file from an offset to `end`, None for its own; raise `BackendError`.

    `add` is told the length of each piece.
    """
    while end is None or offset < end:
        wanted = _PIECE_BYTES if end is None else min(_PIECE_BYTES, end - offset)
        piece = _pread(fd, path, offset, wanted)
        if not piece:
            return
        offset += len(piece)
        add(len(piece))
        yield piece


def _pread(fd: int, path: Path, offset: int, length: int) -> bytes:
    try:
        return os.pread(fd, length, offset)
    except OSError as error:
        raise BackendError(f"cannot read ({error.strerror})", path=path, offset=offset) from error


class LocalFsReader:
    """Reads one blob from the first of its candidate paths that exists."""

    def __init__(self, blob_id: str, paths: tuple[Path, ...], metrics: BackendMetrics) -> None:
        self.blob_id = blob_id
        self._paths = paths
        self._metrics = metrics

    @contextmanager
    def _open(self) -> Iterator[tuple[int, Path]]:
        for path in self._paths:
            try:
                # A FIFO of that name must not block the reader.
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise BackendError(
                    f"cannot open ({error.strerror})", path=path, blob=self.blob_id
                ) from error
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise BackendError("not a regular file", path=path, blob=self.blob_id)
                yield fd, path
            finally:
                os.close(fd)
            return
        raise NotFound("no such blob", path=self._paths[0], blob=self.blob_id)

    def size(self) -> int:
        """Return the length of the file in bytes; raise `BackendError`."""
        with self._open() as (fd, _):
            return os.fstat(fd).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`; raise `BackendError`.

        A file that ends too early is a permanent `ShortRead`.
        """
        blob = error_context(blob=self.blob_id)
        with self._metrics.measure(length), blob, self._open() as (fd, path):
            return read_exactly(fd, path, offset, length)

    @contextmanager
    def stream(self, offset: int) -> Iterator[Iterator[bytes]]:
        """Open the file for reading from `offset` to its end; raise `BackendError`."""
        blob = error_context(blob=self.blob_id)
        with self._metrics.measure_pieces() as add, blob, self._open() as (fd, path):
            yield file_pieces(fd, path, offset, None, add)


class LocalFsBackend:
    """Blobs of local files (tools 4.4)."""

    def __init__(self, config: LocalFsConfig) -> None:
        self.metrics = BackendMetrics("localfs")
        self._blob_file = config.blob_file
        first = () if config.dir is None else (config.dir,)
        self._dirs = first + config.alt_dirs
        if self._blob_file is None and not self._dirs:
            raise BackendError("localfs needs blob_file or dir")
        places = self._dirs if self._blob_file is None else (self._blob_file,)
        if not any(os.access(place, os.F_OK) for place in places):
            # No error: what is cached can be read without them.
            logger.warning("blobs are not there: %s", ", ".join(map(str, places)))

    def open(self, blob_id: str) -> LocalFsReader:
        """Return a reader; raise `BackendError` for an id that is refused."""
        check_blob_id(blob_id)
        if self._blob_file is not None:
            paths: tuple[Path, ...] = (self._blob_file,)
        else:
            paths = tuple(directory / blob_id for directory in self._dirs)
        return LocalFsReader(blob_id, paths, self.metrics)

    def close(self) -> None:
        """Do nothing: files are open only while they are read."""
