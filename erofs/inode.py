"""A view of one EROFS inode: attributes, directory entries, xattrs, flat data, chunk indexes.

Decoded when asked for; every place that the image names is checked before it is used.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from erofs import layout
from erofs.base import DirectoryEntry, InodeBase
from erofs.errors import CorruptStructure, OutOfBounds, UnsupportedFeature
from erofs.layout import ChunkIndex, Dirent, InodeCompact, InodeExtended, XattrEntry, XattrHeader
from erofs.view import View, align_up

if TYPE_CHECKING:
    from erofs.rafs import ChunkInfo
    from erofs.reader import Image

__all__ = ["DirectoryEntry", "Inode"]

_FLAT = (layout.LAYOUT_FLAT_PLAIN, layout.LAYOUT_FLAT_INLINE)
_XATTR_NAMES = dict(layout.XATTR_PREFIXES)


class Inode(InodeBase):
    """A view of one inode; `mtime` in signed seconds, `rdev` in Linux' "new" encoding."""

    __slots__ = (
        "gid", "image", "ino", "layout", "mode", "mtime", "mtime_nsec", "nid", "nlink",
        "offset", "record_size", "size", "uid", "union", "xattr_size",
    )  # fmt: skip

    def __init__(self, image: Image, nid: int) -> None:
        view = image.view
        self.image = image
        self.nid = nid
        self.offset = offset = image.inode_offset(nid)
        format_bits = view.slice(offset, 2, "inode")[0] | view.data[offset + 1] << 8
        if format_bits >> 4:
            raise UnsupportedFeature(
                "inode format with unknown bits", offset=offset, got=f"{format_bits:#x}"
            )
        self.layout = format_bits >> 1 & 7
        if format_bits & 1:
            extended = InodeExtended.parse(view, offset)
            self.record_size = layout.INODE_EXTENDED_SIZE
            self.mtime = _signed(extended.i_mtime)
            self.mtime_nsec = extended.i_mtime_nsec
            icount = extended.i_xattr_icount
            self.mode, self.size, self.union = extended.i_mode, extended.i_size, extended.i_u
            self.ino, self.nlink = extended.i_ino, extended.i_nlink
            self.uid, self.gid = extended.i_uid, extended.i_gid
        else:
            compact = InodeCompact.parse(view, offset)
            self.record_size = layout.INODE_COMPACT_SIZE
            self.mtime = _signed(image.superblock.build_time)
            self.mtime_nsec = image.superblock.build_time_nsec
            icount = compact.i_xattr_icount
            self.mode, self.size, self.union = compact.i_mode, compact.i_size, compact.i_u
            self.ino, self.nlink = compact.i_ino, compact.i_nlink
            self.uid, self.gid = compact.i_uid, compact.i_gid
        self.xattr_size = layout.XATTR_HEADER_SIZE + 4 * (icount - 1) if icount else 0
        self._check()

    def _check(self) -> None:
        kind = stat.S_IFMT(self.mode)
        if kind not in layout.FILE_TYPES:
            raise CorruptStructure(
                "inode of unknown type", offset=self.offset, got=f"mode {self.mode:o}"
            )
        if self.size >> 63:
            raise CorruptStructure("negative file size", offset=self.offset, got=self.size)
        if self.layout not in (*_FLAT, layout.LAYOUT_CHUNK_BASED):
            raise UnsupportedFeature(
                "compressed EROFS inode", offset=self.offset, got=f"layout {self.layout}"
            )
        if kind in (stat.S_IFDIR, stat.S_IFLNK) and self.layout not in _FLAT:
            raise CorruptStructure("directory or symlink in chunks", offset=self.offset)
        self.image.view.check(self.body_offset, 0, "inode body")

    @property
    def body_offset(self) -> int:
        """Where inline data or chunk indexes begin, before their alignment."""
        return self.offset + self.record_size + self.xattr_size

    @property
    def rdev(self) -> int:
        """Device number of a character or block device, 0 for all else."""
        return self.union if stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode) else 0

    @property
    def sectors(self) -> int:
        """What stat calls blocks, in units of 512 bytes."""
        return -(-self.size // 512)

    @property
    def claimed_bytes(self) -> int:
        """Bytes of the image that are a directory's alone."""
        return self.size if self.is_dir else 0

    def flat_parts(self) -> list[tuple[int, int]]:
        """Return (offset, length) of the pieces of a flat inode's data, in order."""
        if self.layout not in _FLAT:
            raise UnsupportedFeature("data is not flat", offset=self.offset)
        view, block_size = self.image.view, self.image.block_size
        tail = self.size % block_size if self.layout == layout.LAYOUT_FLAT_INLINE else 0
        parts = []
        if self.size - tail:
            start = self.union * block_size
            view.check(start, self.size - tail, "flat data")
            parts.append((start, self.size - tail))
        if tail:
            if self.body_offset % block_size + tail > block_size:
                raise CorruptStructure("inline data crosses a block", offset=self.body_offset)
            view.check(self.body_offset, tail, "inline data")
            parts.append((self.body_offset, tail))
        return parts

    def flat_data(self) -> bytes:
        """Return the whole content of a flat inode; raise `FormatError`."""
        data = self.image.view.data
        return b"".join(data[start : start + length] for start, length in self.flat_parts())

    def readlink(self) -> bytes:
        """Return the target of a symbolic link; raise `FormatError`."""
        if not self.is_symlink:
            raise CorruptStructure("not a symbolic link", offset=self.offset)
        if not 0 < self.size <= layout.BLOCK_SIZE:
            raise CorruptStructure(
                "impossible length of a symlink", offset=self.offset, got=self.size
            )
        return self.flat_data()

    def blocks(self) -> Iterator[tuple[int, memoryview]]:
        """Yield (offset, bytes) of each block of a directory."""
        data, block_size = self.image.view.data, self.image.block_size
        for start, length in self.flat_parts():
            for position in range(start, start + length, block_size):
                end = min(position + block_size, start + length)
                yield position, data[position:end]

    def entries(self) -> Iterator[DirectoryEntry]:
        """Yield the entries of a directory, `.` and `..` included; raise `FormatError`."""
        if not self.is_dir:
            raise CorruptStructure("not a directory", offset=self.offset)
        for offset, block in self.blocks():
            yield from _parse_directory_block(block, offset)

    def lookup(self, name: bytes) -> DirectoryEntry | None:
        """Return the entry called `name`, if there is one; raise `FormatError`."""
        if not self.is_dir:
            return None
        found: tuple[int, memoryview] | None = None
        # Names ascend across blocks, so the last block that does not begin behind the name has it.
        blocks = list(self.blocks())
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            first = next(_parse_directory_block(blocks[middle][1], blocks[middle][0]), None)
            if first is not None and first.name <= name:
                found, low = blocks[middle], middle + 1
            else:
                high = middle
        if found is None:
            return None
        entries = _parse_directory_block(found[1], found[0])
        return next((entry for entry in entries if entry.name == name), None)

    def xattr_entries(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield (offset, full name, value) of each inline xattr; raise `FormatError`."""
        if not self.xattr_size:
            return
        view = self.image.view
        position = self.offset + self.record_size
        end = position + self.xattr_size
        header = XattrHeader.parse(view, position)
        if header.shared_count:
            raise UnsupportedFeature("shared xattrs", offset=position)
        if self.xattr_size == layout.XATTR_HEADER_SIZE:
            raise CorruptStructure("xattr area without an entry", offset=position)
        position += layout.XATTR_HEADER_SIZE
        while position < end:
            entry = XattrEntry.parse(view, position)
            size = layout.XATTR_ENTRY_SIZE + entry.name_len + entry.value_size
            if position + size > end:
                raise OutOfBounds("xattr entry outside of its area", offset=position, got=size)
            prefix = _XATTR_NAMES.get(entry.name_index)
            if prefix is None:
                raise CorruptStructure(
                    "unknown xattr name index", offset=position, got=entry.name_index
                )
            body = view.slice(position + layout.XATTR_ENTRY_SIZE, size - 4, "xattr entry")
            name = prefix + bytes(body[: entry.name_len])
            yield position, name, bytes(body[entry.name_len :])
            position += align_up(size, 4)

    def xattrs(self) -> dict[bytes, bytes]:
        """Return all xattrs by full name; raise `FormatError`."""
        return {name: value for _, name, value in self.xattr_entries()}

    @property
    def chunk_size(self) -> int:
        """The chunk size that the kernel uses for this file, in bytes."""
        self._check_chunk_format()
        return self.image.block_size << (self.union & layout.CHUNK_FORMAT_BITS_MASK)

    def _check_chunk_format(self) -> None:
        if self.layout != layout.LAYOUT_CHUNK_BASED:
            raise UnsupportedFeature("file is not in chunks", offset=self.offset)
        if self.union & 0xFFFF & ~layout.CHUNK_FORMAT_KNOWN:
            raise UnsupportedFeature(
                "unknown chunk format", offset=self.offset, got=f"{self.union & 0xFFFF:#x}"
            )
        if not self.union & layout.CHUNK_FORMAT_INDEXES:
            raise UnsupportedFeature("chunk map without device ids", offset=self.offset)

    def index_area(self) -> tuple[int, int]:
        """Return (offset, number) of the chunk indexes; raise `FormatError`."""
        self._check_chunk_format()
        start = align_up(self.body_offset, layout.CHUNK_INDEX_SIZE)
        count = -(-self.size // self.image.index_granularity(self))
        self.image.view.check(start, count * layout.CHUNK_INDEX_SIZE, "chunk indexes")
        return start, count

    def chunk_indexes(self) -> Iterator[ChunkIndex]:
        """Yield the chunk indexes of a regular file; raise `FormatError`."""
        start, count = self.index_area()
        for position in range(start, start + count * 8, layout.CHUNK_INDEX_SIZE):
            yield ChunkIndex.parse(self.image.view, position)

    def file_chunks(self) -> Iterator[ChunkInfo]:
        """Yield the chunks of a regular file of a bootstrap, in order; raise `FormatError`."""
        return self.image.file_chunks(self)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _parse_directory_block(block: memoryview, offset: int) -> Iterator[DirectoryEntry]:
    view = View(block)
    first = Dirent.parse(view, 0)
    count, rest = divmod(first.nameoff, layout.DIRENT_SIZE)
    if rest or not count or first.nameoff > len(block):
        raise CorruptStructure("impossible start of the names", offset=offset, got=first.nameoff)
    current = first
    for number in range(count):
        last = number + 1 == count
        following = None if last else Dirent.parse(view, (number + 1) * layout.DIRENT_SIZE)
        end = len(block) if following is None else following.nameoff
        if not first.nameoff <= current.nameoff <= end <= len(block):
            raise CorruptStructure("names of a directory out of order", offset=offset, got=end)
        name = bytes(block[current.nameoff : end])
        if following is None:
            name = name.split(b"\0", 1)[0]
        if not 0 < len(name) <= layout.NAME_MAX or b"/" in name or b"\0" in name:
            raise CorruptStructure("impossible file name", offset=offset, got=name[:64])
        yield DirectoryEntry(name, current.nid, current.file_type)
        if following is not None:
            current = following
