"""The uncompressed space of a blob: what a kernel without a daemon has to find on a device.

For a native blob that is every chunk at its uncompressed offset, also one that no file of
the image refers to any more; for tarfs it is the tar (spec rafs-v6 4.3, 6.1, 6.2).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from builder.blobfiles import BlobFiles
from erofs import CorruptStructure, IntegrityError, UnsupportedFeature, digest
from erofs.blobmeta import parse_digests
from erofs.errors import error_context
from erofs.framing import SECTION_DIGEST, read_toc, read_toc_section
from erofs.rafs import BlobEntry, BlobFeatures, ChunkInfo, Digester
from erofs.stored import StoredData
from erofs.view import ReadAt
from fscache.backend.retry import RetryPolicy

__all__ = ["BlobSpace", "Piece", "open_space"]

READ_BYTES = 1 << 20
_UNSUPPORTED = BlobFeatures.EXTERNAL | BlobFeatures.IS_CHUNKDICT_GENERATED


class Piece(NamedTuple):
    """What is read at once: a range of the blob, and which chunks (or bytes of a tar) it has."""

    offset: int
    length: int
    first: int
    end: int


class BlobSpace(Protocol):
    """A blob that can be read in pieces, by several threads."""

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces, in the order of the blob."""

    def read(self, piece: Piece) -> Iterator[tuple[int, bytes | memoryview]]:
        """Yield (uncompressed offset, verified bytes); raise `NydusError`."""


class _Retrying:
    """A reader that repeats what fails for the moment."""

    def __init__(self, reader: ReadAt) -> None:
        self._reader = reader
        self._policy = RetryPolicy()
        self._stop = threading.Event()

    def size(self) -> int:
        return self._policy.run(self._reader.size, self._stop)

    def read_at(self, offset: int, length: int) -> bytes | memoryview:
        return self._policy.run(lambda: self._reader.read_at(offset, length), self._stop)


class _TarSpace:
    """A tar: its bytes are the space, and nothing says what they must be."""

    def __init__(self, entry: BlobEntry, reader: ReadAt) -> None:
        self._reader = reader
        self._size = entry.uncompressed_size
        if reader.size() < self._size:
            raise IntegrityError("tar is too short", expected=self._size, got=reader.size())

    def pieces(self) -> Iterator[Piece]:
        for start in range(0, self._size, READ_BYTES):
            end = min(start + READ_BYTES, self._size)
            yield Piece(start, end - start, start, end)

    def read(self, piece: Piece) -> Iterator[tuple[int, bytes | memoryview]]:
        yield piece.first, self._reader.read_at(piece.offset, piece.length)


class _NativeSpace:
    """A blob of chunks, each verified by the digest that the bootstrap, or the blob, has for it.

    A chunk that neither of them knows is one that no file has; only its size is checked.
    """

    def __init__(self, entry: BlobEntry, files: BlobFiles, infos: Iterable[ChunkInfo]) -> None:
        # Imported here: a tar has no such table.
        from erofs.blobcheck import read_compression_table

        self._entry = entry
        self._reader = files.data
        self._data = StoredData(entry)
        self._table = table = read_compression_table(files.tables, entry)
        if table.uncompressed_size != entry.uncompressed_size:
            raise CorruptStructure(
                "chunks do not fill their blob",
                expected=entry.uncompressed_size,
                got=table.uncompressed_size,
            )
        self._digests = _array(entry, files.tables)
        for info in infos:
            if info.chunk_index >= len(table.entries) or not table.agrees(info):
                raise CorruptStructure(
                    "bootstrap and blob place a chunk differently", chunk=info.chunk_index
                )
            self._digests[info.chunk_index] = info.digest

    def pieces(self) -> Iterator[Piece]:
        """Yield neighbours together, a context never in two pieces."""
        first, start, end = 0, 0, 0
        last = None
        for index in range(len(self._table.entries)):
            offset, length = self._table.stored_range(index)
            context = self._table.context_of(index)
            is_split = context is None or context != last
            if index == first:
                start = offset
            elif offset + length - start > READ_BYTES and is_split:
                yield Piece(start, end - start, first, index)
                first, start = index, offset
            end, last = offset + length, context
        if self._table.entries:
            yield Piece(start, end - start, first, len(self._table.entries))

    def read(self, piece: Piece) -> Iterator[tuple[int, bytes | memoryview]]:
        stored = memoryview(self._reader.read_at(piece.offset, piece.length))
        context, buffer = None, memoryview(b"")
        for index in range(piece.first, piece.end):
            with error_context(blob=self._entry.id, chunk=index):
                offset, length = self._table.stored_range(index)
                data = stored[offset - piece.offset : offset - piece.offset + length]
                number = self._table.context_of(index)
                if number is None:
                    plain = self._data.entry(self._table, index, data)
                else:
                    if number != context:
                        content = self._data.context(self._table, number, data)
                        context, buffer = number, memoryview(content)
                    plain = self._table.cut(index, buffer)
                self._verify(index, plain)
                yield self._table.entries[index].uncompressed_offset, plain

    def _verify(self, index: int, plain: bytes | memoryview) -> None:
        expected = self._digests.get(index)
        if expected is None:
            return
        found = digest.digest(Digester(self._entry.digester), plain)
        if found != expected:
            raise IntegrityError(
                "chunk has another digest", expected=expected.hex(), got=found.hex()
            )


def _array(entry: BlobEntry, reader: ReadAt) -> dict[int, bytes]:
    """Return the digests that a blob carries, by chunk; raise `NydusError`."""
    if not entry.features & BlobFeatures.INLINED_CHUNK_DIGEST:
        return {}
    toc = read_toc(reader)
    # Readers believe the digest only together with a size (spec 5.1).
    if entry.blob_toc_size and hashlib.sha256(toc.raw).digest() != entry.blob_toc_digest:
        raise IntegrityError("table of contents has another digest")
    section = toc.find(SECTION_DIGEST)
    if section is None:
        raise CorruptStructure("blob without its digest array")
    array = read_toc_section(reader, section)
    return dict(enumerate(parse_digests(array, entry.chunk_count)))


def open_space(entry: BlobEntry, files: BlobFiles, infos: Iterable[ChunkInfo]) -> BlobSpace:
    """Return the uncompressed space of a blob.

    Args:
        entry: of the blob table.
        files: the blob as it is stored.
        infos: what the bootstrap's chunk table has of this blob.

    Raises:
        UnsupportedFeature: the space cannot be made of this blob alone.
        FormatError, IntegrityError, CodecError: blob and bootstrap do not fit together.
        NydusError: what the readers raise.
    """
    found = BlobFeatures(entry.features) & _UNSUPPORTED
    if found:
        kinds = ", ".join((feature.name or "").lower() for feature in found)
        raise UnsupportedFeature("a disk of such blobs", blob=entry.id, got=kinds)
    retrying = BlobFiles(_Retrying(files.data), _Retrying(files.tables))
    with error_context(blob=entry.id):
        if entry.features & BlobFeatures.TARFS:
            return _TarSpace(entry, retrying.data)
        return _NativeSpace(entry, retrying, infos)
