"""On-disk records and constants that RAFS v6 adds to EROFS (little-endian).

Layout only. Source: spec rafs-v6 section 2 and 4.2.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from functools import partial
from typing import NamedTuple

from erofs.errors import CorruptStructure
from erofs.view import View

EXTENDED_SUPERBLOCK_OFFSET = 1152
BLOB_ENTRY_SIZE = 256
CHUNK_INFO_SIZE = 80
PREFETCH_ENTRY_SIZE = 4

MIN_CHUNK_SIZE = 0x1000
MAX_CHUNK_SIZE = 0x1000000
DEFAULT_CHUNK_SIZE = 0x100000
MAX_CHUNKS_PER_BLOB = 1 << 24
MAX_COMPRESSED_SIZE = 1 << 40
MAX_UNCOMPRESSED_SIZE = 1 << 44

# Id inside a bootstrap that is embedded in its own blob: the real one is the file's name.
INLINED_BLOB_ID = b"x" * 64

_EXTENDED_SUPERBLOCK = struct.Struct("<QQIIQQQII200s")
_BLOB_ENTRY = struct.Struct("<64sIIIIIIQQIIQQQ32s32sQ8sI36s")
_CHUNK_INFO = struct.Struct("<32sIIIIQQQII")
# Digest, and the other fields of `ChunkInfo`, into a buffer at an offset.
pack_chunk_into = _CHUNK_INFO.pack_into


class SuperFlags(IntFlag):
    """`flags` of the extended superblock (spec 2.3); the order is the real tools' print order."""

    COMPRESSION_NONE = 0x1
    COMPRESSION_LZ4 = 0x2
    HASH_BLAKE3 = 0x4
    HASH_SHA256 = 0x8
    EXPLICIT_UID_GID = 0x10
    HAS_XATTR = 0x20
    COMPRESSION_GZIP = 0x40
    COMPRESSION_ZSTD = 0x80
    INLINED_CHUNK_DIGEST = 0x100
    TARTFS_MODE = 0x200
    ENCRYPTION_NONE = 0x01000000
    ENCRYPTION_ASE_128_XTS = 0x02000000


SUPER_FLAGS_COMPRESSION = (
    SuperFlags.COMPRESSION_NONE
    | SuperFlags.COMPRESSION_LZ4
    | SuperFlags.COMPRESSION_GZIP
    | SuperFlags.COMPRESSION_ZSTD
)
SUPER_FLAGS_HASH = SuperFlags.HASH_BLAKE3 | SuperFlags.HASH_SHA256
SUPER_FLAGS_RESERVED = 0xFC000000


class BlobFeatures(IntFlag):
    """`features` of a blob table entry and of a compression table header (spec 4.2)."""

    ALIGNED = 0x1
    INLINED_FS_META = 0x2
    CHUNK_INFO_V2 = 0x4
    ZRAN = 0x8
    SEPARATE = 0x10
    INLINED_CHUNK_DIGEST = 0x20
    TARFS = 0x40
    BATCH = 0x80
    ENCRYPTED = 0x100
    IS_CHUNKDICT_GENERATED = 0x200
    IS_SEPARATED_WITH_PREFETCH_FILES = 0x400
    EXTERNAL = 0x800
    HAS_TAR_HEADER = 0x10000000
    HAS_TOC = 0x20000000
    CAP_TAR_TOC = 0x40000000


BLOB_FEATURES_INCOMPATIBLE = 0x8000F000


class Compressor(IntEnum):
    """Compression algorithm of chunks and of a compression table."""

    NONE = 0
    LZ4_BLOCK = 1
    GZIP = 2
    ZSTD = 3


class Digester(IntEnum):
    """Digest algorithm of chunks."""

    BLAKE3 = 0
    SHA256 = 1


class Cipher(IntEnum):
    """Encryption of chunks that a bootstrap may name."""

    NONE = 0
    AES_128_XTS = 1


COMPRESSOR_FLAGS = {
    Compressor.NONE: SuperFlags.COMPRESSION_NONE,
    Compressor.LZ4_BLOCK: SuperFlags.COMPRESSION_LZ4,
    Compressor.GZIP: SuperFlags.COMPRESSION_GZIP,
    Compressor.ZSTD: SuperFlags.COMPRESSION_ZSTD,
}
DIGESTER_FLAGS = {
    Digester.BLAKE3: SuperFlags.HASH_BLAKE3,
    Digester.SHA256: SuperFlags.HASH_SHA256,
}


