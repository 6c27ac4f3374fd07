"""Write a data blob: chunks, then its compression table, digests, bootstrap and ToC.

The order of the sections, what is framed and what each digest covers follow spec
rafs-v6 4.1 to 4.9.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from builder.behind import WriteBehind, joined
from builder.errors import BuildError
from erofs import Chunk, blobmeta, codec, framing, rafs
from erofs.blobmeta import CiFlags, CompressionInfoV2, CompressionTableHeader
from erofs.cipher import BlobCipher
from erofs.contexts import BatchContext, ZranContext
from erofs.framing import TocEntry
from erofs.rafs import BlobEntry, BlobFeatures, ChunkFlags, Compressor, Digester
from erofs.values import Value
from erofs.view import align_up

__all__ = ["BlobFormat", "BlobWriter", "CacheSink", "Data", "Place", "Stored", "pack_v1"]

Data = bytes | bytearray | memoryview

# Plain numbers: combining members of a flag class takes longer than all else here.
_COMPRESSED, _ENCRYPTED, _HAS_CRC = (
    int(flag) for flag in (ChunkFlags.COMPRESSED, ChunkFlags.ENCRYPTED, ChunkFlags.HAS_CRC)
)
_CI_BATCHED = int(CiFlags.COMPRESSED | CiFlags.BATCH)
_CI_COMPRESSED, _CI_ENCRYPTED, _CI_HAS_CRC = (
    int(flag) for flag in (CiFlags.COMPRESSED, CiFlags.ENCRYPTED, CiFlags.HAS_CRC)
)


class Sink(Protocol):
    """Where the bytes of the blob go."""

    def write(self, data: Data) -> None:
        """Append bytes."""


class CacheSink(Protocol):
    """Takes what a daemon's cache would have of the blob (spec 4.4)."""

    def write_chunk(self, data: Data) -> None:
        """Append the content of the next chunk, in whole pages."""

    def write_table(self, plain: bytes, header: bytes) -> None:
        """Take the plain compression table and its header."""


class Place(NamedTuple):
    """Where a chunk of an original layer is: offset and size there; of gzip the zran context.

    `data` is the place in what the context gives.
    """

    offset: int
    size: int
    context: int | None = None
    data: int = 0


class Stored(NamedTuple):
    """What is put into the blob for a chunk or a batch; with `place` it is in a layer already."""

    data: Data
    is_compressed: bool
    place: Place | None = None


class BlobFormat(Value):
    """How a blob is written.

    Args:
        compressor: of chunks and of the compression table.
        inline_bootstrap: the bootstrap will be put into the blob.
        toc: a digest array and a table of contents are wanted.
        batch_size: bytes of small chunks that are compressed together, 0 for none.
        cipher: encrypts chunks and the compression table.
        offset: where the blob will begin in what holds it; only without framing.
        framed: tar headers behind the sections even if no feature tells, which readers need
            not know.
    """

    compressor: Compressor
    digester: Digester
    chunk_size: int
    inline_bootstrap: bool = False
    toc: bool = False
    batch_size: int = 0
    cipher: BlobCipher | None = None
    offset: int = 0
    framed: bool = False

    @property
    def features(self) -> BlobFeatures:
        """The feature word of the blob (spec 4.2)."""
        features = BlobFeatures.ALIGNED | BlobFeatures.CAP_TAR_TOC
        if self.inline_bootstrap:
            features |= BlobFeatures.HAS_TAR_HEADER | BlobFeatures.INLINED_FS_META
        if self.toc:
            features |= BlobFeatures.HAS_TAR_HEADER
            features |= BlobFeatures.HAS_TOC | BlobFeatures.INLINED_CHUNK_DIGEST
        if self.batch_size:
            features |= BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.BATCH
        if self.cipher is not None:
            features |= BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.ENCRYPTED
        return features

    def encode(self, data: Data) -> Stored:
        """Compress and encrypt; what would not become smaller stays as it is."""
        compressed = codec.compress(self.compressor, memoryview(data))
        stored = data if compressed is None else compressed
        if self.cipher is not None:
            stored = self.cipher.encrypt(stored)
        return Stored(stored, compressed is not None)

    def encode_all(self, pieces: Sequence[Data]) -> list[Stored]:
        """Do as `encode` does with each of many pieces."""
        if self.cipher is not None:
            return [self.encode(piece) for piece in pieces]
        return [
            Stored(piece, False) if compressed is None else Stored(compressed, True)
            for piece, compressed in zip(
                pieces, codec.compress_all(self.compressor, pieces), strict=True
            )
        ]


