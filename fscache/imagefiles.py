"""An image as a file system of its own: names, attributes and content, for channels without EROFS.

No kernel here: numbers of inodes go in, values come out. What is shown is what the kernel's
EROFS shows of the same bootstrap (Linux `fs/erofs/inode.c`, `dir.c`, `super.c`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from erofs.errors import CorruptStructure
from erofs.inode import Inode
from erofs.layout import CHUNK_INDEX_SIZE, NAME_MAX, ChunkIndex
from erofs.reader import Bootstrap
from erofs.view import align_up
from fscache.cache.cachedblob import CachedBlob
from fscache.fetch.demand import Demand, Piece

__all__ = ["Directory", "ImageFiles"]

_INODES_REMEMBERED = 1 << 16
_DIRECTORIES_REMEMBERED = 1 << 12
_SECTOR = 512


class Directory(NamedTuple):
    """The entries of a directory: `numbers` by name without dots, `order` with them."""

    numbers: dict[bytes, int]
    order: tuple[tuple[bytes, int], ...]


class ImageFiles:
    """The files of an open bootstrap; safe for many threads.

    Methods raise `OSError` for what a reader asked wrongly, `NydusError` for an image or a
    blob that cannot be read.

    Args:
        image: the bootstrap; owned, see `close`.
        blobs: open, in the order of its device table.
        demand: makes their bytes ready.
    """

    def __init__(self, image: Bootstrap, blobs: Sequence[CachedBlob], demand: Demand) -> None:
        self._image = image
        self._blobs = blobs
        self._demand = demand
        self.inode = lru_cache(_INODES_REMEMBERED)(image.inode)
        self.directory = lru_cache(_DIRECTORIES_REMEMBERED)(self._read_directory)

    @property
    def root(self) -> int:
        """The number of the root."""
        return self._image.superblock.root_nid

    def _read_directory(self, number: int) -> Directory:
        """Return a directory's entries, in the order of the image."""
        inode = self.inode(number)
        if not inode.is_dir:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        order = tuple((entry.name, entry.nid) for entry in inode.entries())
        return Directory({name: nid for name, nid in order if name not in (b".", b"..")}, order)

    def find(self, path: bytes) -> int:
        """Return the number of an absolute path; links are not followed."""
        number = self.root
        for name in path.split(b"/"):
            if name:
                try:
                    number = self.directory(number).numbers[name]
                except KeyError:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        return number

    def attributes(self, number: int) -> dict[str, int]:
        """Return what stat tells of an inode, by the names of C; times in nanoseconds."""
        inode = self.inode(number)
        moment = inode.mtime * 10**9 + inode.mtime_nsec
        return {
            "st_ino": number,
            "st_mode": inode.mode,
            "st_nlink": inode.nlink,
            "st_uid": inode.uid,
            "st_gid": inode.gid,
            "st_rdev": inode.rdev,
            "st_size": inode.size,
            "st_blksize": self._image.block_size,
            "st_blocks": align_up(inode.size, self._image.block_size) // _SECTOR,
            "st_atime": moment,
            "st_mtime": moment,
            "st_ctime": moment,
        }

    def readlink(self, number: int) -> bytes:
        """Return the target of a symbolic link."""
        inode = self.inode(number)
        if not inode.is_symlink:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return inode.readlink()

    def xattrs(self, number: int) -> Mapping[bytes, bytes]:
        """Return the extended attributes of an inode by their full names."""
        return self.inode(number).xattrs()

    def space(self) -> dict[str, int]:
        """Return what statvfs tells, by the names of C: nothing is free."""
        image = self._image
        blocks = image.superblock.blocks + sum(slot.blocks for slot in image.devices)
        return {
            "f_bsize": image.block_size,
            "f_frsize": image.block_size,
            "f_blocks": blocks,
            "f_files": image.inode_count,
            "f_namemax": NAME_MAX,
        }

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Return bytes of a regular file, fewer at its end; waits for chunks that miss."""
        inode = self.inode(number)
        if not inode.is_regular:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        end = min(offset + length, inode.size)
        if not 0 <= offset < end:
            return b""
        return self._demand.read(self._pieces(inode, offset, end))

    def _pieces(self, inode: Inode, offset: int, end: int) -> list[Piece]:
        """Return where a part of a file is stored; neighbours in a blob are one piece."""
        size = self._image.index_granularity(inode)
        start, _ = inode.index_area()
        pieces: list[Piece] = []
        while offset < end:
            number, skip = divmod(offset, size)
            index = ChunkIndex.parse(self._image.view, start + number * CHUNK_INDEX_SIZE)
            blob = self._blob(index, inode)
            place = index.blkaddr * self._image.block_size + skip
            length = min(size - skip, end - offset)
            last = pieces[-1] if pieces else None
            if last is not None and last.blob is blob and last.offset + last.length == place:
                pieces[-1] = last._replace(length=last.length + length)
            else:
                pieces.append(Piece(blob, place, length))
            offset += length
        return pieces

    def _blob(self, index: ChunkIndex, inode: Inode) -> CachedBlob:
        if not 0 <= index.blob_index < len(self._blobs):
            raise CorruptStructure(
                "chunk of a blob that is not in the table",
                offset=inode.offset,
                got=index.blob_index,
            )
        return self._blobs[index.blob_index]

    def close(self) -> None:
        """Let go of the bootstrap, when nobody asks any more."""
        self._image.close()
