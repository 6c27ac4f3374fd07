"""Translate the metadata of RAFS v5 to v6, over the same blobs.

v5 chunks lie anywhere in the uncompressed space, but EROFS maps whole blocks, so every
chunk gets a place of its own in the data file that the kernel sees. Pure: nothing is
written, and the same image always gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from erofs.errors import CorruptStructure, UnsupportedFeature
from erofs.layout import BLOCK_SIZE
from erofs.load import load_nodes
from erofs.rafs import BlobEntry, BlobFeatures, ChunkInfo, SuperFlags
from erofs.tree import Chunk, Node
from erofs.v5.image import BootstrapV5
from erofs.view import align_down, align_up
from erofs.writer import BootstrapSpec, write_bootstrap

__all__ = ["PlacedBlob", "Translation", "translate"]

_ID_MAX = 64
_NOT_PLAIN = (
    BlobFeatures.CHUNK_INFO_V2
    | BlobFeatures.ZRAN
    | BlobFeatures.SEPARATE
    | BlobFeatures.BATCH
    | BlobFeatures.ENCRYPTED
    | BlobFeatures.EXTERNAL
)
# What a compression table of version 1 has for each chunk. The blob has no such table, but
# readers of v6 want to know its size.
_TABLE_ENTRY_SIZE = 16


class PlacedBlob(NamedTuple):
    """A blob as the v6 metadata has it, and its chunks in the order of their places.

    A chunk's `compressed_offset`, `compressed_size` and `digest` are v5's, its
    `uncompressed_offset` is where it belongs in the data file, whose size is
    `entry.uncompressed_size`. Chunks begin and end in blocks of their own, gaps are nobody's.

    With `is_stable`, place and index of a chunk follow from the blob alone: two images that
    share it agree, whichever of its chunks they know. Otherwise the data file is this
    image's own.
    """

    entry: BlobEntry
    chunks: tuple[ChunkInfo, ...]
    is_stable: bool


class Translation(NamedTuple):
    """A v6 bootstrap, and its blobs in the order of its device table."""

    bootstrap: bytes
    blobs: tuple[PlacedBlob, ...]


def translate(image: BootstrapV5) -> Translation:
    """Return the tree of a v5 image as v6 metadata that refers to the same stored chunks.

    Blobs that no file refers to are left out. The result is for a kernel mount over data
    files that are filled by these places; the blobs lack the compression table that others
    want of a v6 image.

    Raises:
        FormatError: the image is broken, or has what EROFS or v6 cannot hold.
    """
    nodes = load_nodes(image)
    root = next(iter(nodes.values()))
    chunks: dict[int, list[Chunk]] = {}
    for chunk in _unify(nodes.values()):
        chunks.setdefault(chunk.blob_index, []).append(chunk)
    blobs = [
        _place(image.blobs[index], chunks[index], number)
        for number, index in enumerate(sorted(chunks))
    ]
    listed = (nodes.get(nid) for nid in image.prefetch_nids if blobs)
    spec = BootstrapSpec(
        root=root,
        blobs=[blob.entry for blob in blobs],
        chunk_size=image.chunk_size,
        compressor=image.compressor,
        digester=image.digester,
        prefetch=[node for node in listed if node is not None],
        explicit_owners=SuperFlags.EXPLICIT_UID_GID in image.flags,
    )
    return Translation(write_bootstrap(spec), tuple(blobs))


def _unify(nodes: Iterable[Node]) -> list[Chunk]:
    """Let files refer to one chunk for each digest in a blob, as v6 has it; return the chunks."""
    known: dict[tuple[int, bytes], Chunk] = {}
    files = [node for node in nodes if node.chunks]
    for node in files:
        for chunk in node.chunks:
            key = (chunk.blob_index, chunk.digest)
            first = known.setdefault(key, chunk)
            if first.uncompressed_size != chunk.uncompressed_size:
                raise CorruptStructure(
                    "one digest for chunks of two sizes",
                    expected=first.uncompressed_size,
                    got=chunk.uncompressed_size,
                )
            if chunk.compressed_offset < first.compressed_offset:
                known[key] = chunk
    for node in files:
        node.chunks = [known[chunk.blob_index, chunk.digest] for chunk in node.chunks]
    return list(known.values())


def _place(entry: BlobEntry, chunks: list[Chunk], index: int) -> PlacedBlob:
    """Give the chunks of one blob their places, and the blob its place in the new table."""
    if entry.features & _NOT_PLAIN:
        raise UnsupportedFeature("blob features", blob=entry.id, got=f"{entry.features:#x}")
    if not 0 < len(entry.blob_id) <= _ID_MAX:
        raise UnsupportedFeature("blob id of this length", blob=entry.id, got=len(entry.blob_id))
    is_stable = _follow_from_blob(entry, chunks)
    chunks.sort(key=lambda chunk: chunk.chunk_index if is_stable else chunk.compressed_offset)
    if is_stable:
        count = entry.chunk_count
        size = align_up(entry.uncompressed_size, BLOCK_SIZE) + BLOCK_SIZE * count
        for chunk in chunks:
            # Enough room for the chunk before to end in a block of its own.
            start = align_down(chunk.uncompressed_offset, BLOCK_SIZE)
            chunk.uncompressed_offset = start + BLOCK_SIZE * chunk.chunk_index
    else:
        count, size = len(chunks), 0
        for number, chunk in enumerate(chunks):
            chunk.chunk_index, chunk.uncompressed_offset = number, size
            size = align_up(size + chunk.uncompressed_size, BLOCK_SIZE)
    end = max(chunk.compressed_offset + chunk.compressed_size for chunk in chunks)
    stored = entry.compressed_size or end
    for chunk in chunks:
        chunk.blob_index = index
    placed = entry._replace(
        blob_index=index,
        chunk_count=count,
        features=BlobFeatures.ALIGNED,
        compressed_size=stored,
        uncompressed_size=size,
        ci_offset=stored,
        ci_compressed_size=_TABLE_ENTRY_SIZE * count,
        ci_uncompressed_size=_TABLE_ENTRY_SIZE * count,
    )
    return PlacedBlob(placed, tuple(chunk.info() for chunk in chunks), is_stable)


def _follow_from_blob(entry: BlobEntry, chunks: list[Chunk]) -> bool:
    """Tell whether indexes and uncompressed offsets number the blob's chunks, as builders do."""
    ordered = sorted(chunks, key=lambda chunk: chunk.chunk_index)
    last = ordered[-1]
    if (
        last.chunk_index >= entry.chunk_count
        or last.uncompressed_offset + last.uncompressed_size > entry.uncompressed_size
    ):
        return False
    return all(
        left.chunk_index < right.chunk_index
        and left.uncompressed_offset + left.uncompressed_size <= right.uncompressed_offset
        for left, right in pairwise(ordered)
    )