class BlobWriter:
    """Appends chunks and records where they are, then seals the blob section by section.

    Args:
        output: takes the bytes, in order.
        form: how to write.
        cache: takes the content of the chunks, too.
    """

    def __init__(self, output: Sink, form: BlobFormat, cache: CacheSink | None = None) -> None:
        self._output = output
        self._form = form
        self._cache = cache
        self.features = form.features
        self._is_v2 = bool(self.features & BlobFeatures.CHUNK_INFO_V2)
        self._framed = form.framed or bool(self.features & BlobFeatures.HAS_TAR_HEADER)
        self._own_flags = _ENCRYPTED if form.cipher is not None else 0
        self._table = bytearray()
        self._contexts: list[BatchContext | ZranContext] = []
        self._digests = bytearray()
        self._toc_entries: list[TocEntry] = []
        self._id_hash = hashlib.sha256()
        self._behind: WriteBehind | None = None
        self.position = form.offset
        self.chunk_count = 0
        self.uncompressed_size = 0
        self.content_size = 0

    def _write(self, data: Data) -> None:
        self._append(data)
        self.position += len(data)

    def add_chunk(self, chunk: Chunk, data: Data, stored: Stored) -> None:
        """Append a chunk that is stored by itself, and fill in its place.

        Args:
            chunk: has digest, CRC and uncompressed size already.
            data: its content, which only a cache needs, and `stored` what `BlobFormat.encode`
                made of it.

        Raises:
            BuildError: the blob is full.
        """
        self.place_chunk(chunk, len(stored.data), stored.is_compressed, data)
        self._put(stored.data)

    def place_chunk(
        self, chunk: Chunk, stored_size: int, is_compressed: bool, data: Data = b""
    ) -> None:
        """Fill in the place of the next chunk, whose stored bytes are to follow.

        Args:
            chunk: has digest, CRC and uncompressed size already.
            stored_size: in bytes, and `is_compressed` tells whether that is not the content.
            data: the content, for a cache.

        Raises:
            BuildError: the blob is full.
        """
        self._place(chunk, data)
        chunk.compressed_offset = self.position
        chunk.compressed_size = stored_size
        if is_compressed:
            chunk.flags |= _COMPRESSED
        self._advance(stored_size)
        self._table += self._pack_v2(chunk) if self._is_v2 else pack_v1(chunk)

    def write_placed(self, parts: Sequence[Data], release: Callable[[], None]) -> None:
        """Append the stored bytes of chunks that `place_chunk` was told of.

        Args:
            parts: all of them, in order, in pieces that are large where that is possible.
            release: is called when they are not needed any more.

        Raises:
            BuildError: the output cannot be written.
        """
        if self._behind is not None:
            self._behind.write_all(parts, release)
            return
        for part in parts:
            self._append(part)
        release()

    def _place(self, chunk: Chunk, data: Data) -> None:
        """Give a chunk its number and its place in the uncompressed space."""
        if self.chunk_count >= rafs.MAX_CHUNKS_PER_BLOB:
            raise BuildError("too many chunks for one blob", expected=rafs.MAX_CHUNKS_PER_BLOB)
        chunk.chunk_index = self.chunk_count
        chunk.uncompressed_offset = self.uncompressed_size
        chunk.flags = self._own_flags | (_HAS_CRC if chunk.crc32c else 0)
        self._digests += chunk.digest
        self.chunk_count += 1
        self.uncompressed_size += align_up(chunk.uncompressed_size, blobmeta.CI_ALIGNMENT)
        self.content_size += chunk.uncompressed_size
        if self._cache is not None:
            self._cache.write_chunk(data)

    def _advance(self, size: int) -> None:
        if self.position + size > blobmeta.MAX_COMPRESSED_OFFSET:
            raise BuildError("too much data for one blob", expected="at most 1 TiB")
        self.position += size

    def _put(self, data: Data) -> None:
        if self._behind is None:
            self._append(data)
        else:
            self._behind.write(data)

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Write and digest chunks behind the block, which ends when all are written.

        The output has to be a file (see `WriteBehind`), and what is added may not be changed.

        Raises:
            BuildError: the output cannot be written; also from adding.
        """
        with WriteBehind(joined(self._append)) as behind:
            self._behind = behind
            try:
                yield
            finally:
                self._behind = None

    def _append(self, data: Data) -> None:
        self._output.write(data)
        self._id_hash.update(data)

    def _pack_v2(self, chunk: Chunk) -> bytes:
        if chunk.compressed_size > blobmeta.MAX_COMPRESSED_SIZE_V2:
            raise BuildError(
                "chunk that does not compress is too large for the table of such a blob",
                chunk=chunk.chunk_index,
                expected="a smaller --chunk-size",
            )
        flags = _CI_HAS_CRC if chunk.crc32c else 0
        if chunk.flags & _COMPRESSED:
            flags |= _CI_COMPRESSED
        if self._own_flags:
            flags |= _CI_ENCRYPTED
        return CompressionInfoV2(
            chunk.uncompressed_offset,
            chunk.uncompressed_size,
            chunk.compressed_offset,
            chunk.compressed_size,
            flags,
            chunk.crc32c,
        ).pack()

    def add_batch(self, chunks: Iterable[Chunk], data: Data, stored: Stored) -> None:
        """Append chunks that are stored together; `data` is their content, one after the other.

        The bootstrap does not know where they are (spec 2.5): their stored place stays 0.

        Raises:
            BuildError: the blob is full.
        """
        flags = _CI_BATCHED | _CI_ENCRYPTED if self._own_flags else _CI_BATCHED
        start, content = 0, memoryview(data)
        for chunk in chunks:
            size = chunk.uncompressed_size
            self._place(chunk, content[start : start + size])
            self._table += CompressionInfoV2(
                chunk.uncompressed_offset,
                size,
                self.position,
                0,
                flags,
                start,
                len(self._contexts),
            ).pack()
            start += size
        self._contexts.append(BatchContext(len(stored.data), len(data)))
        self._advance(len(stored.data))
        self._put(stored.data)

    def _end_section(self, name: bytes, size: int) -> None:
        if self._framed:
            self._write(framing.pack_section_header(name, size))

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
        if not self.chunk_count:
            return None
        if not self.features & BlobFeatures.SEPARATE:
            self._end_data()
        header = self._write_compression_table()
        if self._form.toc:
            self._write_digests()
        entry = BlobEntry(
            blob_id=b"",
            blob_index=0,
            chunk_size=self._form.chunk_size,
            chunk_count=self.chunk_count,
            compressor=self._form.compressor,
            digester=self._form.digester,
            features=self.features,
            compressed_size=self.position,
            uncompressed_size=self.uncompressed_size,
            blob_toc_size=0,
            ci_compressor=header.ci_compressor,
            ci_offset=header.ci_offset,
            ci_compressed_size=header.ci_compressed_size,
            ci_uncompressed_size=header.ci_uncompressed_size,
        )
        cipher = self._form.cipher
        return entry if cipher is None else entry._replace(**cipher.fields())

    def _end_data(self) -> None:
        data_size = self.position - self._form.offset
        self._end_section(framing.SECTION_BLOB, data_size)
        # The digest in the ToC covers the chunks and the header behind them (spec 4.6), so far
        # the same bytes as the id.
        self._add_toc_entry(
            framing.SECTION_BLOB, self._id_hash.digest(), 0, data_size,
            self.uncompressed_size, framing.TOC_NONE,
        )  # fmt: skip

    def _pack_contexts(self) -> bytes:
        """Return what lies behind the entries of the compression table."""
        return b"".join(context.pack() for context in self._contexts)

    def _encode_table(self, plain: bytes) -> tuple[Stored, Compressor]:
        stored = self._form.encode(plain)
        return stored, self._form.compressor if stored.is_compressed else Compressor.NONE

    def _write_compression_table(self) -> CompressionTableHeader:
        entries_size = len(self._table)
        plain = bytes(self._table) + self._pack_contexts()
        stored, compressor = self._encode_table(plain)
        header = CompressionTableHeader(
            self.features, compressor, self.chunk_count, self.position, len(stored.data), len(plain)
        )
        if self.features & (BlobFeatures.BATCH | BlobFeatures.ZRAN):
            header = header._replace(
                context_offset=entries_size,
                context_size=len(plain) - entries_size,
                context_count=len(self._contexts),
            )
        packed = header.pack()
        if self._cache is not None:
            self._cache.write_table(plain, packed)
        offset, cipher = self.position, self._form.cipher
        self._write(stored.data)
        self._write(packed if cipher is None else cipher.encrypt(packed))
        self._end_section(framing.SECTION_META, len(stored.data) + len(packed))
        # Digests in the ToC are over what is in plain (spec 4.6, 4.8).
        self._add_toc_entry(
            framing.SECTION_META, hashlib.sha256(plain).digest(), offset,
            len(stored.data), len(plain), _TOC_FLAGS[compressor],
        )  # fmt: skip
        self._add_toc_entry(
            framing.SECTION_META_HEADER, hashlib.sha256(packed).digest(),
            offset + len(stored.data), len(packed), len(packed), framing.TOC_NONE,
        )  # fmt: skip
        return header

    def _write_digests(self) -> None:
        offset, digests = self.position, bytes(self._digests)
        # The blob id leaves the digest array out, but not the header behind it (spec 4.7).
        self._output.write(digests)
        self.position += len(digests)
        self._end_section(framing.SECTION_DIGEST, len(digests))
        self._add_toc_entry(
            framing.SECTION_DIGEST, hashlib.sha256(digests).digest(), offset,
            len(digests), len(digests), framing.TOC_NONE,
        )  # fmt: skip

    def write_bootstrap(self, bootstrap: Data) -> None:
        """Put the bootstrap into the blob; compressed only when there is a ToC to say so."""
        packed = codec.compress(Compressor.ZSTD, memoryview(bootstrap)) if self._form.toc else None
        flags = framing.TOC_NONE if packed is None else framing.TOC_ZSTD
        stored: Data = bootstrap if packed is None else packed
        offset = self.position
        self._write(stored)
        self._end_section(framing.SECTION_BOOTSTRAP, len(stored))
        self._add_toc_entry(
            framing.SECTION_BOOTSTRAP, hashlib.sha256(bootstrap).digest(), offset,
            len(stored), len(bootstrap), flags,
        )  # fmt: skip

    def write_toc(self) -> bytes:
        """Write the table of contents and return what its digest covers."""
        toc = framing.pack_toc(self._toc_entries)
        self._write(toc)
        return toc

    def blob_id(self) -> str:
        """Return the id by content: the SHA-256 of all but the digest array, in hex."""
        return self._id_hash.hexdigest()

    def seal(self, entry: BlobEntry, name: str | None) -> BlobEntry:
        """Return the entry of a blob whose bootstrap is elsewhere; `name` goes before its own."""
        return entry._replace(blob_id=(name or self.blob_id()).encode("ascii"))

    def file_name(self, entry: BlobEntry) -> str:
        """Return the name of the file for a sealed entry."""
        return entry.id

    @property
    def inlined(self) -> tuple[str, int]:
        """Id and size of a blob with its bootstrap inside, as callers are told."""
        return self.blob_id(), self.position


def pack_v1(chunk: Chunk) -> bytes:
    """Return the entry of version 1 of a chunk that is placed."""
    return blobmeta.pack_entry_v1(
        chunk.uncompressed_offset,
        chunk.uncompressed_size - 1,
        chunk.compressed_offset,
        chunk.compressed_size - 1,
    )


_TOC_FLAGS = {
    Compressor.NONE: framing.TOC_NONE,
    Compressor.LZ4_BLOCK: framing.TOC_LZ4,
    Compressor.ZSTD: framing.TOC_ZSTD,
}
