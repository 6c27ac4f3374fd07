"""What a block device of an image holds: its flat address space (spec rafs-v6 6.2).

Offsets of the disk become ranges of the bootstrap, of blobs, and of nothing, which is zeros.
The bytes are those that `nydus-image export --block` writes.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from erofs import error_context, open_bootstrap
from erofs.citable import CompressionTable
from erofs.errors import CorruptStructure, OutOfBounds
from erofs.flatdisk import Extent, blob_extents, disk_size
from fscache.backend import BlobReader
from fscache.backend.retry import RetryPolicy
from fscache.cache.blobmap import BlobMap
from fscache.cache.cachedblob import CachedBlob
from fscache.fetch.demand import Demand
from fscache.fetch.outstanding import Done

__all__ = [
    "Data",
    "Disk",
    "DiskPlan",
    "Part",
    "Slice",
    "Source",
    "image_disk",
    "read_disk_plan",
    "tar_disk",
]


class Slice(NamedTuple):
    """Bytes of an open file, to be sent without a detour; the descriptor is the source's."""

    fd: int
    offset: int
    length: int


# What a read gives; `None` for zeros stands beside its length.
Data = bytes | memoryview | Slice


class Source(Protocol):
    """Something with bytes at offsets of its own."""

    # Whether `read` may wait for a backend.
    slow: bool

    def request(self, offset: int, length: int, done: Done) -> None:
        """Make a range ready, then call `done` exactly once, perhaps from another thread."""

    def read(self, offset: int, length: int) -> Data:
        """Return a range that is ready; raise `NydusError`."""


class FileSource:
    """A file that is complete: the bootstrap. The descriptor is the caller's."""

    slow = False

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def request(self, offset: int, length: int, done: Done) -> None:
        """Be ready."""
        done(None)

    def read(self, offset: int, length: int) -> Data:
        """Return the place."""
        return Slice(self._fd, offset, length)


class BlobSource:
    """The known chunks of a blob, by way of its data file."""

    slow = False

    def __init__(self, blob: CachedBlob, demand: Demand) -> None:
        self._blob = blob
        self._demand = demand

    def request(self, offset: int, length: int, done: Done) -> None:
        """Have what is missing fetched."""
        self._demand.request(self._blob, offset, length, done)

    def read(self, offset: int, length: int) -> Data:
        """Return the place in the data file."""
        return Slice(self._blob.cache.fileno(), offset, length)


class PlainSource:
    """A blob whose stored bytes are its space: a tar. It is not cached."""

    slow = True

    def __init__(self, reader: BlobReader, retry: RetryPolicy, stop: threading.Event) -> None:
        self._reader = reader
        self._retry = retry
        self._stop = stop

    def request(self, offset: int, length: int, done: Done) -> None:
        """Be ready: what can fail fails in `read`."""
        done(None)

    def read(self, offset: int, length: int) -> Data:
        """Ask the backend; raise `BackendError`."""
        return self._retry.run(lambda: self._reader.read_at(offset, length), self._stop)


class UnusedSource:
    """The chunks of a blob that no file of the image has, as the blob's own table tells.

    Nobody but a copy of the disk, or a check of its hash tree, reads them. There is no digest
    to verify them by, so they are never put into the cache; their sizes are checked.
    """

    slow = True

    def __init__(self, blob: CachedBlob, stop: threading.Event) -> None:
        self._blob = blob
        self._stop = stop
        self._lock = threading.Lock()
        self._table: CompressionTable | None = None
        self._starts: list[int] = []
        self._last: tuple[int, bytes] = (-1, b"")

    def request(self, offset: int, length: int, done: Done) -> None:
        """Be ready: what can fail fails in `read`."""
        done(None)

    def read(self, offset: int, length: int) -> Data:
        """Ask the backend; raise `NydusError`."""
        # One at a time: rare, and neighbours then find their chunk.
        with self._lock, error_context(blob=self._blob.blob_id):
            if self._table is None:
                self._table = self._blob.load_table(self._stop)
                self._starts = [entry.uncompressed_offset for entry in self._table.entries]
            return b"".join(self._pieces(self._table, offset, offset + length))

    def _pieces(self, table: CompressionTable, offset: int, end: int) -> Iterator[bytes]:
        while offset < end:
            index = bisect_right(self._starts, offset) - 1
            behind = self._starts[index + 1] if index + 1 < len(self._starts) else end
            if index < 0 or behind <= offset:
                raise CorruptStructure("no chunk of the blob is here", offset=offset)
            begin = offset - self._starts[index]
            length = min(behind, end) - offset
            piece = self._chunk(table, index)[begin : begin + length]
            # A chunk is followed by zeros up to the next page.
            yield piece + bytes(length - len(piece))
            offset += length

    def _chunk(self, table: CompressionTable, index: int) -> bytes:
        if self._last[0] != index:
            with error_context(chunk=index):
                stored = self._blob.read_stored(*table.stored_range(index), self._stop)
                plain = self._blob.map.data.unpack(table, index, stored)
            self._last = (index, bytes(plain))
        return self._last[1]


