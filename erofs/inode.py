"""A view of one EROFS inode: attributes, directory entries, xattrs, flat data, chunk indexes.

Decoded when asked for; every place that the image names is checked before it is used.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from erofs import layout
from erofs.base import NO_XATTRS, DirectoryEntry, InodeBase
from erofs.errors import CorruptStructure, OutOfBounds, UnsupportedFeature
from erofs.layout import ChunkIndex, Dirent, InodeCompact, XattrEntry, XattrHeader
from erofs.view import View, align_up

if TYPE_CHECKING:
    from erofs.rafs import ChunkInfo
    from erofs.reader import Image

__all__ = ["DirectoryEntry", "Inode", "index_key"]

_FLAT = (layout.LAYOUT_FLAT_PLAIN, layout.LAYOUT_FLAT_INLINE)
_XATTR_NAMES = dict(layout.XATTR_PREFIXES)
_KIND_MASK = stat.S_IFMT(0xFFFF)
# In walks over a million inodes records in between would take longer than all else.
_INODE_FIELDS = layout.INODE_FIELDS.unpack_from
_DIRENT = layout.DIRENT_FIELDS
_INDEX = struct.Struct("<II")


class Inode(InodeBase):
    """A view of one inode; `mtime` in signed seconds, `rdev` in Linux' "new" encoding."""

    __slots__ = (
        "gid", "image", "ino", "layout", "mode", "mtime", "mtime_nsec", "nid", "nlink",
        "offset", "record_size", "size", "uid", "union", "xattr_size",
    )  # fmt: skip

    union: int

    def __init__(self, image: Image, nid: int) -> None:
        view = image.view
        self.image = image
        self.nid = nid
        self.offset = offset = image.inode_base + layout.SLOT_SIZE * nid
        if not 0 <= offset <= view.length - layout.INODE_EXTENDED_SIZE or not view.data[offset] & 1:
            self._decode_compact()
            return
        (
            format_bits, icount, self.mode, _, self.size, self.union, self.ino,
            self.uid, self.gid, self.mtime, self.mtime_nsec, self.nlink,
        ) = _INODE_FIELDS(view.data, offset)  # fmt: skip
        self.record_size = layout.INODE_EXTENDED_SIZE
        self._finish(format_bits, icount)

    def _decode_compact(self) -> None:
        """Decode a short record, or raise for one of either kind that is not all there."""
        view, offset, superblock = self.image.view, self.offset, self.image.superblock
        format_bits = view.slice(offset, 2, "inode")[0] | view.data[offset + 1] << 8
        _require_known(format_bits, offset)
        if format_bits & 1:
            view.check(offset, layout.INODE_EXTENDED_SIZE, "extended inode")
        compact = InodeCompact.parse(view, offset)
        self.record_size = layout.INODE_COMPACT_SIZE
        self.mtime = _signed(superblock.build_time)
        self.mtime_nsec = superblock.build_time_nsec
        self.mode, self.size, self.union = compact.i_mode, compact.i_size, compact.i_u
        self.ino, self.nlink = compact.i_ino, compact.i_nlink
        self.uid, self.gid = compact.i_uid, compact.i_gid
        self._finish(format_bits, compact.i_xattr_icount)

    def _finish(self, format_bits: int, icount: int) -> None:
        """Check what was decoded, and take what follows from it."""
        if format_bits >> 4:
            _require_known(format_bits, self.offset)
        self.layout = data_layout = format_bits >> 1 & 7
        self.xattr_size = layout.XATTR_HEADER_SIZE + 4 * (icount - 1) if icount else 0
        kind = self.mode & _KIND_MASK
        if kind not in layout.FILE_TYPES:
            raise CorruptStructure(
                "inode of unknown type", offset=self.offset, got=f"mode {self.mode:o}"
            )
        if self.size >> 63:
            raise CorruptStructure("negative file size", offset=self.offset, got=self.size)
        if data_layout != layout.LAYOUT_CHUNK_BASED:
            if data_layout not in _FLAT:
                raise UnsupportedFeature(
                    "compressed EROFS inode", offset=self.offset, got=f"layout {data_layout}"
                )
        elif kind in (stat.S_IFDIR, stat.S_IFLNK):
            raise CorruptStructure("directory or symlink in chunks", offset=self.offset)
        if self.xattr_size:
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

    def xattrs(self) -> Mapping[bytes, bytes]:
        """Return all xattrs by full name; raise `FormatError`."""
        if not self.xattr_size:
            return NO_XATTRS
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

    def raw_indexes(self) -> Iterator[tuple[int, int]]:
        """Yield key and block of each chunk index; see `index_key`; raise `FormatError`."""
        start, count = self.index_area()
        return _INDEX.iter_unpack(
            self.image.view.data[start : start + count * layout.CHUNK_INDEX_SIZE]
        )

    def file_chunks(self) -> Iterator[ChunkInfo]:
        """Yield the chunks of a regular file of a bootstrap, in order; raise `FormatError`."""
        return self.image.file_chunks(self)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _require_known(format_bits: int, offset: int) -> None:
    if format_bits >> 4:
        raise UnsupportedFeature(
            "inode format with unknown bits", offset=offset, got=f"{format_bits:#x}"
        )


def index_key(blob_index: int, chunk_index: int) -> int:
    """Return what `Inode.raw_indexes` has for a chunk: an index without its block, one number."""
    return chunk_index & 0xFFFF | (blob_index + 1) << 16 | (chunk_index >> 16 & 0xFF) << 24


def _parse_directory_block(block: memoryview, offset: int) -> Iterator[DirectoryEntry]:
    names_start = Dirent.parse(View(block), 0).nameoff
    count, rest = divmod(names_start, layout.DIRENT_SIZE)
    if rest or not count or names_start > len(block):
        raise CorruptStructure("impossible start of the names", offset=offset, got=names_start)
    data = block.tobytes()
    records = _DIRENT.iter_unpack(block[:names_start])
    nid, start, file_type, _ = next(records)
    for next_nid, end, next_type, _ in records:
        if not names_start <= start <= end <= len(data):
            raise CorruptStructure("names of a directory out of order", offset=offset, got=end)
        name = data[start:end]
        if not 0 < len(name) <= layout.NAME_MAX or b"/" in name or b"\0" in name:
            raise CorruptStructure("impossible file name", offset=offset, got=name[:64])
        yield DirectoryEntry(name, nid, file_type)
        nid, start, file_type = next_nid, end, next_type
    if not names_start <= start <= len(data):
        raise CorruptStructure("names of a directory out of order", offset=offset, got=len(data))
    name = data[start:].split(b"\0", 1)[0]
    if not 0 < len(name) <= layout.NAME_MAX or b"/" in name:
        raise CorruptStructure("impossible file name", offset=offset, got=name[:64])
    yield DirectoryEntry(name, nid, file_type)
