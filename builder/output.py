"""Files that appear whole or not at all; FIFOs and devices are written straight."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from builder.errors import BuildError
from builder.writeback import begin_writeback

__all__ = ["OutputDisk", "OutputFile", "write_file"]

WRITEBACK_BYTES = 8 << 20
# Pieces that are larger are written as they are, without a copy.
_BUFFER_BYTES = 64 << 10


class OutputFile:
    """A file being written beside its final place.

    Leaving the context without `commit` removes what was written, unless the target is
    a FIFO or a device, which take the bytes as they come.

    Args:
        target: the final path, or the directory when the name is known only at the end.
        mode: permission bits, before the umask.
    """

    _access = os.O_WRONLY

    def __init__(self, target: Path, mode: int) -> None:
        self._target = target
        self._temporary: Path | None = None
        try:
            kind = stat.S_IFMT(target.stat().st_mode)
        except FileNotFoundError:
            kind = stat.S_IFREG
        try:
            if kind in (stat.S_IFREG, stat.S_IFDIR):
                self._temporary = _temporary(target, kind == stat.S_IFDIR)
                flags = self._access | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                descriptor = os.open(self._temporary, flags, mode)
            else:
                descriptor = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BuildError(f"cannot be written ({error.strerror})", path=target) from error
        self._file = os.fdopen(descriptor, "wb", buffering=_BUFFER_BYTES)
        # Up to where the disk was given its share, and how much came since.
        self._begun = self._fresh = 0

    @property
    def is_file(self) -> bool:
        """Whether nobody has to read before more can be written."""
        return self._temporary is not None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes; raise `BuildError`."""
        try:
            self._file.write(data)
            self._begin_writeback(len(data))
        except OSError as error:
            raise self._failed(error) from error

    def write_all(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        """Append pieces, at most 1024, without copying them; raise `BuildError`.

        Not for FIFOs: the disk gets its share from time to time.
        """
        try:
            self._file.flush()
            rest = os.writev(self._file.fileno(), pieces)
            for piece in pieces:
                # Less than all on a disk that is nearly full: the reason comes with the next try.
                if rest < len(piece):
                    self._file.write(memoryview(piece)[rest:])
                rest = max(rest - len(piece), 0)
            self._begin_writeback(sum(map(len, pieces)))
        except OSError as error:
            raise self._failed(error) from error

    def _begin_writeback(self, size: int) -> None:
        """Give the disk its share when so many bytes more make it worth it; raise `OSError`."""
        self._fresh += size
        if self._fresh >= WRITEBACK_BYTES and self._temporary is not None:
            position = self._file.tell()
            begin_writeback(self._file.fileno(), self._begun, position - self._begun)
            self._begun = position
            self._fresh = 0

    def _failed(self, error: OSError) -> BuildError:
        return BuildError(f"writing failed ({error.strerror})", path=self._target)

    def sync(self) -> None:
        """Bring everything that was written to the disk; raise `BuildError`."""
        try:
            self._file.flush()
            if self._temporary is not None:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def commit(self, name: str | None = None) -> Path:
        """Make the file durable under its final name; `name` when the target is a directory."""
        final = self._target if name is None else self._target / name
        self.sync()
        try:
            if self._temporary is not None:
                self._temporary.rename(final)
                self._temporary = None
            self._file.close()
        except OSError as error:
            raise self._failed(error) from error
        return final

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.close()
        except OSError:
            # A full disk was already told when the bytes were written or committed.
            if kind is None:
                raise
        finally:
            if self._temporary is not None:
                self._temporary.unlink(missing_ok=True)


class OutputDisk(OutputFile):
    """A regular file written at explicit offsets and read back; threads may share it.

    What is not written is a hole, which reads as zeros.

    Raises:
        BuildError: the target is there and no regular file.
    """

    _access = os.O_RDWR

    def __init__(self, target: Path, mode: int) -> None:
        if target.exists() and not target.is_file():
            raise BuildError("is not a regular file", path=target)
        super().__init__(target, mode)

    @property
    def descriptor(self) -> int:
        """The open file; it stays this object's."""
        return self._file.fileno()

    def resize(self, length: int) -> None:
        """Give the file its length in bytes; raise `BuildError`."""
        try:
            os.ftruncate(self.descriptor, length)
        except OSError as error:
            raise self._failed(error) from error

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all bytes at `offset`; raise `BuildError`."""
        rest = memoryview(data)
        try:
            while rest:
                count = os.pwrite(self.descriptor, rest, offset)
                rest, offset = rest[count:], offset + count
        except OSError as error:
            raise self._failed(error) from error


def _temporary(target: Path, is_directory: bool) -> Path:
    token = os.urandom(8).hex()
    if is_directory:
        return target / f".nydus-image-{token}"
    return target.parent / f".{target.name[:200]}.{token}"


def write_file(
    target: Path, data: bytes | bytearray | memoryview, mode: int, name: str | None = None
) -> Path:
    """Write a whole file atomically and return its path; raise `BuildError`."""
    with OutputFile(target, mode) as output:
        output.write(data)
        return output.commit(name)