class Segment(NamedTuple):
    """A part of the disk; `offset` is where it begins in its source, None stands for zeros."""

    start: int
    end: int
    source: Source | None
    offset: int


class Part(NamedTuple):
    """What a read has to do with one segment; `offset` counts in the source."""

    source: Source | None
    offset: int
    length: int


class Disk:
    """A disk of segments, which are ascending and do not overlap; between them are zeros.

    Args:
        size: in bytes.
        block_size: of the file system on it.
        segments: end before `size`.
    """

    def __init__(self, size: int, block_size: int, segments: Sequence[Segment]) -> None:
        self.size = size
        self.block_size = block_size
        self._segments = list(_without_gaps(segments, size))
        self._starts = [segment.start for segment in self._segments]

    def parts(self, offset: int, length: int) -> list[Part]:
        """Return what a range of the disk is made of; raise `OutOfBounds`."""
        end = offset + length
        if offset < 0 or length < 0 or end > self.size:
            raise OutOfBounds(
                "range outside of the disk",
                offset=offset,
                expected=f"below {self.size:#x}",
                got=f"{length} bytes",
            )
        parts = []
        number = bisect_right(self._starts, offset) - 1
        while offset < end:
            segment = self._segments[number]
            stop = min(segment.end, end)
            place = segment.offset + offset - segment.start
            parts.append(Part(segment.source, place, stop - offset))
            offset = stop
            number += 1
        return parts


def _without_gaps(segments: Sequence[Segment], size: int) -> Iterator[Segment]:
    position = 0
    for segment in segments:
        if segment.start > position:
            yield Segment(position, segment.start, None, 0)
        yield segment
        position = segment.end
    if position < size:
        yield Segment(position, size, None, 0)


class DiskPlan(NamedTuple):
    """Where things lie on the disk of an image; sizes in bytes.

    `metadata` is the length of the bootstrap, `blobs` the places of the blobs by index.
    """

    size: int
    block_size: int
    metadata: int
    blobs: list[Extent]


def read_disk_plan(bootstrap: Path) -> DiskPlan:
    """Read where things lie.

    Raises:
        FormatError: a broken bootstrap, or an image of this kind has no disk.
        OSError: it cannot be opened.
    """
    with open_bootstrap(bootstrap) as image, error_context(path=bootstrap):
        extents = blob_extents(image)
        return DiskPlan(disk_size(image), image.block_size, image.view.length, extents)


def _runs(table: BlobMap, size: int) -> Iterator[Extent]:
    """Yield the ranges of a blob that belong to known chunks, in whole pages below `size`."""
    start = end = 0
    for index in table.positions():
        if table.uncompressed_offsets[index] != end:
            if end > start:
                yield Extent(start, end - start)
            start = table.uncompressed_offsets[index]
        end = table.page_end(index)
    end = min(end, size)
    if end > start:
        yield Extent(start, end - start)


def blob_segments(place: Extent, table: BlobMap, known: Source, unused: Source) -> list[Segment]:
    """Return the segments of a blob: what its known chunks fill, and what others do.

    Args:
        place: of the blob on the disk.
        table: of its chunks.
        known, unused: the sources of the two.
    """
    segments = []
    position = 0
    for start, size in _runs(table, place.size):
        if start > position:
            segments.append(Segment(place.start + position, place.start + start, unused, position))
        position = start + size
        segments.append(Segment(place.start + start, place.start + position, known, start))
    if position < place.size:
        segments.append(Segment(place.start + position, place.end, unused, position))
    return segments


def image_disk(
    plan: DiskPlan,
    bootstrap: int,
    blobs: Sequence[CachedBlob],
    demand: Demand,
    stop: threading.Event,
) -> Disk:
    """Return the disk of an image.

    Args:
        plan: where things lie.
        bootstrap: descriptor of the metadata; the caller's, as the blobs are.
        blobs: open, in the order of the plan.
        demand: makes their bytes ready.
        stop: ends what asks a backend again and again.
    """
    segments = [Segment(0, plan.metadata, FileSource(bootstrap), 0)]
    for place, blob in zip(plan.blobs, blobs, strict=True):
        known, unused = BlobSource(blob, demand), UnusedSource(blob, stop)
        segments += blob_segments(place, blob.map, known, unused)
    return Disk(plan.size, plan.block_size, segments)


def tar_disk(
    plan: DiskPlan,
    bootstrap: int,
    readers: Sequence[BlobReader],
    retry: RetryPolicy,
    stop: threading.Event,
) -> Disk:
    """Return the disk of tarfs, whose blobs are tars and are read where they are.

    Args as for `image_disk`; `retry` is how reads are repeated.
    """
    segments = [Segment(0, plan.metadata, FileSource(bootstrap), 0)]
    for place, reader in zip(plan.blobs, readers, strict=True):
        segments.append(Segment(place.start, place.end, PlainSource(reader, retry, stop), 0))
    return Disk(plan.size, plan.block_size, segments)
