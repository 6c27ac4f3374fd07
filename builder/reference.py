"""Build over an original layer: only tables are written, the chunks stay in it (spec 4.10).

The layer is a tar, or a gzip file with one; it is read once, front to back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from builder.blob import BlobFormat, BlobWriter, CacheSink, Data, Place, Sink, Stored, pack_v1
from builder.blocksahead import BlocksAhead
from builder.child import can_fork
from builder.chunker import Chunker, ChunkerStats, ContentReader, Deduplication, Piece
from builder.errors import BuildError
from builder.source.measuring import Layer, MeasuredStream, measured_layer
from builder.source.opening import drain, open_source, source_name
from builder.source.options import SourceOptions
from builder.source.tar import load_tar
from builder.source.unpacking import is_gzip, is_zstd
from builder.tarstream import ByteStream
from builder.zran import BlockStream, ZranPlaces
from erofs import Chunk, Node, codec
from erofs.blobmeta import MAX_COMPRESSED_SIZE_V2, CiFlags, CompressionInfoV2
from erofs.rafs import MAX_COMPRESSED_SIZE, BlobEntry, BlobFeatures, ChunkFlags, Compressor

if TYPE_CHECKING:
    from builder.stargz import StargzToc

__all__ = ["ReferenceChunker", "ReferenceWriter", "load_layer", "refer_to_members"]

_MAGIC_BYTES = 4
_CI_ZRAN = int(CiFlags.COMPRESSED | CiFlags.ZRAN)
_CI_HAS_CRC = int(CiFlags.HAS_CRC)


class Places(Protocol):
    """Tells where the bytes of chunks are in the layer."""

    def begin_chunk(self) -> None:
        """Note that the next bytes which are read belong to a chunk."""

    def end_chunk(self) -> Place:
        """Return where the bytes are that were read since then."""


class _TarPlaces:
    """Places in a tar that is not compressed."""

    def __init__(self, stream: MeasuredStream) -> None:
        self._stream = stream
        self._start = 0

    def begin_chunk(self) -> None:
        self._start = self._stream.position

    def end_chunk(self) -> Place:
        return Place(self._start, self._stream.position - self._start)


class ReferenceWriter(BlobWriter):
    """Writes the tables of a blob whose chunks are in a layer.

    What `set_layer` takes has to be known before `finish_data`.

    Args:
        output, form, cache: as for `BlobWriter`.
        members: chunks are in members of gzip of their own.
    """

    def __init__(
        self,
        output: Sink,
        form: BlobFormat,
        cache: CacheSink | None = None,
        *,
        members: bool = False,
    ) -> None:
        super().__init__(output, form, cache)
        # What readers know members of gzip by is that their table is of version 1 (spec 4.10).
        self._is_v2 = not members
        self.features |= BlobFeatures.SEPARATE
        if self._is_v2:
            self.features |= BlobFeatures.CHUNK_INFO_V2
        self._layer = Layer("", 0)
        self._dictionaries = b""

    def set_layer(self, layer: Layer, zran: ZranPlaces | None) -> None:
        """Take over what is known when the layer has been read.

        Raises:
            BuildError: it is larger than readers take.
        """
        if layer.size > MAX_COMPRESSED_SIZE:
            raise BuildError("layer is too large", expected=MAX_COMPRESSED_SIZE, got=layer.size)
        self._layer = layer
        if zran is not None:
            self.features |= BlobFeatures.ZRAN
            self._contexts = list(zran.contexts)
            self._dictionaries = bytes(zran.dictionaries)

    def add_chunk(self, chunk: Chunk, data: Data, stored: Stored) -> None:
        """Note a chunk and fill in its place; nothing is written.

        Raises:
            BuildError: the blob is full, or the chunk too large for the table.
        """
        place = stored.place
        if place is None:
            raise BuildError("chunk without a place in the layer")
        if place.size > MAX_COMPRESSED_SIZE_V2:
            raise BuildError(
                "chunk that does not compress is too large for the table of such a blob",
                chunk=self.chunk_count,
                expected="a smaller --chunk-size",
            )
        self._place(chunk, data)
        chunk.compressed_offset, chunk.compressed_size = place.offset, place.size
        if stored.is_compressed:
            chunk.flags |= ChunkFlags.COMPRESSED
        self._table += self._pack_place(chunk, place) if self._is_v2 else pack_v1(chunk)

    @staticmethod
    def _pack_place(chunk: Chunk, place: Place) -> bytes:
        if place.context is None:
            flags, extra = (_CI_HAS_CRC if chunk.crc32c else 0), (chunk.crc32c, 0)
        else:
            flags, extra = _CI_ZRAN, (place.data, place.context)
        return CompressionInfoV2(
            chunk.uncompressed_offset, chunk.uncompressed_size, *place[:2], flags, *extra
        ).pack()

    def _pack_contexts(self) -> bytes:
        return super()._pack_contexts() + self._dictionaries

    def _encode_table(self, plain: bytes) -> tuple[Stored, Compressor]:
        compressed = codec.compress(Compressor.ZSTD, plain)
        if compressed is None:
            return Stored(plain, False), Compressor.NONE
        return Stored(compressed, True), Compressor.ZSTD

    def finish_data(self) -> BlobEntry | None:
        """Write compression table and digests; return the entry, which names the layer."""
        entry = super().finish_data()
        return None if entry is None else self._of_layer(entry)

    def _of_layer(self, entry: BlobEntry) -> BlobEntry:
        blob_id = self._layer.blob_id.encode("ascii")
        return entry._replace(blob_id=blob_id, compressed_size=self._layer.size)

    def seal(self, entry: BlobEntry, name: str | None) -> BlobEntry:
        """Return the entry of tables whose bootstrap is elsewhere, so that it finds them."""
        digest = bytes.fromhex(self.blob_id())
        return self._of_layer(entry)._replace(blob_meta_digest=digest, blob_meta_size=self.position)

    def file_name(self, entry: BlobEntry) -> str:
        """Return the name of the file with the tables."""
        return self.blob_id()

    @property
    def inlined(self) -> tuple[str, int]:
        """Id and size of the layer, also when bootstrap and tables are in one file."""
        return self._layer


class ReferenceChunker(Chunker):
    """Cuts files of a layer into chunks that stay where they are; `places` has to be set."""

    places: Places

    def add_file(self, node: Node, content: ContentReader) -> None:
        """Cut `node.size` bytes of `content`, and note their places; raise `BuildError`."""
        rest, chunk_size = node.size, self._form.chunk_size
        while rest:
            size = min(rest, chunk_size)
            self.places.begin_chunk()
            data = content.read(size)
            self.add_piece(Piece(node, data, place=self.places.end_chunk()))
            rest -= size

    def _store(self, pieces: Sequence[Piece]) -> list[Stored | None]:
        return [
            None if place is None else Stored(b"", place.context is not None, place)
            for place in (piece.place for piece in pieces)
        ]


def refer_to_members(
    toc: StargzToc,
    writer: ReferenceWriter,
    dedup: Deduplication,
    blob_id: str,
    data_size: int | None,
) -> ChunkerStats:
    """Give the files of an eStargz layer their chunks; return how many there are.

    Args:
        toc: what the layer has.
        writer: takes the new chunks.
        dedup: what is known before.
        blob_id: of the layer.
        data_size: of the layer, None for as much as its chunks need.

    Raises:
        BuildError: there are too many.
    """
    stats = ChunkerStats()
    end = 0
    for file in toc.files:
        for piece in file.chunks:
            stats.chunks += 1
            stats.content_bytes += piece.size
            end = max(end, piece.offset + piece.stored_size)
            key = (piece.digest, piece.size)
            chunk = dedup.find(key)
            if chunk is None:
                chunk = dedup.known[key] = dedup.new_chunk(*key)
                place = Place(piece.offset, piece.stored_size)
                writer.add_chunk(chunk, bytes(piece.size), Stored(b"", True, place))
            else:
                stats.duplicate_chunks += 1
                stats.duplicate_bytes += piece.size
            file.node.chunks.append(chunk)
    writer.set_layer(Layer(blob_id, data_size or end), None)
    return stats


class _LayerReader:
    """Reads the tar of a layer, however it is packed."""

    def __init__(
        self, name: str, chunker: ReferenceChunker, chunk_size: int, options: SourceOptions
    ) -> None:
        self._name = name
        self._chunker = chunker
        self._chunk_size = chunk_size
        self._options = options
        self.zran: ZranPlaces | None = None

    def _read(self, stream: ByteStream, places: Places) -> Node:
        self._chunker.places = places
        return load_tar(stream, self._name, self._chunker, self._options, in_place=True)

    def read_plain(self, measured: MeasuredStream) -> Node:
        return self._read(measured, _TarPlaces(measured))

    def read_gzip(self, measured: MeasuredStream) -> Node:
        with BlockStream(measured) as blocks:
            return self.read_blocks(blocks)

    def read_blocks(self, blocks: BlockStream | BlocksAhead) -> Node:
        self.zran = ZranPlaces(blocks, self._chunk_size)
        root = self._read(blocks, self.zran)
        drain(blocks)
        return root


def load_layer(
    source: Path | BinaryIO,
    writer: ReferenceWriter,
    chunker: ReferenceChunker,
    chunk_size: int,
    options: SourceOptions,
    blob_id: str | None = None,
) -> Node:
    """Read a layer to its very end; return its tree.

    Args:
        source: the layer.
        writer: is told what the layer is.
        chunker: takes the content of files.
        chunk_size: that of the build.
        options: how the tar is read.
        blob_id: SHA-256 of the layer in hex, when the caller knows it and checks it.

    Raises:
        BuildError: it is broken, or of a kind that cannot be referred to.
    """
    reader = _LayerReader(source_name(source), chunker, chunk_size, options)
    with open_source(source) as raw:
        head = raw.peek(_MAGIC_BYTES)[:_MAGIC_BYTES]
        if is_zstd(head):
            raise BuildError("zstd cannot be read from the middle: convert it with targz-rafs")
        if not is_gzip(head):
            root, layer = measured_layer(raw, reader.read_plain, digested=blob_id is None)
        elif isinstance(source, Path) and can_fork():
            with BlocksAhead(raw, chunk_size, digested=blob_id is None) as ahead:
                root = reader.read_blocks(ahead)
            layer = ahead.layer
        else:
            root, layer = measured_layer(raw, reader.read_gzip, digested=blob_id is None)
    writer.set_layer(layer if blob_id is None else layer._replace(blob_id=blob_id), reader.zran)
    return root
