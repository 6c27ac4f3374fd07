"""The chunks of one blob as a bootstrap lists them: checked, and brought into columns.

Pure. A blob has thousands of chunks, and a mount waits for them: where all of them are known
and nothing is wrong, the whole columns are checked and made at once, in a fifth of the time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import accumulate, chain
from operator import add, eq, gt, itemgetter, le, lt, or_
from typing import NamedTuple

from erofs.cipher import BlobCipher
from erofs.errors import CorruptStructure, NydusError, OutOfBounds, UnsupportedFeature
from erofs.layout import BLOCK_SIZE
from erofs.rafs import (
    BLOB_FEATURES_INCOMPATIBLE,
    MAX_CHUNK_SIZE,
    MAX_CHUNKS_PER_BLOB,
    MAX_COMPRESSED_SIZE,
    MAX_UNCOMPRESSED_SIZE,
    MIN_CHUNK_SIZE,
    BlobEntry,
    BlobFeatures,
    ChunkFlags,
    ChunkInfo,
    Cipher,
    Compressor,
    Digester,
)
from fscache.cache.places import Places

__all__ = ["Columns", "check_entry", "checked_rows", "ordinary_columns"]

_UNSUPPORTED_FEATURES = (
    BlobFeatures.EXTERNAL,
    # Its indexes and sizes mean nothing: `fscache.cache.dictionary` puts others in their place.
    BlobFeatures.IS_CHUNKDICT_GENERATED,
)
# Numbers, for what is asked of each chunk: operations of enumerations take ten times as long.
_COMPRESSED = int(ChunkFlags.COMPRESSED)
_UNSUPPORTED_CHUNK_FLAGS = ~int(ChunkFlags.COMPRESSED | ChunkFlags.ENCRYPTED | ChunkFlags.HAS_CRC)
_ENCRYPTED = int(ChunkFlags.ENCRYPTED)
_NO_CIPHER = int(Cipher.NONE)
_NO_COMPRESSOR = int(Compressor.NONE)
_GZIP = int(Compressor.GZIP)
_INDEX = ChunkInfo._fields.index("chunk_index")
_ZRAN = int(BlobFeatures.ZRAN)
_BATCH = int(BlobFeatures.BATCH)


def check_entry(entry: BlobEntry) -> None:
    """Raise `FormatError` unless an entry of the blob table is sound and can be served."""
    for feature in _UNSUPPORTED_FEATURES:
        if entry.features & feature:
            raise UnsupportedFeature(f"blob feature {feature.name} is not supported on demand")
    if entry.features & BLOB_FEATURES_INCOMPATIBLE:
        raise UnsupportedFeature("unknown incompatible blob features", got=hex(entry.features))
    if entry.cipher not in tuple(Cipher):
        raise UnsupportedFeature("blob cipher is not supported", got=entry.cipher)
    if entry.compressor not in tuple(Compressor):
        raise UnsupportedFeature("blob compressor is not supported", got=entry.compressor)
    if entry.digester not in tuple(Digester):
        raise UnsupportedFeature("blob digester is not supported", got=entry.digester)
    size = entry.chunk_size
    if not MIN_CHUNK_SIZE <= size <= MAX_CHUNK_SIZE or size & (size - 1):
        raise CorruptStructure("bad chunk size", got=size)
    if not 0 < entry.chunk_count <= MAX_CHUNKS_PER_BLOB:
        raise CorruptStructure("bad chunk count", got=entry.chunk_count)
    if entry.compressed_size > MAX_COMPRESSED_SIZE:
        raise OutOfBounds("compressed size too large", got=entry.compressed_size)
    if not 0 < entry.uncompressed_size <= MAX_UNCOMPRESSED_SIZE:
        raise OutOfBounds("bad uncompressed size", got=entry.uncompressed_size)


def _is_placed(entry: BlobEntry, chunk: ChunkInfo) -> bool:
    """Tell whether the bootstrap knows how a chunk is stored.

    Not that of a batch (spec 2.5); and for one in gzip data it only has a hint.
    """
    if entry.features & _ZRAN:
        return False
    return not entry.features & _BATCH or chunk.compressed_size > 0


def _check_chunk(entry: BlobEntry, chunk: ChunkInfo) -> None:
    """Raise `FormatError` unless the chunk is sound by itself and lies inside of its blob."""
    if chunk.blob_index != entry.blob_index:
        raise CorruptStructure("other blob", expected=entry.blob_index, got=chunk.blob_index)
    if chunk.chunk_index >= entry.chunk_count:
        raise OutOfBounds(
            "index too large", expected=f"below {entry.chunk_count}", got=chunk.chunk_index
        )
    if chunk.flags & _UNSUPPORTED_CHUNK_FLAGS:
        raise UnsupportedFeature("chunk flags are not supported", got=hex(chunk.flags))
    if chunk.flags & _ENCRYPTED and entry.cipher == _NO_CIPHER:
        raise CorruptStructure("encrypted chunk of a blob without cipher", got=hex(chunk.flags))
    if not 0 < chunk.uncompressed_size <= entry.chunk_size:
        raise OutOfBounds(
            "bad uncompressed size",
            expected=f"1 to {entry.chunk_size}",
            got=chunk.uncompressed_size,
        )
    if chunk.uncompressed_offset % BLOCK_SIZE:
        raise CorruptStructure("uncompressed offset not aligned", got=chunk.uncompressed_offset)
    if chunk.uncompressed_offset + chunk.uncompressed_size > entry.uncompressed_size:
        raise OutOfBounds("ends outside of the blob's uncompressed space")
    if chunk.compressed_offset + chunk.compressed_size > entry.compressed_size:
        raise OutOfBounds("ends outside of the stored blob")
    if _is_placed(entry, chunk):
        _check_stored(entry, chunk)


def _check_stored(entry: BlobEntry, chunk: ChunkInfo) -> None:
    largest = chunk.uncompressed_size
    if entry.cipher != _NO_CIPHER:
        largest = BlobCipher.stored_size(largest)
    if not chunk.is_compressed:
        if chunk.compressed_size != largest:
            raise CorruptStructure(
                "stored size of a chunk that is not compressed",
                expected=largest,
                got=chunk.compressed_size,
            )
    elif entry.compressor == _NO_COMPRESSOR:
        raise CorruptStructure("compressed chunk in a blob without compressor")
    # Builders store a chunk plainly when compression does not make it smaller (spec 4.3); of
    # members of gzip they only know how large these may be (4.10).
    elif (
        not 0 < chunk.compressed_size <= (largest if entry.compressor != _GZIP else MAX_CHUNK_SIZE)
    ):
        raise CorruptStructure("bad compressed size", got=chunk.compressed_size)


def checked_rows(
    entry: BlobEntry, chunks: Iterable[ChunkInfo], places: Places | None
) -> dict[int, ChunkInfo]:
    """Return the chunks by index; raise `FormatError`."""
    rows: dict[int, ChunkInfo] = {}
    for row in chunks:
        # Not `error_context`, which costs more than the checks.
        try:
            _check_chunk(entry, row)
            if row.chunk_index in rows:
                raise CorruptStructure("two chunks with one index")
            if places is not None:
                places.check(row, entry.compressed_size)
        except NydusError as error:
            error.add_context(chunk=row.chunk_index)
            raise
        rows[row.chunk_index] = row
    return rows


class Columns(NamedTuple):
    """All chunks of a blob by index; see `BlobMap`, whose columns they become."""

    compressed: bytearray
    continues: bytearray
    uncompressed_offsets: array[int]
    uncompressed_sizes: array[int]
    compressed_offsets: array[int]
    compressed_sizes: array[int]
    digests: bytearray
    gaps_before: array[int]
    file_offsets: array[int]


def ordinary_columns(entry: BlobEntry, chunks: Sequence[ChunkInfo]) -> Columns | None:
    """Return the columns of a plain blob of which every chunk is known and sound.

    None for any other: `checked_rows` then tells what is wrong, or takes it row by row.
    """
    plain = entry.cipher == _NO_CIPHER and not entry.features & (_ZRAN | _BATCH)
    if not plain or len(chunks) != entry.chunk_count:
        return None
    ordered = sorted(chunks, key=itemgetter(_INDEX))
    digests, blobs, flags, stored, sizes, starts, offsets, places, indexes, _ = zip(
        *ordered, strict=True
    )
    if indexes != tuple(range(len(ordered))) or set(blobs) != {entry.blob_index}:
        return None
    compressed = {value: bool(value & _COMPRESSED) for value in set(flags)}
    if any(value & (_UNSUPPORTED_CHUNK_FLAGS | _ENCRYPTED) for value in compressed):
        return None
    packed = bytearray(map(compressed.__getitem__, flags))
    if not _are_inside(entry, sizes, offsets, stored, starts) or not _are_stored(
        entry, packed, sizes, stored
    ):
        return None
    mask = BLOCK_SIZE - 1
    ends = [(offset + size + mask) & ~mask for offset, size in zip(offsets, sizes, strict=True)]
    before = [0, *ends[:-1]]
    if any(map(lt, offsets, before)):
        return None
    return Columns(
        packed,
        bytearray(chain((0,), map(eq, places[1:], map(add, places, sizes)))),
        array("Q", offsets),
        array("I", sizes),
        array("Q", starts),
        array("I", stored),
        bytearray().join(digests),
        array("I", accumulate(map(gt, offsets, before))),
        array("Q", places),
    )


def _are_inside(
    entry: BlobEntry,
    sizes: Sequence[int],
    offsets: Sequence[int],
    stored: Sequence[int],
    starts: Sequence[int],
) -> bool:
    """Tell whether all chunks lie inside of their blob, as `_check_chunk` wants it of each."""
    return (
        min(sizes) > 0
        and max(sizes) <= entry.chunk_size
        and reduce(or_, offsets) % BLOCK_SIZE == 0
        and max(map(add, offsets, sizes)) <= entry.uncompressed_size
        and max(map(add, starts, stored)) <= entry.compressed_size
    )


def _are_stored(
    entry: BlobEntry, compressed: bytearray, sizes: Sequence[int], stored: Sequence[int]
) -> bool:
    """Tell whether the stored sizes can be right, as `_check_stored` wants it of each."""
    if entry.compressor == _GZIP or (entry.compressor == _NO_COMPRESSOR and any(compressed)):
        return False
    return (
        min(stored) > 0
        and all(map(le, stored, sizes))
        and all(map(or_, compressed, map(eq, stored, sizes)))
    )
