"""Index a tar: the image's files are pieces of the tar itself (spec rafs-v6 6.1).

The tar is read once, front to back, and neither copied nor changed. Which entries it has is
found by `builder.source.tar`; here is where their content lies, and what the whole tar is.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, NamedTuple

from builder.errors import BuildError
from builder.source.measuring import MeasuredStream, measured_layer
from builder.source.opening import open_tar, source_name
from builder.source.options import SourceOptions
from builder.source.tar import load_tar
from erofs import Chunk, Node
from erofs.blobmeta import DIGEST_SIZE
from erofs.rafs import (
    MAX_CHUNKS_PER_BLOB,
    MAX_COMPRESSED_SIZE,
    BlobEntry,
    BlobFeatures,
    Compressor,
    Digester,
)

__all__ = ["TarIndex", "index_tar"]

_NO_DIGEST = bytes(DIGEST_SIZE)


class TarIndex(NamedTuple):
    """The tree of a tar, its blob table entry (None without file data) and its length in bytes."""

    root: Node
    blob: BlobEntry | None
    size: int


class _Pieces:
    """Takes files by their place in the tar; their content is skipped, not read.

    Equal pieces are not joined: nothing says that they are equal (spec 4.3).
    """

    def __init__(self, stream: MeasuredStream, chunk_size: int) -> None:
        self._stream = stream
        self._chunk_size = chunk_size
        self.count = 0

    def add_file(self, node: Node, content: object) -> None:
        start = self._stream.position
        for offset in range(0, node.size, self._chunk_size):
            size = min(self._chunk_size, node.size - offset)
            node.chunks.append(self._piece(start + offset, size, offset))

    def _piece(self, tar_offset: int, size: int, file_offset: int) -> Chunk:
        if self.count >= MAX_CHUNKS_PER_BLOB:
            raise BuildError("too many chunks for one tar", expected=MAX_CHUNKS_PER_BLOB)
        index = self.count
        self.count += 1
        return Chunk(
            digest=_NO_DIGEST,
            blob_index=0,
            flags=0,
            compressed_size=size,
            uncompressed_size=size,
            compressed_offset=tar_offset,
            uncompressed_offset=tar_offset,
            file_offset=file_offset,
            chunk_index=index,
            crc32c=0,
        )


def index_tar(
    source: Path | BinaryIO, chunk_size: int, options: SourceOptions, blob_id: str | None = None
) -> TarIndex:
    """Read a plain tar to its very end and return what a bootstrap over it needs.

    Args:
        source: a file, FIFO or stream.
        chunk_size: bytes of the file pieces that the bootstrap lists.
        blob_id: name of the tar among the blobs, None for its SHA-256.

    Raises:
        BuildError: the tar is broken, compressed, or larger than readers take.
    """

    def read(measured: MeasuredStream) -> tuple[Node, int]:
        pieces = _Pieces(measured, chunk_size)
        root = load_tar(measured, source_name(source), pieces, options, in_place=True)
        return root, pieces.count

    with open_tar(source, unpack=False) as stream:
        (root, count), layer = measured_layer(stream, read, digested=blob_id is None)
    size = layer.size
    if size > MAX_COMPRESSED_SIZE:
        raise BuildError(
            "tar is too large", path=source_name(source), expected=MAX_COMPRESSED_SIZE, got=size
        )
    if not count:
        return TarIndex(root, None, size)
    entry = _entry(blob_id or layer.blob_id, size, count, chunk_size)
    return TarIndex(root, entry, size)


def _entry(blob_id: str, size: int, pieces: int, chunk_size: int) -> BlobEntry:
    return BlobEntry(
        blob_id=blob_id.encode("ascii"),
        blob_index=0,
        chunk_size=chunk_size,
        chunk_count=pieces,
        compressor=Compressor.NONE,
        digester=Digester.SHA256,
        features=BlobFeatures.TARFS | BlobFeatures.CAP_TAR_TOC,
        compressed_size=size,
        uncompressed_size=size,
        blob_toc_size=0,
        # There is no such table; the real builder leaves its default here.
        ci_compressor=Compressor.LZ4_BLOCK,
        ci_offset=0,
        ci_compressed_size=0,
        ci_uncompressed_size=0,
    )
