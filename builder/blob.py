"""Write a data blob: chunks, then its compression table, digests, bootstrap and ToC.

The order of the sections, what is framed and what each digest covers follow spec
rafs-v6 4.1 to 4.7.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

from builder.errors import BuildError
from erofs import Chunk, blobmeta, codec, rafs
from erofs.blobmeta import CompressionInfo, CompressionTableHeader, TocEntry
from erofs.rafs import BlobEntry, BlobFeatures, ChunkFlags, Compressor, Digester
from erofs.view import align_up

__all__ = ["BlobWriter"]


class Sink(Protocol):
    """Where the bytes of the blob go."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""


class _Table(NamedTuple):
    """What the blob table says about the compression table."""

    compressor: int
    offset: int
    compressed_size: int
    uncompressed_size: int


class BlobWriter:
    """Appends chunks and records where they are, then seals the blob section by section.

    Args:
        output: takes the bytes, in order.
        compressor: of chunks and of the compression table.
        inline_bootstrap: the bootstrap will be put into the blob.
        toc: a digest array and a table of contents are wanted.
    """

    def __init__(
        self,
        output: Sink,
        compressor: Compressor,
        digester: Digester,
        chunk_size: int,
        *,
        inline_bootstrap: bool = False,
        toc: bool = False,
    ) -> None:
        self._output = output
        self._compressor = compressor
        self._digester = digester
        self._chunk_size = chunk_size
        self._inline = inline_bootstrap
        self._toc = toc
        self._framed = inline_bootstrap or toc
        self._entries: list[CompressionInfo] = []
        self._digests = bytearray()
        self._toc_entries: list[TocEntry] = []
        self._id_hash = hashlib.sha256()
        self.position = 0
        self.uncompressed_size = 0
        self.content_size = 0

    @property
    def chunk_count(self) -> int:
        """Number of chunks so far."""
        return len(self._entries)

    @property
    def features(self) -> BlobFeatures:
        """The feature word of the blob (spec 4.2)."""
        features = BlobFeatures.ALIGNED | BlobFeatures.CAP_TAR_TOC
        if self._framed:
            features |= BlobFeatures.HAS_TAR_HEADER
        if self._inline:
            features |= BlobFeatures.INLINED_FS_META
        if self._toc:
            features |= BlobFeatures.HAS_TOC | BlobFeatures.INLINED_CHUNK_DIGEST
        return features

    def _write(self, data: bytes | bytearray | memoryview, *, in_id: bool = True) -> None:
        self._output.write(data)
        if in_id:
            self._id_hash.update(data)
        self.position += len(data)

    def append_chunk(
        self, data: bytes | bytearray, compressed: bytes | None, digest: bytes, crc32c: int
    ) -> Chunk:
        """Append a new chunk; `compressed` None stores `data` as it is.

        Raises:
            BuildError: the blob is full.
        """
        index = len(self._entries)
        if index >= rafs.MAX_CHUNKS_PER_BLOB:
            raise BuildError("too many chunks for one blob", expected=rafs.MAX_CHUNKS_PER_BLOB)
        stored = data if compressed is None else compressed
        if self.position + len(stored) > blobmeta.MAX_COMPRESSED_OFFSET:
            raise BuildError("too much data for one blob", expected="at most 1 TiB")
        info = CompressionInfo(self.uncompressed_size, len(data), self.position, len(stored))
        self._write(stored)
        self._entries.append(info)
        self._digests += digest
        self.uncompressed_size += align_up(len(data), blobmeta.CI_ALIGNMENT)
        self.content_size += len(data)
        return Chunk(
            digest=digest,
            blob_index=0,
            flags=ChunkFlags.HAS_CRC | (ChunkFlags.COMPRESSED if info.is_compressed else 0),
            compressed_size=info.compressed_size,
            uncompressed_size=info.uncompressed_size,
            compressed_offset=info.compressed_offset,
            uncompressed_offset=info.uncompressed_offset,
            file_offset=0,
            chunk_index=index,
            crc32c=crc32c,
        )

    def _end_section(self, name: bytes, size: int) -> None:
        if self._framed:
            self._write(blobmeta.pack_section_header(name, size))

    def _add_toc_entry(
        self, name: bytes, digest: bytes, offset: int, csize: int, usize: int, flags: int
    ) -> None:
        self._toc_entries.append(TocEntry(flags, name, digest, offset, csize, usize))

    def finish_data(self) -> BlobEntry | None:
        """End the chunks; write the compression table and the digests.

        Returns:
            The blob table entry, its id still blank; None when there is no data, and then
            nothing was written.
        """
        if not self._entries:
            return None
        data_size = self.position
        self._end_section(blobmeta.SECTION_BLOB, data_size)
        # The digest in the ToC covers the chunks and the header behind them (spec 4.6), so far
        # the same bytes as the id.
        self._add_toc_entry(
            blobmeta.SECTION_BLOB, self._id_hash.digest(), 0, data_size,
            self.uncompressed_size, blobmeta.TOC_NONE,
        )  # fmt: skip
        table = self._write_compression_table()
        if self._toc:
            self._write_digests()
        return BlobEntry(
            blob_id=b"",
            blob_index=0,
            chunk_size=self._chunk_size,
            chunk_count=len(self._entries),
            compressor=self._compressor,
            digester=self._digester,
            features=self.features,
            compressed_size=self.position,
            uncompressed_size=self.uncompressed_size,
            blob_toc_size=0,
            ci_compressor=table.compressor,
            ci_offset=table.offset,
            ci_compressed_size=table.compressed_size,
            ci_uncompressed_size=table.uncompressed_size,
        )

    def _write_compression_table(self) -> _Table:
        plain = b"".join(entry.pack() for entry in self._entries)
        stored = codec.compress(self._compressor, plain)
        compressor = Compressor.NONE if stored is None else self._compressor
        if stored is None:
            stored = plain
        table = _Table(compressor, self.position, len(stored), len(plain))
        header = CompressionTableHeader(self.features, compressor, len(self._entries), *table[1:])
        packed = header.pack()
        self._write(stored)
        self._write(packed)
        self._end_section(blobmeta.SECTION_META, len(stored) + len(packed))
        self._add_toc_entry(
            blobmeta.SECTION_META, hashlib.sha256(plain).digest(), table.offset,
            len(stored), len(plain), _TOC_FLAGS[compressor],
        )  # fmt: skip
        self._add_toc_entry(
            blobmeta.SECTION_META_HEADER, hashlib.sha256(packed).digest(),
            table.offset + len(stored), len(packed), len(packed), blobmeta.TOC_NONE,
        )  # fmt: skip
        return table

    def _write_digests(self) -> None:
        offset, digests = self.position, bytes(self._digests)
        # The blob id leaves the digest array out, but not the header behind it (spec 4.7).
        self._write(digests, in_id=False)
        self._end_section(blobmeta.SECTION_DIGEST, len(digests))
        self._add_toc_entry(
            blobmeta.SECTION_DIGEST, hashlib.sha256(digests).digest(), offset,
            len(digests), len(digests), blobmeta.TOC_NONE,
        )  # fmt: skip

    def write_bootstrap(self, bootstrap: bytes) -> None:
        """Put the bootstrap into the blob; compressed only when there is a ToC to say so."""
        stored = codec.compress(Compressor.ZSTD, bootstrap) if self._toc else None
        flags = blobmeta.TOC_NONE if stored is None else blobmeta.TOC_ZSTD
        if stored is None:
            stored = bootstrap
        offset = self.position
        self._write(stored)
        self._end_section(blobmeta.SECTION_BOOTSTRAP, len(stored))
        self._add_toc_entry(
            blobmeta.SECTION_BOOTSTRAP, hashlib.sha256(bootstrap).digest(), offset,
            len(stored), len(bootstrap), flags,
        )  # fmt: skip

    def write_toc(self) -> bytes:
        """Write the table of contents and return what its digest covers."""
        toc = blobmeta.pack_toc(self._toc_entries)
        self._write(toc)
        return toc

    def blob_id(self) -> str:
        """Return the id by content: the SHA-256 of all but the digest array, in hex."""
        return self._id_hash.hexdigest()


_TOC_FLAGS = {
    Compressor.NONE: blobmeta.TOC_NONE,
    Compressor.LZ4_BLOCK: blobmeta.TOC_LZ4,
    Compressor.ZSTD: blobmeta.TOC_ZSTD,
}
