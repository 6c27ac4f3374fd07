"""The files that a daemon's cache would have of a blob, instead of the blob (spec 4.4)."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from builder.errors import BuildError
from builder.output import OutputFile, write_file
from erofs.blobmeta import CI_ALIGNMENT
from erofs.citable import pack_cached

__all__ = ["CacheFiles", "Discard", "TableOnly"]

MODE = 0o600
DATA_SUFFIX = ".blob.data"
META_SUFFIX = ".blob.meta"


class Discard:
    """Takes the bytes of a blob that nobody wants."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Forget bytes."""


class TableOnly:
    """The compression table alone, in the form of caches, at a path of the caller's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: bytes | None = None

    def write_chunk(self, data: bytes | bytearray | memoryview) -> None:
        """Forget the content of a chunk."""

    def write_table(self, plain: bytes, header: bytes) -> None:
        """Take the plain compression table and its header."""
        self._content = pack_cached(plain, header)

    def commit(self, blob_id: str) -> Path:
        """Write the table, whatever its blob is called; raise `BuildError`."""
        if self._content is None:
            raise BuildError("table of a blob without data", blob=blob_id)
        return write_file(self._path, self._content, MODE)


class CacheFiles:
    """`<id>.blob.data` and `<id>.blob.meta` in the making; leaving without `commit` drops them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._data = self._stack.enter_context(OutputFile(directory, MODE))
        self._meta: bytes | None = None

    def write_chunk(self, data: bytes | bytearray | memoryview) -> None:
        """Append the content of the next chunk, in whole pages; raise `BuildError`."""
        self._data.write(data)
        self._data.write(bytes(-len(data) % CI_ALIGNMENT))

    def write_table(self, plain: bytes, header: bytes) -> None:
        """Take the plain compression table and its header."""
        self._meta = pack_cached(plain, header)

    def commit(self, blob_id: str) -> Path:
        """Give both files their names and return that of the data; raise `BuildError`."""
        if self._meta is None:
            raise BuildError("cache files of a blob without data")
        with OutputFile(self._directory, MODE) as meta:
            meta.write(self._meta)
            meta.sync()
            path = self._data.commit(blob_id + DATA_SUFFIX)
            meta.commit(blob_id + META_SUFFIX)
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