class ChunkFlags(IntFlag):
    """`flags` of a chunk info table entry (spec 2.5)."""

    COMPRESSED = 0x1
    HOLE = 0x2
    ENCRYPTED = 0x4
    BATCH = 0x8
    HAS_CRC = 0x10


class ExtendedSuperblock(NamedTuple):
    """RAFS' own superblock: 256 bytes at byte 1152; sizes in bytes (spec 2.2)."""

    flags: int
    blob_table_offset: int
    blob_table_size: int
    chunk_size: int
    chunk_table_offset: int
    chunk_table_size: int
    prefetch_table_offset: int = 0
    prefetch_table_size: int = 0
    padding: int = 0
    reserved: bytes = bytes(200)

    @classmethod
    def parse(cls, view: View, offset: int = EXTENDED_SUPERBLOCK_OFFSET) -> ExtendedSuperblock:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_EXTENDED_SUPERBLOCK, offset, "RAFS extended superblock"))

    def pack(self) -> bytes:
        """Encode the record."""
        return _EXTENDED_SUPERBLOCK.pack(*self)


class BlobEntry(NamedTuple):
    """Blob table entry, 256 bytes; `ci_*` place the compression table (spec 2.4)."""

    blob_id: bytes
    blob_index: int
    chunk_size: int
    chunk_count: int
    compressor: int
    digester: int
    features: int
    compressed_size: int
    uncompressed_size: int
    blob_toc_size: int
    ci_compressor: int
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    blob_toc_digest: bytes = bytes(32)
    blob_meta_digest: bytes = bytes(32)
    blob_meta_size: int = 0
    cipher_iv: bytes = bytes(8)
    cipher: int = 0
    reserved: bytes = bytes(36)

    @classmethod
    def parse(cls, view: View, offset: int) -> BlobEntry:
        """Decode the record at `offset`, the id without padding; raise `OutOfBounds`."""
        fields = view.unpack(_BLOB_ENTRY, offset, "blob table entry")
        return cls(fields[0].rstrip(b"\0"), *fields[1:])

    def pack(self) -> bytes:
        """Encode the record."""
        return _BLOB_ENTRY.pack(*self)

    @property
    def id(self) -> str:
        """The blob id as text; bytes that are not ASCII are escaped."""
        return self.blob_id.decode("ascii", "backslashreplace")

    def encryption(self) -> tuple[bytes, bytes] | None:
        """Return key (32 bytes) and IV (16) of an encrypted blob, None for others.

        The entry keeps them in fields that mean other things elsewhere (spec 2.4, 4.8). They
        are secrets: not for messages.

        Raises:
            CorruptStructure: the halves of the key are equal, which XTS does not permit.
        """
        if self.cipher == Cipher.NONE:
            return None
        key = self.blob_meta_digest
        if key[:16] == key[16:]:
            raise CorruptStructure("the halves of a blob's key are equal", blob=self.id)
        return key, self.blob_meta_size.to_bytes(8, "little") + self.cipher_iv


# An operation of an enumeration takes ten times as long as one of numbers.
_COMPRESSED = int(ChunkFlags.COMPRESSED)


class ChunkInfo(NamedTuple):
    """Chunk info table entry, 80 bytes: where a chunk is and what it must be (spec 2.5)."""

    digest: bytes
    blob_index: int
    flags: int
    compressed_size: int
    uncompressed_size: int
    compressed_offset: int
    uncompressed_offset: int
    file_offset: int
    chunk_index: int
    crc32c: int

    @classmethod
    def parse(cls, view: View, offset: int) -> ChunkInfo:
        """Decode the record at `offset`; raise `OutOfBounds`."""
        return cls._make(view.unpack(_CHUNK_INFO, offset, "chunk info"))

    def pack(self) -> bytes:
        """Encode the record."""
        return _CHUNK_INFO.pack(*self)

    @property
    def is_compressed(self) -> bool:
        """Whether the stored bytes have to be decompressed."""
        return bool(self.flags & _COMPRESSED)


def iter_chunk_infos(table: memoryview) -> list[ChunkInfo]:
    """Decode a whole chunk info table whose length is a multiple of 80 bytes."""
    # Not `_make`, a call of Python for each of thousands that a mount waits for.
    make = partial(tuple.__new__, ChunkInfo)
    return list(map(make, _CHUNK_INFO.iter_unpack(table)))
