"""Read chunks of an image out of its data blobs, and let none through that is not itself.

Where blobs come from is the business of whoever gives a `BlobProvider`, for instance a
backend of `fscache.backend`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from builder.blobfiles import BlobFiles, BlobProvider, open_blob
from erofs import Chunk, CorruptStructure, IntegrityError, UnsupportedFeature, digest
from erofs.blobcheck import read_compression_table
from erofs.citable import CompressionTable
from erofs.errors import NydusError, error_context
from erofs.rafs import MAX_CHUNK_SIZE, BlobEntry, BlobFeatures, ChunkFlags, Digester
from erofs.stored import StoredData
from erofs.view import ReadAt
from fscache.backend.retry import RetryPolicy

__all__ = ["BlobProvider", "ChunkReader", "ReadAhead", "read_chunk", "require_plain"]

# What the thread that reads ahead takes at once, and how much may wait for its turn.
SPAN_BYTES = 1 << 20
AHEAD_BYTES = 16 << 20
_UNSUPPORTED = BlobFeatures.EXTERNAL
_KNOWN_FLAGS = ChunkFlags.COMPRESSED | ChunkFlags.ENCRYPTED | ChunkFlags.HAS_CRC


_Content = bytes | memoryview | NydusError


def require_plain(blob: BlobEntry) -> None:
    """Raise `UnsupportedFeature` unless its chunks can be read."""
    found = BlobFeatures(blob.features) & _UNSUPPORTED
    if found:
        kinds = ", ".join((feature.name or "").lower() for feature in found)
        raise UnsupportedFeature("reading data of such blobs", blob=blob.id, got=kinds)


def read_chunk(reader: ReadAt, blob: BlobEntry, chunk: Chunk) -> bytes | memoryview:
    """Return the content of a chunk, whose length and digest are right; a tar has no digests.

    Raises:
        CorruptStructure: the bootstrap gives it impossible sizes.
        UnsupportedFeature: it is in a batch, or a hole.
        CodecError: it does not decrypt or decompress.
        IntegrityError: it is not what the bootstrap promises.
        NydusError: what `reader` raises.
    """
    size, stored_size = chunk.uncompressed_size, chunk.compressed_size
    with error_context(blob=blob.id, chunk=chunk.chunk_index, offset=chunk.compressed_offset):
        if chunk.flags & ~_KNOWN_FLAGS:
            raise UnsupportedFeature("reading a chunk of this kind", got=f"flags {chunk.flags:#x}")
        is_compressed = bool(chunk.flags & ChunkFlags.COMPRESSED)
        is_encrypted = bool(chunk.flags & ChunkFlags.ENCRYPTED)
        if not 0 < size <= blob.chunk_size or not 0 < stored_size <= MAX_CHUNK_SIZE:
            raise CorruptStructure("chunk of an impossible size", got=f"{stored_size}/{size}")
        if not is_compressed and not is_encrypted and stored_size != size:
            raise CorruptStructure("stored size of a plain chunk", expected=size, got=stored_size)
        stored = reader.read_at(chunk.compressed_offset, stored_size)
        if blob.features & BlobFeatures.TARFS:
            return stored
        data = StoredData(blob).chunk(
            stored, size, compressed=is_compressed, encrypted=is_encrypted
        )
        _verify(blob, chunk, data)
    return data


def _verify(blob: BlobEntry, chunk: Chunk, data: bytes | memoryview) -> None:
    found = digest.digest(Digester(blob.digester), data)
    if found != chunk.digest:
        raise IntegrityError(
            "chunk has another digest", expected=chunk.digest.hex(), got=found.hex()
        )


class _TabledBlob:
    """A blob of batches or gzip data: only its own table knows how to get at a chunk."""

    def __init__(self, entry: BlobEntry, files: BlobFiles) -> None:
        self._entry = entry
        self._files = files
        self._data = StoredData(entry)
        self._table: CompressionTable | None = None
        self._offsets: list[int] = []
        self._context: tuple[int, bytes | bytearray | memoryview] | None = None

    def read(self, chunk: Chunk) -> bytes | memoryview:
        """Return the verified content of a chunk; raise `NydusError`."""
        with error_context(blob=self._entry.id, chunk=chunk.chunk_index):
            if self._table is None:
                self._table = read_compression_table(self._files.tables, self._entry)
                self._offsets = [entry.uncompressed_offset for entry in self._table.entries]
            # Not by index: that of a generated dictionary is its own (spec 4.12).
            index = bisect_left(self._offsets, chunk.uncompressed_offset)
            info = chunk.info()._replace(chunk_index=index)
            if index == len(self._offsets) or not self._table.agrees(info):
                raise CorruptStructure("bootstrap and blob place a chunk differently")
            data = self._content(self._table, index)
            _verify(self._entry, chunk, data)
        return data

    def _content(self, table: CompressionTable, index: int) -> bytes | memoryview:
        number = table.context_of(index)
        if number is None:
            stored = self._files.data.read_at(*table.stored_range(index))
            return self._data.entry(table, index, stored)
        if self._context is None or self._context[0] != number:
            stored = self._files.data.read_at(*table.stored_range(index))
            self._context = number, self._data.context(table, number, stored)
        return table.cut(index, self._context[1])


class ChunkReader:
    """Reads the chunks of one image, repeating what fails for the moment.

    Args:
        blobs: the blob table.
        ids: under which the blobs are stored, in table order.
        provider: where they are; its readers are opened on first use.
        bootstrap: the file with the blob table, which may hold tables, too.
    """

    def __init__(
        self,
        blobs: Sequence[BlobEntry],
        ids: Sequence[str],
        provider: BlobProvider,
        bootstrap: Path | None = None,
    ) -> None:
        for blob in blobs:
            require_plain(blob)
        self._blobs = [
            blob._replace(blob_id=name.encode("ascii", "backslashreplace"))
            for blob, name in zip(blobs, ids, strict=True)
        ]
        self._ids = ids
        self._provider = provider
        self._bootstrap = bootstrap
        self._readers: dict[int, ReadAt | _TabledBlob] = {}
        self._policy = RetryPolicy()
        self._stop = threading.Event()
        # A file of zeros has one chunk many times over.
        self._last: tuple[Chunk, bytes | memoryview] | None = None

    def read(self, chunk: Chunk) -> bytes | memoryview:
        """Return the verified content of a chunk; raise as `read_chunk` does."""
        if self._last is not None and self._last[0] is chunk:
            return self._last[1]
        data = self._policy.run(lambda: self._read(chunk), self._stop)
        self._last = (chunk, data)
        return data

    def _read(self, chunk: Chunk) -> bytes | memoryview:
        index = chunk.blob_index
        blob = self._blobs[index]
        reader = self._readers.get(index)
        if reader is None:
            files = open_blob(blob, self._ids[index], self._provider, self._bootstrap)
            tabled = blob.features & (BlobFeatures.BATCH | BlobFeatures.ZRAN)
            reader = _TabledBlob(blob, files) if tabled else files.data
            self._readers[index] = reader
        if isinstance(reader, _TabledBlob):
            return reader.read(chunk)
        return read_chunk(reader, blob, chunk)


class ReadAhead:
    """Reads chunks in the order in which they will be asked for, by a thread of its own.

    Use as a context manager. What fails is raised when that chunk's turn has come.

    Args:
        reader: nobody else uses it meanwhile.
        chunks: all that will be asked for, in order.
    """

    def __init__(self, reader: ChunkReader, chunks: Iterable[Chunk]) -> None:
        self._reader = reader
        self._chunks = iter(chunks)
        self._pool = ThreadPoolExecutor(1, "read-ahead")
        self._spans: deque[tuple[int, Future[list[_Content]]]] = deque()
        self._in_flight = 0
        self._current: Iterator[_Content] = iter(())

    def _submit(self) -> None:
        """Ask for spans of chunks, as many as may be in memory."""
        while self._in_flight < AHEAD_BYTES:
            span: list[Chunk] = []
            size = 0
            for chunk in self._chunks:
                span.append(chunk)
                size += chunk.uncompressed_size
                if size >= SPAN_BYTES:
                    break
            if not span:
                return
            self._spans.append((size, self._pool.submit(self._read, span)))
            self._in_flight += size

    def _read(self, chunks: Sequence[Chunk]) -> list[_Content]:
        found: list[_Content] = []
        for chunk in chunks:
            try:
                found.append(self._reader.read(chunk))
            except NydusError as error:
                # What was read before it is good.
                found.append(error)
                break
        return found

    def read(self) -> bytes | memoryview:
        """Return the verified content of the next chunk; raise as `ChunkReader.read` does."""
        content = next(self._current, None)
        if content is None:
            self._submit()
            size, job = self._spans.popleft()
            self._current = iter(job.result())
            self._in_flight -= size
            self._submit()
            content = next(self._current)
        if isinstance(content, NydusError):
            raise content
        return content

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
