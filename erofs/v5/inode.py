"""A view of one RAFS v5 inode: attributes, directory entries, xattrs, target, chunk infos.

Every name has a record of its own; those of hard links name the same inode. Decoded when
asked for; every place that the image names is checked before it is used.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from erofs import layout
from erofs.base import DirectoryEntry, InodeBase
from erofs.errors import CorruptStructure, OutOfBounds
from erofs.rafs import CHUNK_INFO_SIZE, ChunkInfo
from erofs.v5.layout import (
    ALIGNMENT,
    INODE_SIZE,
    STORED_NAME_MAX,
    XATTR_AREA_HEADER_SIZE,
    XATTR_PAIR_HEADER_SIZE,
    InodeFlags,
)
from erofs.view import align_up

if TYPE_CHECKING:
    from erofs.v5.image import BootstrapV5

__all__ = ["InodeV5"]


class InodeV5(InodeBase):
    """The record of one name, which is the inode itself when `index` equals `nid`.

    `mtime` is in signed seconds, `rdev` in Linux' "new" encoding, `sectors` as stored.

    Raises:
        FormatError: the record contradicts itself or its place.
    """

    __slots__ = (
        "gid", "image", "index", "mode", "mtime", "mtime_nsec", "nid", "nlink", "offset",
        "record", "sectors", "size", "uid", "xattr_size",
    )  # fmt: skip

    def __init__(self, image: BootstrapV5, index: int) -> None:
        self.image = image
        self.index = index
        self.offset = image.inode_offset(index)
        self.record = record = image.parse_record(self.offset)
        self.nid, self.mode, self.size = record.ino, record.mode, record.size
        self.uid, self.gid, self.nlink = record.uid, record.gid, record.nlink
        self.mtime, self.mtime_nsec = record.mtime, record.mtime_nsec
        self.sectors = record.blocks
        self._check()
        self.xattr_size = self._read_xattr_size()
        image.view.check(self.offset, self._end - self.offset, "inode with its chunks")

    def _check(self) -> None:
        record, offset = self.record, self.offset
        kind = stat.S_IFMT(record.mode)
        if kind not in layout.FILE_TYPES or record.mode > 0xFFFF:
            raise CorruptStructure("inode of unknown type", offset=offset, got=f"{record.mode:o}")
        if record.size >> 63:
            raise CorruptStructure("negative file size", offset=offset, got=record.size)
        if not 0 < record.name_size <= STORED_NAME_MAX:
            raise CorruptStructure("impossible file name", offset=offset, got=record.name_size)
        if record.ino != self.index and (not self.is_regular or not 0 < record.ino < self.index):
            raise CorruptStructure(
                "inode number of a name", offset=offset, expected=self.index, got=record.ino
            )
        if not self.is_dir or not record.child_count:
            return
        # What is in a directory comes behind it, so that there are no loops.
        last = record.child_index + record.child_count - 1
        if record.child_index <= self.index or last > self.image.name_count:
            raise OutOfBounds(
                "content of a directory outside of the inode table",
                offset=offset,
                expected=f"{self.index + 1} to {self.image.name_count}",
                got=f"{record.child_index} to {last}",
            )

    def _text(self, offset: int, size: int) -> bytes:
        text = bytes(self.image.view.slice(offset, size, "name or target"))
        return text.rstrip(b"\0") if self.image.is_early else text

    @property
    def name(self) -> bytes:
        """The name that the record is for, `/` for the root; raise `FormatError`."""
        return self._text(self.offset + INODE_SIZE, self.record.name_size)

    @property
    def _target_start(self) -> int:
        return self.offset + INODE_SIZE + align_up(self.record.name_size, ALIGNMENT)

    @property
    def _xattr_start(self) -> int:
        return self._target_start + align_up(self.record.symlink_size, ALIGNMENT)

    def _read_xattr_size(self) -> int:
        """Return the length of the xattr area with its header, 0 when there is none."""
        if not self.record.flags & InodeFlags.XATTR:
            return 0
        header = self.image.view.slice(self._xattr_start, XATTR_AREA_HEADER_SIZE, "xattr area")
        size = XATTR_AREA_HEADER_SIZE + int.from_bytes(header, "little")
        self.image.view.check(self._xattr_start, size, "xattr area")
        return size

    @property
    def _chunk_start(self) -> int:
        return self._xattr_start + align_up(self.xattr_size, ALIGNMENT)

    @property
    def _end(self) -> int:
        chunks = self.record.child_count if self.is_regular else 0
        return self._chunk_start + chunks * CHUNK_INFO_SIZE

    @property
    def digest(self) -> bytes:
        """The digest of the digests of chunks or children, or of a target."""
        return self.record.digest

    @property
    def rdev(self) -> int:
        """Device number of a character or block device, 0 for all else."""
        is_device = stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode)
        return self.record.rdev if is_device else 0

    @property
    def claimed_bytes(self) -> int:
        """Bytes that are the inode's alone: what follows its name, and fixed parts of entries."""
        entries = self.record.child_count * INODE_SIZE if self.is_dir else 0
        return entries + self._end - self._target_start

    def child_indexes(self) -> range:
        """Return where in the inode table the names in a directory are; raise `FormatError`."""
        if not self.is_dir:
            raise CorruptStructure("not a directory", offset=self.offset)
        first = self.record.child_index
        return range(first, first + self.record.child_count)

    def entries(self) -> Iterator[DirectoryEntry]:
        """Yield the entries of a directory, without `.` and `..`; raise `FormatError`."""
        for index in self.child_indexes():
            yield InodeV5(self.image, index).entry()

    def entry(self) -> DirectoryEntry:
        """Return the entry of this name in its directory; raise `FormatError`."""
        name = self.name
        if not 0 < len(name) <= layout.NAME_MAX or b"/" in name or b"\0" in name:
            raise CorruptStructure("impossible file name", offset=self.offset, got=name[:64])
        if name in (b".", b".."):
            raise CorruptStructure("reserved file name", offset=self.offset, got=name)
        return DirectoryEntry(name, self.nid, layout.FILE_TYPES[stat.S_IFMT(self.mode)])

    def lookup(self, name: bytes) -> DirectoryEntry | None:
        """Return the entry called `name`, if there is one; raise `FormatError`."""
        if not self.is_dir:
            return None
        indexes = self.child_indexes()
        low, high = indexes.start, indexes.stop
        while low < high:
            middle = (low + high) // 2
            entry = InodeV5(self.image, middle).entry()
            if entry.name == name:
                return entry
            if entry.name < name:
                low = middle + 1
            else:
                high = middle
        return None

    def readlink(self) -> bytes:
        """Return the target of a symbolic link; raise `FormatError`."""
        target = b""
        if self.is_symlink:
            target = self._text(self._target_start, self.record.symlink_size)
        if not target:
            raise CorruptStructure("not a symbolic link, or to nowhere", offset=self.offset)
        return target

    def xattr_entries(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield (offset, full name, value) of each xattr; raise `FormatError`."""
        view = self.image.view
        position = self._xattr_start + XATTR_AREA_HEADER_SIZE
        end = self._xattr_start + self.xattr_size
        while position < end:
            header = view.slice(position, XATTR_PAIR_HEADER_SIZE, "xattr")
            size = int.from_bytes(header, "little")
            start = position + XATTR_PAIR_HEADER_SIZE
            if start + size > end:
                raise OutOfBounds("xattr outside of its area", offset=position, got=size)
            name, divider, value = bytes(view.slice(start, size, "xattr")).partition(b"\0")
            if not name or not divider:
                raise CorruptStructure("xattr without a name", offset=position)
            yield position, name, value
            position = start + size

    def xattrs(self) -> dict[bytes, bytes]:
        """Return all xattrs by full name; raise `FormatError`."""
        return {name: value for _, name, value in self.xattr_entries()}

    def stored_chunks(self) -> Iterator[ChunkInfo]:
        """Yield the chunk infos of a regular file as they are stored."""
        for position in range(self._chunk_start, self._end, CHUNK_INFO_SIZE):
            yield ChunkInfo.parse(self.image.view, position)

    def file_chunks(self) -> Iterator[ChunkInfo]:
        """Yield the chunks of a regular file, which cover it in order; raise `FormatError`."""
        return self.image.file_chunks(self)


def digest_input(inode: InodeV5) -> bytes:
    """Return the bytes whose digest the record promises; raise `FormatError`.

    Devices, FIFOs and sockets promise nothing.
    """
    if inode.is_regular:
        return b"".join(chunk.digest for chunk in inode.stored_chunks())
    if inode.is_dir:
        return b"".join(map(inode.image.stored_digest, inode.child_indexes()))
    return inode.readlink() if inode.is_symlink else b""


def same_inode(name: InodeV5, inode: InodeV5) -> bool:
    """Tell whether the record of a further name says the same as the inode's own.

    Times may differ: each name has that of its tar header.
    """

    def facts(inode: InodeV5) -> tuple[object, ...]:
        record = inode.record
        return (
            record.digest, record.mode, record.uid, record.gid, record.size,
            record.nlink, record.child_count, inode.xattr_size,
        )  # fmt: skip

    return facts(name) == facts(inode) and name.xattrs() == inode.xattrs()
