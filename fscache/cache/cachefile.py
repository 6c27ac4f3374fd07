"""The cache's data file of one blob: sparse, uncompressed, at uncompressed offsets.

Only bytes and places; what is in the file is the chunk map's business. The file is opened in
a directory without a mark and stays open, so that own writes raise no events (ondemand 5.8).
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from erofs.errors import NydusError
from erofs.layout import BLOCK_SIZE
from fscache.backend.base import check_blob_id

__all__ = ["DATA_SUFFIX", "CacheError", "CacheFile", "publish", "read_whole", "replace"]

logger = logging.getLogger(__name__)
DATA_SUFFIX = ".blob.data"
_ZEROS = bytes(BLOCK_SIZE)
_PIECE_BYTES = 1 << 20


class CacheError(NydusError):
    """A cache directory or file that cannot be used; `errno` tells the reason."""

    def __init__(self, what: str, code: int = errno.EIO, **where: object) -> None:
        super().__init__(what, **where)
        self.errno = code

    @classmethod
    def of(cls, what: str, error: OSError, **where: object) -> CacheError:
        """Return the error for a failed system call."""
        return cls(f"{what} ({error.strerror or error})", error.errno or errno.EIO, **where)


@contextmanager
def _temporary(directory: Path, content: bytes, size: int) -> Iterator[Path]:
    """Make a synced file of `content` and a hole up to `size` bytes, for the block."""
    # Not by `tempfile`, which takes 5 ms to load; as many bits, so that no two have one name.
    temporary = directory / f".{os.urandom(8).hex()}.tmp"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.ftruncate(fd, size)
            done = 0
            while done < len(content):
                done += os.pwrite(fd, content[done:], done)
            os.fsync(fd)
        finally:
            os.close(fd)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def publish(path: Path, content: bytes, size: int) -> None:
    """Make a file appear whole: `content`, then a hole up to `size` bytes, synced.

    A file of that name stays as it is, because another process may have it open.
    Raises `OSError`.
    """
    with _temporary(path.parent, content, size) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            logger.debug("%s was made by another process", path)


def replace(path: Path, content: bytes) -> None:
    """Make a file appear whole, synced, in the place of any other of that name.

    For files that are read as a whole: who has the other one open goes on with it.
    Raises `OSError`.
    """
    with _temporary(path.parent, content, len(content)) as temporary:
        temporary.rename(path)


def read_whole(path: Path, limit: int) -> bytes | None:
    """Return the content of a regular file of at most `limit` bytes, None without such a file.

    Raises `OSError`.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            return None
        return file.read(status.st_size)


