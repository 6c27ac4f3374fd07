"""On-disk records and constants of RAFS v5 (little-endian). Layout only.

Chunk infos are `erofs.rafs.ChunkInfo`, and the flags of the superblock `SuperFlags`: both
versions share them. Everything lies on multiples of 8 bytes.
"""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import NamedTuple

from erofs.view import View

MAGIC = 0x52414653
VERSION = 0x500
SUPERBLOCK_SIZE = 8192
ALIGNMENT = 8
ROOT_INO = 1

INDEX_SIZE = 4
DIGEST_SIZE = 32
INODE_SIZE = 128
EXTENDED_BLOB_SIZE = 64
XATTR_AREA_HEADER_SIZE = 8
XATTR_PAIR_HEADER_SIZE = 4
# The size field counts the padding in the earliest images.
STORED_NAME_MAX = 256
BLOB_ID_MAX = 255

_MAGIC_AND_VERSION = struct.Struct("<II")
_SUPERBLOCK = struct.Struct("<IIIIQQQQQIIIIQ8112x")
_EXTENDED_BLOB = struct.Struct("<IIQQ40s")
_INODE = struct.Struct("<32sQQIIIIQQQIIIHHIIq8s")
_EARLY_INODE = struct.Struct("<32sQQIIQQQQIIHH28s")
_BLOB_READAHEAD = struct.Struct("<II")


class InodeFlags(IntFlag):
    """`flags` of an inode."""

    SYMLINK = 0x1
    HARDLINK = 0x2
    XATTR = 0x4
    HAS_HOLE = 0x8


class SuperblockV5(NamedTuple):
    """The first 8192 bytes, of which 80 are in use; offsets and sizes in bytes.

    `inodes_count` counts inodes, `inode_table_entries` names; `blob_table_size` is in
    bytes. `block_size` is the size of chunks.
    """

    magic: int
    version: int
    sb_size: int
    block_size: int
    flags: int
    inodes_count: int
    inode_table_offset: int
    prefetch_table_offset: int
    blob_table_offset: int
    inode_table_entries: int
    prefetch_table_entries: int
    blob_table_size: int
    extended_blob_table_entries: int
    extended_blob_table_offset: int

    @classmethod
    def parse(cls, view: View) -> SuperblockV5:
        """Decode the superblock; raise `OutOfBounds`."""
        return cls._make(view.unpack(_SUPERBLOCK, 0, "RAFS v5 superblock"))

    def pack(self) -> bytes:
        """Encode the superblock."""
        return _SUPERBLOCK.pack(*self)


class ExtendedBlob(NamedTuple):
    """Entry of the extended blob table, 64 bytes: what the blob table itself does not say."""

    chunk_count: int
    features: int
    uncompressed_size: int
    compressed_size: int
    reserved: bytes = bytes(40)

    @classmethod
    def parse(cls, view: View, offset: int) -> ExtendedBlob:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_EXTENDED_BLOB, offset, "extended blob table entry"))

    def pack(self) -> bytes:
        """Encode the record."""
        return _EXTENDED_BLOB.pack(*self)


class InodeRecord(NamedTuple):
    """One name and its inode, 128 bytes, followed by name, target, xattrs and chunk infos.

    `ino` is the index of the first name of the inode. For a directory `child_index` and
    `child_count` are the indexes of what is in it; a file has `child_count` chunk infos.
    """

    digest: bytes
    parent: int
    ino: int
    uid: int
    gid: int
    projid: int
    mode: int
    size: int
    blocks: int
    flags: int
    nlink: int
    child_index: int
    child_count: int
    name_size: int
    symlink_size: int
    rdev: int = 0
    mtime_nsec: int = 0
    mtime: int = 0
    reserved: bytes = bytes(8)

    @classmethod
    def parse(cls, view: View, offset: int) -> InodeRecord:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_INODE, offset, "inode"))

    def pack(self) -> bytes:
        """Encode the record."""
        return _INODE.pack(*self)


class EarlyInodeRecord(NamedTuple):
    """The inode of images from before the format was published: no owner, no time, no device.

    Names and targets are padded with zeros, which their sizes count. Chunk infos have no
    index there. The layout was found in a published image; all its inode digests agree.
    """

    digest: bytes
    parent: int
    ino: int
    projid: int
    mode: int
    size: int
    nlink: int
    blocks: int
    flags: int
    child_index: int
    child_count: int
    name_size: int
    symlink_size: int
    reserved: bytes = bytes(28)

    @classmethod
    def parse(cls, view: View, offset: int) -> EarlyInodeRecord:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_EARLY_INODE, offset, "inode"))

    def pack(self) -> bytes:
        """Encode the record."""
        return _EARLY_INODE.pack(*self)

    def current(self) -> InodeRecord:
        """Return the same in today's form, owned by root."""
        return InodeRecord(
            self.digest, self.parent, self.ino, 0, 0, self.projid, self.mode, self.size,
            self.blocks, self.flags, self.nlink, self.child_index, self.child_count,
            self.name_size, self.symlink_size,
        )  # fmt: skip


class BlobName(NamedTuple):
    """Entry of the blob table: what to read ahead of a blob, in bytes, and its id.

    Entries have no fixed length: a zero byte divides them.
    """

    readahead_offset: int
    readahead_size: int
    blob_id: bytes


def is_v5(view: View) -> bool:
    """Tell by the first 8 bytes whether this is RAFS v5."""
    if view.length < _MAGIC_AND_VERSION.size:
        return False
    return view.unpack(_MAGIC_AND_VERSION, 0, "magic") == (MAGIC, VERSION)


def parse_blob_table(table: memoryview) -> list[BlobName]:
    """Decode the blob table; up to 8 bytes at its end are padding."""
    data = bytes(table)
    names = []
    position = 0
    while len(data) - position > _BLOB_READAHEAD.size:
        offset, size = _BLOB_READAHEAD.unpack_from(data, position)
        start = position + _BLOB_READAHEAD.size
        end = data.find(b"\0", start)
        end = len(data) if end < 0 else end
        names.append(BlobName(offset, size, data[start:end]))
        position = end + 1
    return names


def pack_blob_table(names: list[BlobName]) -> bytes:
    """Encode the blob table, with padding."""
    entries = (_BLOB_READAHEAD.pack(name[0], name[1]) + name.blob_id for name in names)
    data = b"\0".join(entries)
    return data + bytes(-len(data) % ALIGNMENT)
