"""Read chunks of an image out of its data blobs, and let none through that is not itself.

Where blobs come from is the business of whoever gives a `BlobProvider`, for instance a
backend of `fscache.backend`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from erofs import Chunk, CorruptStructure, IntegrityError, UnsupportedFeature, codec, digest
from erofs.errors import error_context
from erofs.rafs import (
    MAX_CHUNK_SIZE,
    BlobEntry,
    BlobFeatures,
    ChunkFlags,
    Compressor,
    Digester,
)
from erofs.view import ReadAt
from fscache.backend.retry import RetryPolicy

__all__ = ["BlobProvider", "ChunkReader", "read_chunk", "require_plain"]

_UNSUPPORTED = (
    BlobFeatures.BATCH
    | BlobFeatures.ZRAN
    | BlobFeatures.ENCRYPTED
    | BlobFeatures.TARFS
    | BlobFeatures.EXTERNAL
)


class BlobProvider(Protocol):
    """A place that holds blobs under their ids."""

    def open(self, blob_id: str) -> ReadAt:
        """Return a reader of one blob; raise `NydusError` when that id is refused."""


def require_plain(blob: BlobEntry) -> None:
    """Raise `UnsupportedFeature` unless the chunks lie in the blob one by one."""
    found = BlobFeatures(blob.features) & _UNSUPPORTED
    if found:
        kinds = ", ".join((feature.name or "").lower() for feature in found)
        raise UnsupportedFeature("reading data of such blobs", blob=blob.id, got=kinds)


def read_chunk(reader: ReadAt, blob: BlobEntry, chunk: Chunk) -> bytes | memoryview:
    """Return the content of a chunk, whose length and digest are right.

    Raises:
        CorruptStructure: the bootstrap gives it impossible sizes.
        UnsupportedFeature: it is encrypted, in a batch, or a hole.
        CodecError: it does not decompress.
        IntegrityError: it is not what the bootstrap promises.
        NydusError: what `reader` raises.
    """
    size, stored_size = chunk.uncompressed_size, chunk.compressed_size
    with error_context(blob=blob.id, chunk=chunk.chunk_index, offset=chunk.compressed_offset):
        if chunk.flags & ~(ChunkFlags.COMPRESSED | ChunkFlags.HAS_CRC):
            raise UnsupportedFeature("reading a chunk of this kind", got=f"flags {chunk.flags:#x}")
        is_compressed = bool(chunk.flags & ChunkFlags.COMPRESSED)
        if not 0 < size <= blob.chunk_size or not 0 < stored_size <= MAX_CHUNK_SIZE:
            raise CorruptStructure("chunk of an impossible size", got=f"{stored_size}/{size}")
        if not is_compressed and stored_size != size:
            raise CorruptStructure("stored size of a plain chunk", expected=size, got=stored_size)
        data = reader.read_at(chunk.compressed_offset, stored_size)
        if is_compressed:
            data = codec.decompress(Compressor(blob.compressor), data, size)
        found = digest.digest(Digester(blob.digester), data)
        if found != chunk.digest:
            raise IntegrityError(
                "chunk has another digest", expected=chunk.digest.hex(), got=found.hex()
            )
    return data


class ChunkReader:
    """Reads the chunks of one image, repeating what fails for the moment.

    Args:
        blobs: the blob table.
        ids: under which the blobs are stored, in table order.
        provider: where they are; its readers are opened on first use.
    """

    def __init__(
        self, blobs: Sequence[BlobEntry], ids: Sequence[str], provider: BlobProvider
    ) -> None:
        for blob in blobs:
            require_plain(blob)
        self._blobs = [
            blob._replace(blob_id=name.encode("ascii", "backslashreplace"))
            for blob, name in zip(blobs, ids, strict=True)
        ]
        self._ids = ids
        self._provider = provider
        self._readers: dict[int, ReadAt] = {}
        self._policy = RetryPolicy()
        self._stop = threading.Event()
        # A file of zeros has one chunk many times over.
        self._last: tuple[Chunk, bytes | memoryview] | None = None

    def read(self, chunk: Chunk) -> bytes | memoryview:
        """Return the verified content of a chunk; raise as `read_chunk` does."""
        if self._last is not None and self._last[0] is chunk:
            return self._last[1]
        index = chunk.blob_index
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = self._provider.open(self._ids[index])
        blob = self._blobs[index]
        data = self._policy.run(lambda: read_chunk(reader, blob, chunk), self._stop)
        self._last = (chunk, data)
        return data
