"""What images of every version have in common: lifetime, looking up, walking, opening.

Nothing here knows an on-disk format.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from erofs.errors import CorruptStructure, FormatError
from erofs.view import View

__all__ = [
    "NO_XATTRS",
    "BlobHint",
    "DirectoryEntry",
    "ImageBase",
    "InodeBase",
    "Source",
    "Tables",
    "open_as",
]

# Nearly every inode's, so that there is only one.
NO_XATTRS: Mapping[bytes, bytes] = MappingProxyType({})

Source = Path | str | bytes | bytearray | memoryview


class DirectoryEntry(NamedTuple):
    """A name in a directory; `file_type` is one of `layout.FT_*`."""

    name: bytes
    nid: int
    file_type: int


class Tables(NamedTuple):
    """Where a bootstrap has its tables: offsets and sizes in bytes, 0 for what is not there."""

    blob_offset: int
    blob_size: int
    prefetch_offset: int
    prefetch_entries: int
    chunk_offset: int = 0
    chunk_size: int = 0


class BlobHint(NamedTuple):
    """What one version alone says of a blob: v6 the block it is mapped at, v5 what to read ahead.

    `readahead_offset` and `readahead_size` are in bytes of the stored blob.
    """

    mapped_blkaddr: int = 0
    readahead_offset: int = 0
    readahead_size: int = 0


class InodeBase(ABC):
    """A view of one inode; `nid` is its number, `mode` the whole st_mode, sizes in bytes."""

    __slots__ = ()

    nid: int
    mode: int
    size: int

    @property
    def is_dir(self) -> bool:
        """Whether the inode is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        """Whether the inode is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether the inode is a symbolic link."""
        return stat.S_ISLNK(self.mode)

    @property
    @abstractmethod
    def claimed_bytes(self) -> int:
        """Bytes of the image that are the inode's alone; of all together, no more than it has."""

    @abstractmethod
    def entries(self) -> Iterator[DirectoryEntry]:
        """Yield the entries of a directory; raise `FormatError`."""

    @abstractmethod
    def lookup(self, name: bytes) -> DirectoryEntry | None:
        """Return the entry called `name`, if there is one; raise `FormatError`."""


_Inode = TypeVar("_Inode", bound=InodeBase)


class ImageBase(ABC, Generic[_Inode]):
    """An image that is read lazily; a context manager that closes its mapping."""

    def __init__(self, source: View, mapping: mmap.mmap | None = None) -> None:
        self.view = source
        self._mapping = mapping

    @property
    @abstractmethod
    def root(self) -> _Inode:
        """The root directory; raise `FormatError`."""

    @abstractmethod
    def inode(self, nid: int) -> _Inode:
        """Decode the inode `nid`; raise `FormatError`."""

    def lookup(self, path: bytes) -> _Inode | None:
        """Return the inode at an absolute path, without following symlinks; raise `FormatError`."""
        inode = self.root
        for name in path.split(b"/"):
            if name in (b"", b"."):
                continue
            entry = inode.lookup(name)
            if entry is None:
                return None
            inode = self.inode(entry.nid)
        return inode

    def walk(self) -> Iterator[tuple[bytes, _Inode]]:
        """Yield (path, inode) of every name, depth first, parents before children.

        Raises:
            CorruptStructure: a directory is met twice, so the tree has a loop, or inodes
                share their data, so walking them would take far longer than the image is.
        """
        root = self.root
        seen = {root.nid}
        claimed = 0
        stack = [(b"/", root)]
        while stack:
            path, inode = stack.pop()
            yield path, inode
            claimed += inode.claimed_bytes
            if claimed > self.view.length:
                raise CorruptStructure("inodes share their data", entry=path)
            if not inode.is_dir:
                continue
            prefix = path if path == b"/" else path + b"/"
            children = []
            for entry in inode.entries():
                if entry.name in (b".", b".."):
                    continue
                child = self.inode(entry.nid)
                if child.is_dir:
                    if entry.nid in seen:
                        raise CorruptStructure("directory met twice", entry=prefix + entry.name)
                    seen.add(entry.nid)
                children.append((prefix + entry.name, child))
            stack.extend(reversed(children))

    def close(self) -> None:
        """Release the mapping; inodes must not be used afterwards."""
        if self._mapping is not None:
            _unmap(self.view, self._mapping)
            self._mapping = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unmap(view: View, mapping: mmap.mmap) -> None:
    view.data.release()
    # Parts that an error on its way has in its frames keep the mapping as long as it lives.
    with suppress(BufferError):
        mapping.close()


def _view(source: Source) -> tuple[View, mmap.mmap | None]:
    if not isinstance(source, Path | str):
        return View(source), None
    # O_NONBLOCK: a FIFO is refused instead of waited for.
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(source))
        # Block devices have no st_size; seeking to their end tells it.
        if os.lseek(descriptor, 0, os.SEEK_END) == 0:
            return View(b""), None
        mapping = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    return View(mapping), mapping


_Image = TypeVar("_Image", bound=ImageBase[Any])


def open_as(kind: Callable[[View, mmap.mmap | None], _Image], source: Source) -> _Image:
    """Open an image by its class, from a path (mapped, and then the image's own) or from bytes.

    Raises:
        FormatError: what `kind` raises, with the path.
        OSError: the path cannot be opened.
    """
    view, mapping = _view(source)
    try:
        return kind(view, mapping)
    except FormatError as error:
        if isinstance(source, Path | str):
            error.add_context(path=source)
        if mapping is not None:
            _unmap(view, mapping)
        raise
