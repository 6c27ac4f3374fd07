"""Whole compression tables, decoded and checked, as blobs and caches hold them (spec 4.4, 7.1).

Pure: bytes in, values out. The records are in `erofs.blobmeta`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from erofs import codec
from erofs.blobmeta import (
    CI_ALIGNMENT,
    CI_HEADER_SIZE,
    CiFlags,
    CompressionInfo,
    CompressionInfoV2,
    CompressionTableHeader,
    parse_entries_v1,
    parse_entries_v2,
)
from erofs.contexts import BatchContext, ZranContext, parse_batches, parse_zran
from erofs.errors import (
    CorruptStructure,
    IntegrityError,
    OutOfBounds,
    UnsupportedFeature,
    error_context,
)
from erofs.rafs import MAX_CHUNK_SIZE, BlobFeatures, ChunkInfo, Compressor
from erofs.view import View, align_up

__all__ = [
    "CompressionTable",
    "cached_size",
    "decompress_table",
    "pack_cached",
    "parse_cached",
    "parse_table",
]

_Entries = Sequence[CompressionInfo | CompressionInfoV2]


class CompressionTable(NamedTuple):
    """A whole table: entries by chunk index, and the contexts that they name."""

    header: CompressionTableHeader
    entries: _Entries
    batches: tuple[BatchContext, ...] = ()
    zran: tuple[ZranContext, ...] = ()
    dictionaries: memoryview = memoryview(b"")

    def context_of(self, index: int) -> int | None:
        """Return the number of the batch or zran context that a chunk is a part of, if any."""
        entry = self.entries[index]
        if isinstance(entry, CompressionInfoV2) and entry.has_context:
            return entry.context
        return None

    def stored_range(self, index: int) -> tuple[int, int]:
        """Return offset and length in the blob of what has to be read for a chunk."""
        entry, number = self.entries[index], self.context_of(index)
        if number is None:
            return entry.compressed_offset, entry.compressed_size
        if self.zran:
            return self.zran[number].in_offset, self.zran[number].in_len
        return entry.compressed_offset, self.batches[number].compressed_size

    def cut(self, index: int, content: bytes | bytearray | memoryview) -> memoryview:
        """Return the bytes of a chunk out of those of its context; raise `IntegrityError`."""
        entry = self.entries[index]
        start = entry.data if isinstance(entry, CompressionInfoV2) else 0
        data = memoryview(content)[start : start + entry.uncompressed_size]
        if len(data) != entry.uncompressed_size:
            raise IntegrityError(
                "context is too short for its chunk",
                expected=entry.uncompressed_size,
                got=len(data),
            )
        return data

    def agrees(self, info: ChunkInfo) -> bool:
        """Tell whether the bootstrap says the same of a chunk; its index is in the table.

        Of chunks in a batch the bootstrap does not know where they are stored (spec 2.5), and
        in gzip data that is a hint only.
        """
        entry = self.entries[info.chunk_index]
        if (info.uncompressed_offset, info.uncompressed_size) != entry[:2]:
            return False
        if self.context_of(info.chunk_index) is not None:
            return True
        stored = (info.compressed_offset, info.compressed_size, info.is_compressed)
        return stored == (*entry[2:4], entry.is_compressed)

    @property
    def uncompressed_size(self) -> int:
        """Length of the uncompressed space that the chunks fill, in whole pages."""
        if not self.entries:
            return 0
        last = self.entries[-1]
        return align_up(last.uncompressed_offset + last.uncompressed_size, CI_ALIGNMENT)


def decompress_table(header: CompressionTableHeader, stored: bytes | memoryview) -> bytes:
    """Return the plain table; raise `FormatError` for impossible sizes, or `CodecError`."""
    header.check()
    _check_length(stored, header.ci_compressed_size, "stored compression table")
    return codec.decompress(Compressor(header.ci_compressor), stored, header.ci_uncompressed_size)


def _check_length(data: bytes | memoryview, expected: int, what: str) -> None:
    if len(data) != expected:
        raise OutOfBounds(
            f"{what} of the wrong length", expected=f"{expected} bytes", got=len(data)
        )


def parse_table(header: CompressionTableHeader, plain: bytes | memoryview) -> CompressionTable:
    """Decode a plain table and check every entry and context.

    Raises:
        OutOfBounds: the table has another length, or a chunk is outside of its context.
        CorruptStructure: chunks are not adjacent, overlap, or have impossible flags.
        UnsupportedFeature: unknown flags or algorithms.
    """
    header.check()
    data = memoryview(plain)
    _check_length(data, header.ci_uncompressed_size, "compression table")
    if not header.features & BlobFeatures.CHUNK_INFO_V2:
        table = CompressionTable(header, parse_entries_v1(data))
    else:
        table = CompressionTable(header, parse_entries_v2(data[: header.entries_size]))
        behind = data[header.context_offset : header.context_offset + header.context_size]
        if header.features & BlobFeatures.BATCH:
            table = table._replace(batches=parse_batches(behind, header.context_count))
        elif header.features & BlobFeatures.ZRAN:
            zran, dictionaries = parse_zran(behind, header.context_count)
            table = table._replace(zran=zran, dictionaries=dictionaries)
        for index, entry in enumerate(table.entries):
            if isinstance(entry, CompressionInfoV2):
                with error_context(chunk=index):
                    _check_flags(table, entry)
    # Early builders left gaps in zran tables, whose stored ranges are only a hint.
    strict = not header.features & BlobFeatures.ZRAN
    _check_uncompressed(table.entries, gaps=not strict)
    if strict:
        _check_stored(table)
    else:
        _check_zran(table)
    return table


def _check_uncompressed(entries: _Entries, *, gaps: bool) -> None:
    """Check that chunks are adjacent in the uncompressed space (spec 4.3)."""
    position = 0
    for index, entry in enumerate(entries):
        start = entry.uncompressed_offset
        if (start < position if gaps else start != position) or (
            start % CI_ALIGNMENT or entry.uncompressed_size > MAX_CHUNK_SIZE
        ):
            raise CorruptStructure(
                "chunk is not adjacent to the one before it",
                chunk=index,
                expected=f"offset {position:#x}",
                got=f"{start:#x}",
            )
        position = align_up(start + entry.uncompressed_size, CI_ALIGNMENT)


def _check_stored(table: CompressionTable) -> None:
    """Check that stored chunks and batches follow each other, and so do chunks in a batch."""
    end = filled = 0
    batch = None
    for index, entry in enumerate(table.entries):
        start, size = table.stored_range(index)
        number = table.context_of(index)
        if number is None or number != batch:
            if start < end:
                raise CorruptStructure("compressed chunks overlap", chunk=index)
            end, filled, batch = start + size, 0, number
        elif start + size != end:
            raise CorruptStructure("chunk of a batch that is elsewhere", chunk=index, got=start)
        if number is not None and isinstance(entry, CompressionInfoV2):
            if entry.data < filled:
                raise CorruptStructure("chunks of a batch overlap", chunk=index)
            filled = entry.data + entry.uncompressed_size


def _check_zran(table: CompressionTable) -> None:
    """Check that contexts ascend with the chunks, so that neighbours can be read together."""
    for number, (before, context) in enumerate(pairwise(table.zran), 1):
        if (
            context.in_offset < before.in_offset
            or context.in_offset + context.in_len < before.in_offset + before.in_len
        ):
            raise CorruptStructure(f"zran context {number} lies before the one before it")
    numbers = (table.context_of(index) or 0 for index in range(len(table.entries)))
    for index, (last, number) in enumerate(pairwise(numbers), 1):
        if number < last:
            raise CorruptStructure(
                "chunk of a context before that of the chunk before it", chunk=index
            )


def _check_flags(table: CompressionTable, entry: CompressionInfoV2) -> None:
    flags, features = entry.flags, table.header.features
    if flags & ~sum(CiFlags):
        raise UnsupportedFeature("flags of a chunk", got=f"{flags:#x}")
    for flag, feature in (
        (CiFlags.BATCH, BlobFeatures.BATCH),
        (CiFlags.ZRAN, BlobFeatures.ZRAN),
        (CiFlags.ENCRYPTED, BlobFeatures.ENCRYPTED),
    ):
        if flags & flag and not features & feature:
            raise CorruptStructure(f"{feature.name} chunk in another blob", got=f"{flags:#x}")
    if flags & (CiFlags.BATCH | CiFlags.ZRAN):
        _check_context(table, entry)
    elif not entry.compressed_size or (
        not flags & (CiFlags.COMPRESSED | CiFlags.ENCRYPTED)
        and entry.compressed_size != entry.uncompressed_size
    ):
        raise CorruptStructure("stored size of a chunk", got=entry.compressed_size)
    elif flags & CiFlags.HAS_CRC and not entry.data:
        raise CorruptStructure("chunk with a CRC of 0")


def _check_context(table: CompressionTable, entry: CompressionInfoV2) -> None:
    if entry.flags & CiFlags.HAS_CRC or entry.flags & (CiFlags.BATCH | CiFlags.ZRAN) == (
        CiFlags.BATCH | CiFlags.ZRAN
    ):
        raise CorruptStructure("flags that exclude each other", got=f"{entry.flags:#x}")
    contexts: Sequence[BatchContext] | Sequence[ZranContext]
    contexts = table.batches if entry.is_batch else table.zran
    if entry.context >= len(contexts):
        raise OutOfBounds(
            "context of a chunk", expected=f"below {len(contexts)}", got=entry.context
        )
    context = contexts[entry.context]
    size = context.uncompressed_size if isinstance(context, BatchContext) else context.out_len
    if entry.data + entry.uncompressed_size > size:
        raise OutOfBounds(
            "chunk outside of its context", expected=f"at most {size}", got=entry.data
        )


# The form of caches: the plain table, zeros up to a page, the header as it is in the blob.


def cached_size(uncompressed_size: int) -> int:
    """Return the length of the cached form of a table of so many bytes."""
    return align_up(uncompressed_size, CI_ALIGNMENT) + CI_HEADER_SIZE


def pack_cached(plain: bytes | memoryview, header: bytes | memoryview) -> bytes:
    """Return the cached form of a plain table and its packed header."""
    return bytes(plain) + bytes(-len(plain) % CI_ALIGNMENT) + bytes(header)


def parse_cached(content: bytes | memoryview) -> CompressionTable:
    """Decode and check a cached table; raise `FormatError`."""
    data = memoryview(content)
    if len(data) < CI_HEADER_SIZE:
        raise OutOfBounds("cached compression table is too short", got=len(data))
    header = CompressionTableHeader.parse(View(data), len(data) - CI_HEADER_SIZE)
    header.check()
    _check_length(data, cached_size(header.ci_uncompressed_size), "cached compression table")
    return parse_table(header, data[: header.ci_uncompressed_size])
