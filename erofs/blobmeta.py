"""The compression table ("CI", `blob.meta`) of a blob: where each chunk is stored (spec 4.4).

Records only: entries of version 1 and 2, and the header behind the table. Whole tables are in
`erofs.citable`, contexts of batches and zran in `erofs.contexts`, the other sections of a
blob in `erofs.framing`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntFlag
from typing import NamedTuple

from erofs.contexts import CONTEXT_SIZE
from erofs.errors import BadMagic, CorruptStructure, OutOfBounds, UnsupportedFeature
from erofs.framing import TAR_HEADER_SIZE
from erofs.rafs import MAX_CHUNKS_PER_BLOB, BlobEntry, BlobFeatures, Compressor
from erofs.view import View

CI_MAGIC = 0xB10BB10B
CI_ENTRY_V1_SIZE = 16
CI_ENTRY_V2_SIZE = 24
CI_HEADER_SIZE = 4096
CI_ALIGNMENT = 4096
MAX_COMPRESSED_OFFSET = 1 << 40
MAX_COMPRESSED_SIZE_V2 = (1 << 24) - 1
DIGEST_SIZE = 32

_CI_ENTRY_V1 = struct.Struct("<QQ")
_CI_ENTRY_V2 = struct.Struct("<QQQ")
_CI_HEADER = struct.Struct("<IIIIQQQQQI4032sI")
_UNCOMPRESSED_OFFSET_MASK = 0xFFFFFFFF000
# No two entries are alike, so a table does not shrink by much; more is a bomb.
_MAX_RATIO = 1024
# Merging takes the mark of an inlined bootstrap out of the blob table (spec 5.4).
_NOT_COMPARED = BlobFeatures.INLINED_FS_META | BlobFeatures.IS_CHUNKDICT_GENERATED


class CompressionInfo(NamedTuple):
    """Version 1 entry of the compression table ("CI"): one chunk, offsets and sizes in bytes."""

    uncompressed_offset: int
    uncompressed_size: int
    compressed_offset: int
    compressed_size: int

    @property
    def is_compressed(self) -> bool:
        """Whether the stored bytes have to be decompressed."""
        return self.compressed_size != self.uncompressed_size

    def pack(self) -> bytes:
        """Encode the entry: sizes are stored minus one, their top four bits apart."""
        return pack_entry_v1(
            self.uncompressed_offset,
            self.uncompressed_size - 1,
            self.compressed_offset,
            self.compressed_size - 1,
        )


def pack_entry_v1(offset: int, usize: int, stored_offset: int, csize: int) -> bytes:
    """Encode an entry of version 1 from the fields of `CompressionInfo`, sizes minus one."""
    return _CI_ENTRY_V1.pack(
        offset | (usize & 0xFFFFF) << 44 | (usize >> 20) << 8,
        stored_offset | (csize & 0xFFFFF) << 44 | (csize >> 20) << 40,
    )


def parse_entries_v1(table: memoryview) -> list[CompressionInfo]:
    """Decode entries of version 1; the length is a multiple of 16 bytes."""
    return [
        CompressionInfo(
            first & _UNCOMPRESSED_OFFSET_MASK,
            (first >> 44 | (first >> 8 & 0xF) << 20) + 1,
            second & 0xFFFFFFFFFF,
            (second >> 44 | (second >> 40 & 0xF) << 20) + 1,
        )
        for first, second in _CI_ENTRY_V1.iter_unpack(table)
    ]


class CiFlags(IntFlag):
    """`flags` of a version 2 entry."""

    COMPRESSED = 0x1
    ZRAN = 0x2
    BATCH = 0x4
    ENCRYPTED = 0x8
    HAS_CRC = 0x10


class CompressionInfoV2(NamedTuple):
    """Version 2 entry, 24 bytes.

    Of a batch or zran chunk `context` is the number of its context, and `data` its place in
    the context's output; `data` is the CRC-32C of others with that flag.
    """

    uncompressed_offset: int
    uncompressed_size: int
    compressed_offset: int
    compressed_size: int
    flags: int
    data: int = 0
    context: int = 0

    @property
    def is_compressed(self) -> bool:
        """Whether the stored bytes have to be decompressed."""
        return bool(self.flags & CiFlags.COMPRESSED)

    @property
    def is_batch(self) -> bool:
        """Whether the chunk is a part of a batch."""
        return bool(self.flags & CiFlags.BATCH)

    @property
    def has_context(self) -> bool:
        """Whether the chunk is a part of what a context describes: a batch, or gzip data."""
        return bool(self.flags & (CiFlags.BATCH | CiFlags.ZRAN))

    def pack(self) -> bytes:
        """Encode the entry; only the uncompressed size is stored minus one."""
        return _CI_ENTRY_V2.pack(
            self.uncompressed_offset // CI_ALIGNMENT
            | (self.uncompressed_size - 1) << 32
            | self.flags << 56,
            self.compressed_offset | self.compressed_size << 40,
            self.data | self.context << 32,
        )


def parse_entries_v2(table: memoryview) -> list[CompressionInfoV2]:
    """Decode entries of version 2; the length is a multiple of 24 bytes."""
    return [
        CompressionInfoV2(
            (first & 0xFFFFFFFF) * CI_ALIGNMENT,
            (first >> 32 & 0xFFFFFF) + 1,
            second & 0xFFFFFFFFFF,
            second >> 40,
            first >> 56,
            third & 0xFFFFFFFF,
            third >> 32,
        )
        for first, second, third in _CI_ENTRY_V2.iter_unpack(table)
    ]


class CompressionTableHeader(NamedTuple):
    """Header of the compression table, 4096 bytes behind it (spec 4.4)."""

    features: int
    ci_compressor: int
    ci_entries: int
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    context_offset: int = 0
    context_size: int = 0
    context_count: int = 0

    @classmethod
    def parse(cls, view: View, offset: int = 0) -> CompressionTableHeader:
        """Decode the header; raise `BadMagic` or `OutOfBounds`."""
        fields = view.unpack(_CI_HEADER, offset, "compression table header")
        for magic, position in ((fields[0], offset), (fields[-1], offset + CI_HEADER_SIZE - 4)):
            if magic != CI_MAGIC:
                raise BadMagic(
                    "not a compression table header",
                    offset=position,
                    expected=f"{CI_MAGIC:#x}",
                    got=f"{magic:#x}",
                )
        return cls._make(fields[1:10])

    def pack(self) -> bytes:
        """Encode the header."""
        return _CI_HEADER.pack(CI_MAGIC, *self, bytes(4032), CI_MAGIC)

    @property
    def entry_size(self) -> int:
        """Bytes of one entry."""
        return CI_ENTRY_V2_SIZE if self.features & BlobFeatures.CHUNK_INFO_V2 else CI_ENTRY_V1_SIZE

    @property
    def entries_size(self) -> int:
        """Bytes of all entries; contexts are behind them."""
        return self.ci_entries * self.entry_size

    def differences(self, entry: BlobEntry) -> Iterator[tuple[str, int, int]]:
        """Yield (name, expected, got) of what the blob table says otherwise (spec 7.1)."""
        pairs = {
            "features": (entry.features & ~_NOT_COMPARED, self.features & ~_NOT_COMPARED),
            "entries": (entry.chunk_count, self.ci_entries),
            "compressor": (entry.ci_compressor, self.ci_compressor),
            "offset": (entry.ci_offset, self.ci_offset),
            "compressed size": (entry.ci_compressed_size, self.ci_compressed_size),
            "uncompressed size": (entry.ci_uncompressed_size, self.ci_uncompressed_size),
        }
        for name, (expected, got) in pairs.items():
            if expected != got:
                yield name, expected, got

    def check(self) -> None:
        """Raise `FormatError` unless the sizes go together, before anything is allocated."""
        features = self.features
        if self.ci_compressor not in Compressor.__members__.values():
            raise UnsupportedFeature("compressor of a compression table", got=self.ci_compressor)
        if self.ci_entries > MAX_CHUNKS_PER_BLOB:
            raise OutOfBounds("too many chunks in a compression table", got=self.ci_entries)
        size, stored = self.ci_uncompressed_size, self.ci_compressed_size
        if stored > size or size > stored * _MAX_RATIO:
            raise OutOfBounds("compression table of impossible sizes", got=f"{stored}/{size}")
        with_contexts = features & (BlobFeatures.BATCH | BlobFeatures.ZRAN)
        extra = with_contexts or features & BlobFeatures.ENCRYPTED
        if extra and not features & BlobFeatures.CHUNK_INFO_V2:
            raise CorruptStructure("batch, zran or encrypted table that is not of version 2")
        if with_contexts == BlobFeatures.BATCH | BlobFeatures.ZRAN:
            raise CorruptStructure("table of batches and of zran at once", got=f"{features:#x}")
        if size < self.entries_size or (not extra and size != self.entries_size):
            raise OutOfBounds(
                "compression table of the wrong length",
                expected=f"{self.entries_size} bytes",
                got=size,
            )
        if with_contexts:
            self._check_contexts()

    def _check_contexts(self) -> None:
        end = self.context_offset + self.context_size
        if self.context_offset != self.entries_size or end > self.ci_uncompressed_size:
            raise OutOfBounds(
                "contexts at an impossible place of the compression table",
                offset=self.context_offset,
                expected=f"{self.entries_size} to {self.ci_uncompressed_size}",
                got=end,
            )
        if (
            self.context_count > self.ci_entries
            or self.context_count * CONTEXT_SIZE > self.context_size
        ):
            raise OutOfBounds("too many contexts", got=self.context_count)


def chunk_data_size(entry: BlobEntry) -> int:
    """Return the length of a blob's chunk data as readers derive it, in bytes (spec 4.7)."""
    features = entry.features
    if features & BlobFeatures.SEPARATE or not features & BlobFeatures.CAP_TAR_TOC:
        return entry.compressed_size
    if features & (BlobFeatures.TARFS | BlobFeatures.EXTERNAL):
        return entry.compressed_size
    # v5 has no table: there the data ends where the blob does.
    end = entry.ci_offset if entry.ci_uncompressed_size else entry.compressed_size
    return end - (TAR_HEADER_SIZE if features & BlobFeatures.HAS_TAR_HEADER else 0)


def parse_digests(data: bytes | memoryview, count: int) -> list[bytes]:
    """Return the chunk digests of section `blob.digest`, by index; raise `OutOfBounds`."""
    if len(data) != count * DIGEST_SIZE:
        raise OutOfBounds(
            "digest array of the wrong length",
            expected=f"{count * DIGEST_SIZE} bytes",
            got=len(data),
        )
    return [bytes(data[start : start + DIGEST_SIZE]) for start in range(0, len(data), DIGEST_SIZE)]
