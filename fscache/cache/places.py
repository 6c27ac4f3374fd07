"""Where the chunks of a blob are stored, by index, as its own table says: compact columns.

Needed for blobs of batches and for original layers: a bootstrap does not know how to get at
their chunks (spec rafs-v6 2.5, 4.9, 4.10). Pure: nothing is read or written here.
"""

from __future__ import annotations

from array import array

from erofs.blobmeta import CompressionInfoV2
from erofs.citable import CompressionTable
from erofs.errors import CorruptStructure, OutOfBounds
from erofs.rafs import ChunkInfo
from erofs.stored import StoredData

__all__ = ["NO_CONTEXT", "Places"]

NO_CONTEXT = -1


class Places:
    """What a compression table says of each chunk: what to read, and its place in a context.

    A context is a batch, or a piece of gzip data; its chunks are read and decompressed together.
    `overlap` tells whether what is read for neighbours may have bytes in common.
    """

    def __init__(self, table: CompressionTable) -> None:
        count = len(table.entries)
        self.uncompressed_offsets = array("Q", bytes(8 * count))
        self.uncompressed_sizes = array("I", bytes(4 * count))
        self.offsets = array("Q", bytes(8 * count))
        self.sizes = array("I", bytes(4 * count))
        self.compressed = bytearray(count)
        self.context_numbers = array("i", bytes(4 * count))
        self.context_offsets = array("I", bytes(4 * count))
        self.overlap = bool(table.zran)
        self._batches, self._zran = table.batches, table.zran
        self._dictionaries = table.dictionaries
        for index, entry in enumerate(table.entries):
            self.uncompressed_offsets[index] = entry.uncompressed_offset
            self.uncompressed_sizes[index] = entry.uncompressed_size
            self.offsets[index], self.sizes[index] = table.stored_range(index)
            self.compressed[index] = entry.is_compressed
            self.context_numbers[index] = NO_CONTEXT
            if isinstance(entry, CompressionInfoV2) and entry.has_context:
                self.context_numbers[index] = entry.context
                self.context_offsets[index] = entry.data

    def __len__(self) -> int:
        return len(self.offsets)

    def unpack(
        self, number: int, stored: bytes | memoryview, data: StoredData
    ) -> bytes | bytearray | memoryview:
        """Return the content of all chunks of a context; raise `CodecError`."""
        if self._zran:
            return self._zran[number].inflate(stored, self._dictionaries)
        return data.batch(self._batches[number], stored)

    def check(self, row: ChunkInfo, stored_size: int) -> None:
        """Raise `FormatError` unless blob and bootstrap say the same of a chunk.

        Args:
            row: what the bootstrap says, with an index below the number of chunks.
            stored_size: length of the blob in bytes.
        """
        index = row.chunk_index
        found = [self.uncompressed_offsets[index], self.uncompressed_sizes[index]]
        expected = [row.uncompressed_offset, row.uncompressed_size]
        if self.context_numbers[index] == NO_CONTEXT:
            found += [self.offsets[index], self.sizes[index], self.compressed[index]]
            expected += [row.compressed_offset, row.compressed_size, int(row.is_compressed)]
        if found != expected:
            raise CorruptStructure(
                "chunk is elsewhere in blob and bootstrap", expected=expected, got=found
            )
        if self.offsets[index] + self.sizes[index] > stored_size:
            raise OutOfBounds("ends outside of the stored blob")