def _open_existing(path: Path, size: int) -> int | None:
    """Return a descriptor of a usable data file, None without one or with a wrong one."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size == size:
        return fd
    os.close(fd)
    logger.warning(
        "%s: discarded with its chunk map: expected a file of %d bytes, got %d",
        path,
        size,
        status.st_size,
    )
    return None


class CacheFile:
    """Owner of the descriptor of one blob's data file; use `open`, then `close`.

    `path` and `map_path` are the data file and its chunk map, `size` is in bytes.
    """

    def __init__(self, path: Path, map_path: Path, size: int, fd: int) -> None:
        self.path = path
        self.map_path = map_path
        self.size = size
        self._fd = fd
        status = os.fstat(fd)
        self.inode = (status.st_dev, status.st_ino)

    @classmethod
    def open(cls, directory: Path, blob_id: str, size: int) -> CacheFile:
        """Open or create `<blob id>.blob.data` of exactly `size` bytes (tools 6).

        A file of another size is thrown away. Whenever the data file is new, an old chunk map
        is removed before the file appears. Raises `CacheError`, and `BackendError` for an id
        that is refused.
        """
        path = directory / f"{check_blob_id(blob_id)}{DATA_SUFFIX}"
        map_path = directory / f"{path.name}.chunk_map"
        try:
            fd = _open_existing(path, size)
            if fd is None:
                directory.mkdir(parents=True, exist_ok=True)
                map_path.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                publish(path, b"", size)
                fd = _open_existing(path, size)
        except OSError as error:
            raise CacheError.of("cannot open the cache file", error, path=path) from error
        if fd is None:
            raise CacheError("another process changes the cache file", path=path)
        return cls(path, map_path, size, fd)

    def check(self) -> None:
        """Raise `CacheError` when the file was truncated, or deleted under all its names."""
        try:
            status = os.fstat(self._fd)
        except OSError as error:
            raise CacheError.of("cache file is closed", error, path=self.path) from error
        if status.st_size != self.size:
            raise CacheError(
                "cache file changed its size",
                path=self.path,
                expected=self.size,
                got=status.st_size,
            )
        if status.st_nlink == 0:
            raise CacheError("cache file was deleted", path=self.path)

    def check_place(self) -> None:
        """Raise `CacheError` unless `path` still is the file that is written here."""
        self.check()
        try:
            status = self.path.lstat()
        except OSError as error:
            raise CacheError.of("cache file has gone", error, path=self.path) from error
        if (status.st_dev, status.st_ino) != self.inode:
            raise CacheError("cache file was replaced", path=self.path)

    def write(self, offset: int, *pieces: bytes | memoryview) -> None:
        """Write whole pages from `offset` on, a multiple of 4096.

        Args:
            offset: of the first piece.
            pieces: one behind the other, each from a page's beginning; a partial last page gets
                zeros.

        Raises `CacheError`, with the reason in `errno` (no space, read-only, I/O).
        """
        parts: deque[bytes | memoryview] = deque()
        for piece in pieces:
            parts.append(piece)
            if padding := -len(piece) % BLOCK_SIZE:
                parts.append(_ZEROS[:padding])
        total = sum(map(len, parts))
        if offset < 0 or offset % BLOCK_SIZE or offset + total > self.size:
            raise CacheError("write outside of the cache file", path=self.path, offset=offset)
        self.check()
        while parts:
            try:
                count = os.pwritev(self._fd, parts, offset)
            except OSError as error:
                raise CacheError.of(
                    "cannot write to the cache", error, path=self.path, offset=offset
                ) from error
            if count == 0:
                raise CacheError("cannot write to the cache", path=self.path, offset=offset)
            offset += count
            while parts and count >= len(parts[0]):
                count -= len(parts.popleft())
            if count:
                parts[0] = memoryview(parts[0])[count:]

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes at `offset`; raise `CacheError`."""
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as error:
            raise CacheError.of(
                "cannot read the cache", error, path=self.path, offset=offset
            ) from error
        if len(data) != length:
            raise CacheError(
                "cache file ends early", path=self.path, offset=offset, expected=length,
                got=len(data),
            )  # fmt: skip
        return data

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill a buffer with the bytes at `offset`; raise `CacheError`."""
        try:
            count = os.preadv(self._fd, [view], offset)
        except OSError as error:
            raise CacheError.of(
                "cannot read the cache", error, path=self.path, offset=offset
            ) from error
        if count != len(view):
            raise CacheError(
                "cache file ends early", path=self.path, offset=offset, expected=len(view),
                got=count,
            )  # fmt: skip

    def sha256(self, length: int) -> str:
        """Return the SHA-256 of the first bytes, in hex; raise `CacheError`."""
        found = hashlib.sha256()
        buffer = memoryview(bytearray(min(length, _PIECE_BYTES)))
        for start in range(0, length, _PIECE_BYTES):
            piece = buffer[: length - start]
            self.read_into(start, piece)
            found.update(piece)
        return found.hexdigest()

    def sync(self) -> None:
        """Make everything that was written durable; raise `CacheError`."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise CacheError.of("cannot sync the cache", error, path=self.path) from error

    def data_ranges(self) -> list[tuple[int, int]]:
        """Return the `(start, end)` ranges that are no holes, ascending; raise `CacheError`."""
        ranges = []
        end = 0
        try:
            while end < self.size:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
                end = os.lseek(self._fd, start, os.SEEK_HOLE)
                ranges.append((start, end))
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: nothing but a hole is left
                raise CacheError.of("cannot look for holes", error, path=self.path) from error
        return ranges

    def fileno(self) -> int:
        """Return the descriptor; it stays owned by this object."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
