"""Blobs of tarfs: a tar is fetched in pieces of one size, which have no digests (rafs-v6 6.1)."""

from __future__ import annotations

from collections.abc import Sequence

from erofs.errors import CorruptStructure
from erofs.rafs import MAX_COMPRESSED_SIZE, BlobEntry, ChunkInfo

__all__ = ["PIECE_BYTES", "in_pieces"]

# The same for every image on a tar, since they share its cache; small, since files are.
PIECE_BYTES = 128 << 10
_NO_DIGEST = bytes(32)


def in_pieces(entry: BlobEntry) -> tuple[BlobEntry, Sequence[ChunkInfo]]:
    """Return the entry of a tar, and its chunks as the cache counts them: all of it, in order.

    Raises:
        CorruptStructure: its two sizes differ, or are impossible.
    """
    size = entry.uncompressed_size
    if not 0 < size <= MAX_COMPRESSED_SIZE or entry.compressed_size != size:
        raise CorruptStructure(
            "sizes of a tar", blob=entry.id, expected=size, got=entry.compressed_size
        )
    starts = range(0, size, PIECE_BYTES)
    chunks = [
        ChunkInfo(
            digest=_NO_DIGEST,
            blob_index=entry.blob_index,
            flags=0,
            compressed_size=min(PIECE_BYTES, size - start),
            uncompressed_size=min(PIECE_BYTES, size - start),
            compressed_offset=start,
            uncompressed_offset=start,
            file_offset=start,
            chunk_index=number,
            crc32c=0,
        )
        for number, start in enumerate(starts)
    ]
    return entry._replace(chunk_size=PIECE_BYTES, chunk_count=len(chunks)), chunks
