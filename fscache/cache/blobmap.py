"""From byte ranges of a blob's uncompressed space to chunks: checked columns and bisection.

Pure: nothing is read or written here. The *index* of a chunk is its place in the blob's
compression table, which is what the chunk map on disk counts; uncompressed offsets ascend
with it (spec rafs-v6 4.3). Where chunks are stored says the bootstrap, or for blobs of
batches and original layers the blob's own table (`fscache.cache.places`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

from erofs.errors import (
    CorruptStructure,
    OutOfBounds,
    error_context,
)
from erofs.layout import BLOCK_SIZE
from erofs.rafs import (
    BlobEntry,
    BlobFeatures,
    ChunkFlags,
    ChunkInfo,
    Cipher,
    Compressor,
    Digester,
)
from erofs.stored import StoredData
from erofs.view import align_up
from fscache.cache.chunkrows import Columns, check_entry, checked_rows, ordinary_columns
from fscache.cache.places import NO_CONTEXT, Places

__all__ = ["BlobMap"]

DIGEST_BYTES = 32

# Whose chunks only their own table knows how to get at.
_TABLED = BlobFeatures.BATCH | BlobFeatures.ZRAN


class BlobMap:
    """The known chunks of one blob, as columns by index.

    A bootstrap names only the chunks that its files refer to, so an index may be unknown: it
    then has no bytes and lies where the chunk before it ends. `with_chunks` makes a map that
    knows those of a further image; indexes mean the same in both. `uncompressed_size` is that
    of the data file, in whole pages.

    `compressed_offsets` and `compressed_sizes` say what has to be read for a chunk; for a part
    of a context that is what the context needs. While `is_located` is False they are only as
    good as the uncompressed ones: enough to plan with, `with_places` makes a map to read with.

    Args:
        entry: the blob's entry in the blob table.
        chunks: all entries of the chunk info table that belong to it, in any order.
        places: what the blob's own table says, for blobs of contexts.

    Raises:
        FormatError: naming blob and chunk; `UnsupportedFeature` for external blobs.
    """

    def __init__(
        self, entry: BlobEntry, chunks: Iterable[ChunkInfo], places: Places | None = None
    ) -> None:
        self.entry = entry
        self.blob_id = entry.id
        with error_context(blob=entry.id):
            check_entry(entry)
            listed = list(chunks)
            columns = ordinary_columns(entry, listed) if places is None else None
            rows = checked_rows(entry, listed, places) if columns is None else {}
        self.places = places
        self.is_located = places is not None or not entry.features & _TABLED
        self.chunk_count = entry.chunk_count
        self.uncompressed_size = align_up(entry.uncompressed_size, BLOCK_SIZE)
        self.compressor = Compressor(entry.compressor)
        self.data = StoredData(entry)
        self.is_encrypted = entry.cipher != Cipher.NONE
        self.digester = Digester(entry.digester)
        # The pieces of a tar have none.
        self.has_digests = not entry.features & BlobFeatures.TARFS
        # `_row_offsets` and `_row_sizes` are what the bootstrap says, not what is to be read.
        if columns is not None:
            self._take(columns)
        else:
            self._begin(len(rows))
            with error_context(blob=entry.id):
                self._fill(rows)
        self._place()

    def _take(self, columns: Columns) -> None:
        self.known_count = self.chunk_count
        self.known = bytearray(b"\1" * self.chunk_count)
        self.compressed = columns.compressed
        self._continues = columns.continues
        self.uncompressed_offsets = columns.uncompressed_offsets
        self.uncompressed_sizes = columns.uncompressed_sizes
        self._row_offsets = self.compressed_offsets = columns.compressed_offsets
        self._row_sizes = self.compressed_sizes = columns.compressed_sizes
        self._digests = columns.digests
        self._gaps_before = columns.gaps_before
        self._file_offsets = columns.file_offsets

    def _begin(self, known_count: int) -> None:
        self.known_count = known_count
        self.known = bytearray(self.chunk_count)
        self.compressed = bytearray(self.chunk_count)
        self._continues = bytearray(self.chunk_count)
        self.uncompressed_offsets = array("Q", bytes(8 * self.chunk_count))
        self.uncompressed_sizes = array("I", bytes(4 * self.chunk_count))
        self._row_offsets = self.compressed_offsets = array("Q", bytes(8 * self.chunk_count))
        self._row_sizes = self.compressed_sizes = array("I", bytes(4 * self.chunk_count))
        self._digests = bytearray(DIGEST_BYTES * self.chunk_count)
        self._gaps_before = array("I", bytes(4 * self.chunk_count))
        self._file_offsets = array("Q", bytes(8 * self.chunk_count))

    def _fill(self, rows: dict[int, ChunkInfo]) -> None:
        end = gaps = 0
        for index in range(self.chunk_count):
            row = rows.get(index)
            if row is not None:
                self._set(index, row)
                if row.uncompressed_offset < end:
                    raise CorruptStructure(
                        "chunk overlaps the one before",
                        chunk=index,
                        offset=row.uncompressed_offset,
                    )
                gaps += row.uncompressed_offset > end
                end = self.page_end(index)
                before = rows.get(index - 1)
                self._continues[index] = before is not None and (
                    row.file_offset == before.file_offset + before.uncompressed_size
                )
            else:
                self.uncompressed_offsets[index] = end
            self._gaps_before[index] = gaps

    def _set(self, index: int, row: ChunkInfo) -> None:
        self.known[index] = 1
        self.compressed[index] = row.is_compressed
        self.uncompressed_offsets[index] = row.uncompressed_offset
        self.uncompressed_sizes[index] = row.uncompressed_size
        self._row_offsets[index] = row.compressed_offset
        self._row_sizes[index] = row.compressed_size
        self._file_offsets[index] = row.file_offset
        self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] = row.digest

    def _place(self) -> None:
        """Set what has to be read for each chunk."""
        if self.places is not None:
            self.compressed_offsets, self.compressed_sizes = self.places.offsets, self.places.sizes
        elif not self.is_located:
            self.compressed_offsets = self.uncompressed_offsets
            self.compressed_sizes = array("I", self.uncompressed_sizes)
            for index, size in enumerate(self.uncompressed_sizes):
                self.compressed_sizes[index] = align_up(size, BLOCK_SIZE)

    def _row(self, index: int) -> ChunkInfo:
        return ChunkInfo(
            digest=self.digest(index),
            blob_index=self.entry.blob_index,
            flags=ChunkFlags.COMPRESSED if self.compressed[index] else 0,
            compressed_size=self._row_sizes[index],
            uncompressed_size=self.uncompressed_sizes[index],
            compressed_offset=self._row_offsets[index],
            uncompressed_offset=self.uncompressed_offsets[index],
            file_offset=self._file_offsets[index],
            chunk_index=index,
            crc32c=0,
        )

    def with_chunks(self, entry: BlobEntry, chunks: Iterable[ChunkInfo]) -> BlobMap:
        """Return a map that also knows the chunks of another image on the same blob.

        This one when it knows them all.

        Raises:
            CorruptStructure: the two images say different things about the blob.
        """
        other = BlobMap(entry, chunks)
        with error_context(blob=self.blob_id):
            for name in ("chunk_count", "uncompressed_size", "compressor", "digester"):
                if getattr(self, name) != getattr(other, name):
                    raise CorruptStructure(
                        f"images differ about the blob's {name}",
                        expected=getattr(self, name),
                        got=getattr(other, name),
                    )
            if self.entry.encryption() != other.entry.encryption():
                raise CorruptStructure("images differ about the blob's key")
            fresh = []
            for index in other.positions():
                if not self.known[index]:
                    fresh.append(other._row(index)._replace(blob_index=self.entry.blob_index))
                elif not self._agrees(other, index):
                    raise CorruptStructure("images differ about a chunk", chunk=index)
        if not fresh:
            return self
        return BlobMap(self.entry, [*map(self._row, self.positions()), *fresh], self.places)

    def with_places(self, places: Places | None) -> BlobMap:
        """Return a map that knows, or with None no longer knows, where its chunks are stored.

        Raises:
            FormatError: the blob's own table says other things than the bootstrap.
        """
        if places is not None and len(places) != self.chunk_count:
            raise CorruptStructure(
                "number of chunks in blob and bootstrap",
                blob=self.blob_id,
                expected=self.chunk_count,
                got=len(places),
            )
        return BlobMap(self.entry, map(self._row, self.positions()), places)

    def _agrees(self, other: BlobMap, index: int) -> bool:
        """Tell whether two maps say the same of a chunk; its place in files may differ."""
        mine, theirs = self._row(index), other._row(index)
        return mine._replace(blob_index=0, file_offset=0) == theirs._replace(
            blob_index=0, file_offset=0
        )

    def following(self, index: int, count: int) -> range:
        """Return up to `count` chunks behind one that go on in the same file."""
        stop = index + 1
        while stop < self.chunk_count and stop <= index + count and self._continues[stop]:
            stop += 1
        return range(index + 1, stop)

    def positions(self) -> list[int]:
        """Return the indexes of the known chunks, ascending."""
        return [index for index, known in enumerate(self.known) if known]

    def __len__(self) -> int:
        return self.known_count

    def page_end(self, index: int) -> int:
        """Return the uncompressed offset behind the chunk's last page."""
        return align_up(
            self.uncompressed_offsets[index] + self.uncompressed_sizes[index], BLOCK_SIZE
        )

    def digest(self, index: int) -> bytes:
        """Return the digest that the uncompressed chunk must have."""
        return bytes(self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])

    def chunks_in(self, offset: int, length: int) -> range:
        """Return the indexes of the chunks that hold a range of the uncompressed space.

        Raises `OutOfBounds` when a page of the range belongs to no known chunk: nothing
        could ever fill it, so it must not be read as zeros.
        """
        end = offset + length
        if offset < 0 or length < 0 or end > self.uncompressed_size:
            raise OutOfBounds(
                "range outside of the blob's uncompressed space",
                blob=self.blob_id,
                offset=offset,
                expected=f"below {self.uncompressed_size:#x}",
                got=f"{length} bytes",
            )
        if length == 0:
            return range(0)
        # Unknown chunks have no bytes: behind a known one they share its end, so the last
        # index at or before `offset` may be unknown, and the known one is searched backwards.
        first = self.known.rfind(1, 0, bisect_right(self.uncompressed_offsets, offset))
        stop = self.known.rfind(1, 0, bisect_left(self.uncompressed_offsets, end)) + 1
        if (
            first < 0
            or offset >= self.page_end(first)
            or end > self.page_end(stop - 1)
            or self._gaps_before[first] != self._gaps_before[stop - 1]
        ):
            raise OutOfBounds(
                f"range of {length} bytes with pages that belong to no known chunk",
                blob=self.blob_id,
                offset=offset,
            )
        return range(first, stop)

    def runs(self, positions: Sequence[int], max_bytes: int) -> Iterator[Sequence[int]]:
        """Cut ascending indexes into runs that one range of the stored blob covers.

        A run has neighbouring indexes with touching ranges, and at most `max_bytes` stored
        bytes; a larger chunk is a run of its own. Chunks of a context stay together.
        """
        first = 0
        for number in range(1, len(positions)):
            last, position = positions[number - 1], positions[number]
            if not self.is_together(last, position) and not (
                position == last + 1
                and self.touches(last, position)
                and self.compressed_end(position) - self.compressed_offsets[positions[first]]
                <= max_bytes
            ):
                yield positions[first:number]
                first = number
        if positions:
            yield positions[first:]

    def batches(self, run: Sequence[int], max_bytes: int, max_count: int) -> Iterator[range]:
        """Cut a run into small chunks that can be unpacked and written in one go.

        They lie side by side in the data file, with at most `max_bytes` together and so many of
        them; any other chunk is alone, as is the first, which somebody may wait for.
        """
        start, end = run[0], run[0] + 1
        for position in run[1:]:
            if (
                start == run[0]
                or self.places is not None
                or self.is_encrypted
                or position != end
                or position - start >= max_count
                or self.uncompressed_offsets[position] != self.page_end(position - 1)
                or self.page_end(position) - self.uncompressed_offsets[start] > max_bytes
            ):
                yield range(start, end)
                start = position
            end = position + 1
        yield range(start, end)

    def is_together(self, last: int, position: int) -> bool:
        """Return whether two chunks are parts of one context."""
        return self.context(last) != NO_CONTEXT and self.context(last) == self.context(position)

    def touches(self, last: int, position: int) -> bool:
        """Return whether a chunk is stored right behind another one, or overlaps it by design."""
        gap = self.compressed_offsets[position] - self.compressed_end(last)
        return gap == 0 or (gap < 0 and self.places is not None and self.places.overlap)

    def groups(self, positions: Sequence[int], max_bytes: int) -> Iterator[range]:
        """Yield the runs as ranges, which may hold other indexes of a context in between."""
        for run in self.runs(positions, max_bytes):
            yield range(run[0], run[-1] + 1)

    def context(self, index: int) -> int:
        """Return the number of the context that a chunk is a part of, or `NO_CONTEXT`."""
        return NO_CONTEXT if self.places is None else self.places.context_numbers[index]

    def rest_of_context(self, index: int, following: Iterable[int]) -> list[int]:
        """Return those indexes at the beginning of `following` that share a context with one."""
        number = self.context(index)
        if number == NO_CONTEXT:
            return []
        return list(takewhile(lambda other: self.context(other) == number, following))

    def whole_contexts(self, positions: range) -> range:
        """Return the range made wider to the ends of the contexts that it begins and ends in."""
        if self.places is None or not positions:
            return positions
        numbers = self.places.context_numbers
        start, stop = positions.start, positions.stop
        while start > 0 and numbers[start - 1] == numbers[start] != NO_CONTEXT:
            start -= 1
        while stop < self.chunk_count and numbers[stop] == numbers[stop - 1] != NO_CONTEXT:
            stop += 1
        return range(start, stop)

    def stored_range(self, positions: Sequence[int]) -> tuple[int, int]:
        """Return offset and length in the stored blob of a run."""
        start = self.compressed_offsets[positions[0]]
        return start, self.compressed_end(positions[-1]) - start

    def compressed_end(self, index: int) -> int:
        """Return the offset in the stored blob behind the chunk."""
        return self.compressed_offsets[index] + self.compressed_sizes[index]

    def covered_by(self, ranges: Iterable[tuple[int, int]]) -> bytearray:
        """Return one byte for each index: 1 when one of the ranges holds all its pages.

        Args:
            ranges: ascending, separate `(start, end)` pairs of the uncompressed space.
        """
        covered = bytearray(self.chunk_count)
        for start, end in ranges:
            first = bisect_left(self.uncompressed_offsets, start)
            stop = bisect_left(self.uncompressed_offsets, end)
            if first < stop and self.page_end(stop - 1) > end:
                stop -= 1
            if first < stop:
                covered[first:stop] = b"\1" * (stop - first)
        return covered
