"""Where the chunks of a blob are stored, by index, as its own table says: compact columns.

Needed for blobs of batches: a bootstrap does not know where their chunks are (spec rafs-v6
2.5, 4.9). Pure: nothing is read or written here.
"""

from __future__ import annotations

from array import array

from erofs.blobmeta import CompressionInfoV2
from erofs.citable import CompressionTable
from erofs.contexts import BatchContext
from erofs.errors import CorruptStructure, OutOfBounds
from erofs.rafs import ChunkInfo

__all__ = ["NO_BATCH", "Places"]

NO_BATCH = -1


class Places:
    """What a compression table says of each chunk: what to read, and its place in a batch."""

    def __init__(self, table: CompressionTable) -> None:
        count = len(table.entries)
        self.uncompressed_offsets = array("Q", bytes(8 * count))
        self.uncompressed_sizes = array("I", bytes(4 * count))
        self.offsets = array("Q", bytes(8 * count))
        self.sizes = array("I", bytes(4 * count))
        self.compressed = bytearray(count)
        self.batch_numbers = array("i", bytes(4 * count))
        self.batch_offsets = array("I", bytes(4 * count))
        self.batches: tuple[BatchContext, ...] = table.batches
        for index, entry in enumerate(table.entries):
            self.uncompressed_offsets[index] = entry.uncompressed_offset
            self.uncompressed_sizes[index] = entry.uncompressed_size
            self.offsets[index], self.sizes[index] = table.stored_range(index)
            self.compressed[index] = entry.is_compressed
            self.batch_numbers[index] = NO_BATCH
            if isinstance(entry, CompressionInfoV2) and entry.is_batch:
                self.batch_numbers[index] = entry.context
                self.batch_offsets[index] = entry.data

    def __len__(self) -> int:
        return len(self.offsets)

    def check(self, row: ChunkInfo, stored_size: int) -> None:
        """Raise `FormatError` unless blob and bootstrap say the same of a chunk.

        Args:
            row: what the bootstrap says, with an index below the number of chunks.
            stored_size: length of the blob in bytes.
        """
        index = row.chunk_index
        found = [self.uncompressed_offsets[index], self.uncompressed_sizes[index]]
        expected = [row.uncompressed_offset, row.uncompressed_size]
        if self.batch_numbers[index] == NO_BATCH:
            found += [self.offsets[index], self.sizes[index], self.compressed[index]]
            expected += [row.compressed_offset, row.compressed_size, int(row.is_compressed)]
        if found != expected:
            raise CorruptStructure(
                "chunk is elsewhere in blob and bootstrap", expected=expected, got=found
            )
        if self.offsets[index] + self.sizes[index] > stored_size:
            raise OutOfBounds("ends outside of the stored blob")
