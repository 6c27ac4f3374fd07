"""Read chunks of an image out of its data blobs, and let none through that is not itself.

Where blobs come from is the business of whoever gives a `BlobProvider`, for instance a
backend of `fscache.backend`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from builder.blobfiles import BlobFiles, BlobProvider, open_blob
from erofs import Chunk, CorruptStructure, IntegrityError, UnsupportedFeature, digest
from erofs.citable import CompressionTable
from erofs.errors import error_context
from erofs.rafs import MAX_CHUNK_SIZE, BlobEntry, BlobFeatures, ChunkFlags, Digester
from erofs.stored import StoredData
from erofs.view import ReadAt
from fscache.backend.retry import RetryPolicy

__all__ = ["BlobProvider", "ChunkReader", "read_chunk", "require_plain"]

# Chunks that are read at once may be stored in so many bytes: their sizes are hostile.
STORED_BYTES = 4 << 20
_UNSUPPORTED = BlobFeatures.EXTERNAL
# Operations of an enumeration take ten times as long as those of numbers.
_COMPRESSED, _ENCRYPTED = int(ChunkFlags.COMPRESSED), int(ChunkFlags.ENCRYPTED)
_KNOWN_FLAGS = _COMPRESSED | _ENCRYPTED | int(ChunkFlags.HAS_CRC)
_TABLED = int(BlobFeatures.BATCH | BlobFeatures.ZRAN)
# Not compressed at most, and not with a digest for each chunk.
_NOT_SIMPLE = _TABLED | int(BlobFeatures.TARFS)


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
    with error_context(blob=blob.id, chunk=chunk.chunk_index, offset=chunk.compressed_offset):
        _check(blob, chunk)
        stored = reader.read_at(chunk.compressed_offset, chunk.compressed_size)
        if blob.features & BlobFeatures.TARFS:
            return stored
        data = StoredData(blob).chunk(
            stored,
            chunk.uncompressed_size,
            compressed=bool(chunk.flags & _COMPRESSED),
            encrypted=bool(chunk.flags & _ENCRYPTED),
        )
        _verify(blob, chunk, data)
    return data


def _check(blob: BlobEntry, chunk: Chunk) -> None:
    """Raise `NydusError` unless the bootstrap says of a chunk what can be."""
    size, stored_size, flags = chunk.uncompressed_size, chunk.compressed_size, chunk.flags
    if flags & ~_KNOWN_FLAGS:
        raise UnsupportedFeature("reading a chunk of this kind", got=f"flags {flags:#x}")
    if not 0 < size <= blob.chunk_size or not 0 < stored_size <= MAX_CHUNK_SIZE:
        raise CorruptStructure("chunk of an impossible size", got=f"{stored_size}/{size}")
    if not flags & (_COMPRESSED | _ENCRYPTED) and stored_size != size:
        raise CorruptStructure("stored size of a plain chunk", expected=size, got=stored_size)


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
                # Imported here: few blobs have tables that are needed.
                from erofs.blobcheck import read_compression_table

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
        self._readers: dict[int, ReadAt] = {}
        self._opening = threading.Lock()
        self._tabled: dict[int, _TabledBlob] = {}
        self._policy = RetryPolicy()
        self._stop = threading.Event()
        # A file of zeros has one chunk many times over.
        self._last: tuple[Chunk, bytes | memoryview] | None = None

    @property
    def is_tabled(self) -> bool:
        """Whether it keeps contexts of batches or gzip data: then only one thread may read."""
        return any(blob.features & _TABLED for blob in self._blobs)

    def read(self, chunk: Chunk) -> bytes | memoryview:
        """Return the verified content of a chunk; raise as `read_chunk` does."""
        last = self._last
        if last is not None and last[0] is chunk:
            return last[1]
        data = self._policy.run(lambda: self._read(chunk), self._stop)
        self._last = (chunk, data)
        return data

    def _read(self, chunk: Chunk) -> bytes | memoryview:
        index = chunk.blob_index
        blob = self._blobs[index]
        if not blob.features & _TABLED:
            return read_chunk(self._reader(index), blob, chunk)
        tabled = self._tabled.get(index)
        if tabled is None:
            tabled = self._tabled[index] = _TabledBlob(blob, self._open(index))
        return tabled.read(chunk)

    def _open(self, index: int) -> BlobFiles:
        return open_blob(self._blobs[index], self._ids[index], self._provider, self._bootstrap)

    def _reader(self, index: int) -> ReadAt:
        """Return the reader of a blob, opened on first use; raise `NydusError`."""
        reader = self._readers.get(index)
        if reader is not None:
            return reader
        # Threads that begin at once would each ask a registry for the blob.
        with self._opening:
            if index not in self._readers:
                self._readers[index] = self._open(index).data
            return self._readers[index]

    def read_all(self, chunks: Sequence[Chunk]) -> list[bytes | memoryview]:
        """Return the verified contents of some chunks; neighbours are read and decoded at once.

        Raises what `read` raises, which may not say of which chunk.
        """
        if sum(chunk.compressed_size for chunk in chunks) > STORED_BYTES:
            return [self.read(chunk) for chunk in chunks]
        contents = dict([self._last] if self._last else [])
        together: dict[int, list[Chunk]] = {}
        for chunk in dict.fromkeys(chunks):
            if chunk in contents:
                continue
            if self._blobs[chunk.blob_index].features & _NOT_SIMPLE or chunk.flags & _ENCRYPTED:
                contents[chunk] = self.read(chunk)
            else:
                together.setdefault(chunk.blob_index, []).append(chunk)
        for index, simple in together.items():
            contents.update(zip(simple, self._read_simple(index, simple), strict=True))
        self._last = (chunks[-1], contents[chunks[-1]])
        return [contents[chunk] for chunk in chunks]

    def _read_simple(self, index: int, chunks: list[Chunk]) -> list[bytes | memoryview]:
        blob = self._blobs[index]
        stored = self._read_stored(index, chunks)
        packed = [number for number, chunk in enumerate(chunks) if chunk.flags & _COMPRESSED]
        contents: list[bytes | memoryview] = [*stored]
        plain = StoredData(blob).chunks(
            [stored[number] for number in packed],
            [chunks[number].uncompressed_size for number in packed],
        )
        for number, content in zip(packed, plain, strict=True):
            contents[number] = content
        find = digest.function(Digester(blob.digester))
        for chunk, content in zip(chunks, contents, strict=True):
            if find(content) != chunk.digest:
                raise IntegrityError("chunk has another digest", blob=blob.id)
        return contents

    def _read_stored(self, index: int, chunks: list[Chunk]) -> list[memoryview]:
        """Return chunks as they are stored, those behind one another by one request."""
        blob, reader = self._blobs[index], self._reader(index)
        stored = []
        for run in _neighbours(chunks):
            for chunk in run:
                _check(blob, chunk)
            start, last = run[0].compressed_offset, run[-1]
            length = last.compressed_offset + last.compressed_size - start
            data = memoryview(self._policy.run(partial(reader.read_at, start, length), self._stop))
            for chunk in run:
                offset = chunk.compressed_offset - start
                stored.append(data[offset : offset + chunk.compressed_size])
        return stored


def _neighbours(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Yield chunks that are stored one behind the other together."""
    run: list[Chunk] = []
    end = 0
    for chunk in chunks:
        if run and chunk.compressed_offset != end:
            yield run
            run = []
        run.append(chunk)
        end = chunk.compressed_offset + chunk.compressed_size
    if run:
        yield run
