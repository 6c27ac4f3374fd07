"""On-disk records and constants of EROFS as RAFS v6 uses them (little-endian).

Layout only: no logic, no I/O. Source: Linux `fs/erofs/erofs_fs.h`; spec rafs-v6 section 1.
Each record is declared once and serves reading and writing.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import NamedTuple

from erofs.view import View

SUPERBLOCK_OFFSET = 1024
SUPERBLOCK_MAGIC = 0xE0F5E1E2
FEATURE_COMPAT_CHECKSUM = 0x1
FEATURE_COMPAT_RAFS_V6 = 0x40000000
FEATURE_INCOMPAT_CHUNKED_FILE = 0x4
FEATURE_INCOMPAT_DEVICE_TABLE = 0x8
FEATURE_INCOMPAT_RAFS_V6 = FEATURE_INCOMPAT_CHUNKED_FILE | FEATURE_INCOMPAT_DEVICE_TABLE

SLOT_SIZE = 32
BLOCK_BITS = 12
BLOCK_SIZE = 1 << BLOCK_BITS
MIN_BLOCK_BITS = 9
MAX_BLOCK_BITS = 16

LAYOUT_FLAT_PLAIN = 0
LAYOUT_COMPRESSED_FULL = 1
LAYOUT_FLAT_INLINE = 2
LAYOUT_COMPRESSED_COMPACT = 3
LAYOUT_CHUNK_BASED = 4

CHUNK_FORMAT_BITS_MASK = 0x1F
CHUNK_FORMAT_INDEXES = 0x20
CHUNK_FORMAT_KNOWN = CHUNK_FORMAT_BITS_MASK | CHUNK_FORMAT_INDEXES
NULL_BLOCK = 0xFFFFFFFF
CHUNK_INDEX_SIZE = 8

DEVICE_SLOT_SIZE = 128
DEVICE_TABLE_OFFSET = 1408
MAX_DEVICES = 254

NAME_MAX = 255
SYMLINK_MAX = 4095

FT_REGULAR, FT_DIRECTORY, FT_CHAR, FT_BLOCK, FT_FIFO, FT_SOCKET, FT_SYMLINK = range(1, 8)
FILE_TYPES = {
    0o100000: FT_REGULAR,
    0o040000: FT_DIRECTORY,
    0o020000: FT_CHAR,
    0o060000: FT_BLOCK,
    0o010000: FT_FIFO,
    0o140000: FT_SOCKET,
    0o120000: FT_SYMLINK,
}

XATTR_HEADER_SIZE = 12
# The whole-name prefixes come before the ones that they do not start with, so the
# first match decides.
XATTR_PREFIXES: tuple[tuple[int, bytes], ...] = (
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
)
XATTR_WHOLE_NAMES = frozenset({2, 3})
XATTR_VALUE_MAX = 65535

_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23s")
_INODE_COMPACT = struct.Struct("<HHHHIIIIHHI")
_INODE_EXTENDED = struct.Struct("<HHHHQIIIIQII16s")
# The same without what is reserved, for trees of a million inodes: there is no record in
# between. The time is read with the sign that it has.
INODE_FIELDS = struct.Struct("<HHHHQIIIIqII16x")
pack_inode_into = struct.Struct("<HHHHQIIIIQII16x").pack_into
DIRENT_FIELDS = struct.Struct("<QHBB")
_DIRENT = DIRENT_FIELDS
_XATTR_HEADER = struct.Struct("<IB7s")
_XATTR_ENTRY = struct.Struct("<BBH")
_CHUNK_INDEX = struct.Struct("<HHI")
pack_index_into = _CHUNK_INDEX.pack_into
_DEVICE_SLOT = struct.Struct("<64sII56s")

SUPERBLOCK_SIZE = _SUPERBLOCK.size
INODE_COMPACT_SIZE = _INODE_COMPACT.size
INODE_EXTENDED_SIZE = _INODE_EXTENDED.size
DIRENT_SIZE = _DIRENT.size
XATTR_ENTRY_SIZE = _XATTR_ENTRY.size


class Superblock(NamedTuple):
    """`struct erofs_super_block`: 128 bytes at byte 1024 (spec 1.2)."""

    magic: int = SUPERBLOCK_MAGIC
    checksum: int = 0
    feature_compat: int = FEATURE_COMPAT_RAFS_V6
    blkszbits: int = BLOCK_BITS
    sb_extslots: int = 0
    root_nid: int = 0
    inos: int = 0
    build_time: int = 0
    build_time_nsec: int = 0
    blocks: int = 0
    meta_blkaddr: int = 0
    xattr_blkaddr: int = 0
    uuid: bytes = bytes(16)
    volume_name: bytes = bytes(16)
    feature_incompat: int = FEATURE_INCOMPAT_RAFS_V6
    u1: int = 0
    extra_devices: int = 0
    devt_slotoff: int = DEVICE_TABLE_OFFSET // DEVICE_SLOT_SIZE
    dirblkbits: int = 0
    xattr_prefix_count: int = 0
    xattr_prefix_start: int = 0
    packed_nid: int = 0
    xattr_filter_reserved: int = 0
    reserved: bytes = bytes(23)

    @classmethod
    def parse(cls, view: View, offset: int = SUPERBLOCK_OFFSET) -> Superblock:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_SUPERBLOCK, offset, "EROFS superblock"))

    def pack(self) -> bytes:
        """Encode the record."""
        return _SUPERBLOCK.pack(*self)


class InodeCompact(NamedTuple):
    """`struct erofs_inode_compact`: 32 bytes (spec 1.3)."""

    i_format: int
    i_xattr_icount: int
    i_mode: int
    i_nlink: int
    i_size: int
    reserved: int
    i_u: int
    i_ino: int
    i_uid: int
    i_gid: int
    reserved2: int

    @classmethod
    def parse(cls, view: View, offset: int) -> InodeCompact:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_INODE_COMPACT, offset, "compact inode"))

    def pack(self) -> bytes:
        """Encode the record."""
        return _INODE_COMPACT.pack(*self)


class InodeExtended(NamedTuple):
    """`struct erofs_inode_extended`: 64 bytes (spec 1.3)."""

    i_format: int
    i_xattr_icount: int
    i_mode: int
    reserved: int
    i_size: int
    i_u: int
    i_ino: int
    i_uid: int
    i_gid: int
    i_mtime: int
    i_mtime_nsec: int
    i_nlink: int
    reserved2: bytes = bytes(16)

    @classmethod
    def parse(cls, view: View, offset: int) -> InodeExtended:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_INODE_EXTENDED, offset, "extended inode"))

    def pack(self) -> bytes:
        """Encode the record."""
        return _INODE_EXTENDED.pack(*self)


class Dirent(NamedTuple):
    """`struct erofs_dirent`: 12 bytes; `nameoff` counts from the start of the block."""

    nid: int
    nameoff: int
    file_type: int
    reserved: int = 0

    @classmethod
    def parse(cls, view: View, offset: int) -> Dirent:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_DIRENT, offset, "directory entry"))

    def pack(self) -> bytes:
        """Encode the record."""
        return _DIRENT.pack(*self)


@cache
def _dirents(count: int) -> struct.Struct:
    """Return the format of entries that follow one another; a block has no more than 341."""
    return struct.Struct("<" + "QHBB" * count)


def pack_dirents(fields: list[int]) -> bytes:
    """Encode the directory entries of a block: nid, nameoff, file_type and 0 of each."""
    return _dirents(len(fields) // 4).pack(*fields)


class XattrHeader(NamedTuple):
    """`struct erofs_xattr_ibody_header`: 12 bytes before the entries of an inode."""

    name_filter: int = 0
    shared_count: int = 0
    reserved: bytes = bytes(7)

    @classmethod
    def parse(cls, view: View, offset: int) -> XattrHeader:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_XATTR_HEADER, offset, "xattr header"))

    def pack(self) -> bytes:
        """Encode the record."""
        return _XATTR_HEADER.pack(*self)


class XattrEntry(NamedTuple):
    """`struct erofs_xattr_entry`: 4 bytes before name and value."""

    name_len: int
    name_index: int
    value_size: int

    @classmethod
    def parse(cls, view: View, offset: int) -> XattrEntry:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_XATTR_ENTRY, offset, "xattr entry"))

    def pack(self) -> bytes:
        """Encode the record."""
        return _XATTR_ENTRY.pack(*self)


class ChunkIndex(NamedTuple):
    """One 8-byte entry of a chunk-based file, with RAFS' use of the spare bits (spec 1.5)."""

    advise: int
    device_id: int
    blkaddr: int

    @classmethod
    def parse(cls, view: View, offset: int) -> ChunkIndex:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_CHUNK_INDEX, offset, "chunk index"))

    @classmethod
    def of_chunk(cls, blob_index: int, chunk_index: int, blkaddr: int) -> ChunkIndex:
        """Build the entry for chunk `chunk_index` (24 bits) of blob `blob_index` (0..253)."""
        return cls(
            chunk_index & 0xFFFF, (blob_index + 1) | (chunk_index >> 16 & 0xFF) << 8, blkaddr
        )

    @property
    def blob_index(self) -> int:
        """Position of the blob in the blob table; -1 is the bootstrap itself."""
        return (self.device_id & 0xFF) - 1

    @property
    def chunk_index(self) -> int:
        """Position of the chunk in the blob's compression table."""
        return self.advise | (self.device_id >> 8) << 16

    def pack(self) -> bytes:
        """Encode the record."""
        return _CHUNK_INDEX.pack(*self)


class DeviceSlot(NamedTuple):
    """`struct erofs_deviceslot`: 128 bytes; `blocks` and `mapped_blkaddr` in blocks (spec 1.8)."""

    tag: bytes
    blocks: int
    mapped_blkaddr: int
    reserved: bytes = bytes(56)

    @classmethod
    def parse(cls, view: View, offset: int) -> DeviceSlot:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_DEVICE_SLOT, offset, "device slot"))

    def pack(self) -> bytes:
        """Encode the record."""
        return _DEVICE_SLOT.pack(*self)


def encode_device_number(major: int, minor: int) -> int:
    """Return Linux' "new" 32-bit encoding of a device number (spec 1.3)."""
    return (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & ~0xFF & 0xFFFFF) << 12


def decode_device_number(value: int) -> tuple[int, int]:
    """Return (major, minor) of Linux' "new" 32-bit encoding."""
    return value >> 8 & 0xFFF, (value & 0xFF) | (value >> 12 & 0xFFF00)
