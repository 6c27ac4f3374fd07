"""Check the data blobs of an image, wherever a backend has them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from builder.blobfiles import BlobProvider, open_blob
from builder.chunkreader import read_chunk, require_plain
from erofs import (
    AnyBootstrap,
    Bootstrap,
    BootstrapV5,
    Chunk,
    NydusError,
)
from erofs.blobcheck import check_blob
from erofs.check import ERROR, WARNING, Finding
from erofs.rafs import BlobEntry, BlobFeatures, ChunkInfo
from erofs.view import ReadAt

__all__ = ["check_data"]

_WINDOW = 1 << 20

_Progress = Callable[[int], None] | None


def check_data(
    image: AnyBootstrap,
    ids: Sequence[str],
    blobs: BlobProvider,
    bootstrap: Path | None = None,
    *,
    progress: _Progress = None,
) -> Iterator[tuple[str, Finding]]:
    """Yield (blob id, finding) after reading every chunk of every blob; nothing means all is well.

    A blob of a kind that cannot be checked is an error. Memory is bounded by the tables of
    one blob; for v5, which has its chunks in the inodes, by those of all. `bootstrap` is the
    file of the image, which may hold tables. `progress` is called with numbers of content bytes.
    Raises `OSError` when reading fails in a way that is not about one blob.
    """
    chunks = _chunks_v5(image) if isinstance(image, BootstrapV5) else []
    for blob_id, entry in zip(ids, image.blobs, strict=True):
        try:
            require_plain(entry)
            reader, tables = open_blob(entry, blob_id, blobs, bootstrap)
            reader.size()
            tables.size()
        except NydusError as error:
            yield blob_id, Finding(ERROR, error.reason)
            continue
        if entry.features & BlobFeatures.TARFS:
            yield from ((blob_id, finding) for finding in _check_tar(entry, reader, progress))
            continue
        findings = (
            check_blob(entry, reader, image, tables=tables, data=True, progress=progress)
            if isinstance(image, Bootstrap)
            else _check_chunks(entry, reader, chunks[entry.blob_index], progress)
        )
        for finding in findings:
            yield blob_id, finding


def _check_tar(entry: BlobEntry, reader: ReadAt, progress: _Progress) -> Iterator[Finding]:
    """Compare a tar with its length and its id, which is all that is known of it."""
    if reader.size() != entry.compressed_size:
        text = f"{reader.size()} bytes, expected {entry.compressed_size}"
        yield Finding(ERROR, f"tar of another length: {text}")
        return
    state = hashlib.sha256()
    for start in range(0, entry.compressed_size, _WINDOW):
        data = reader.read_at(start, min(_WINDOW, entry.compressed_size - start))
        state.update(data)
        if progress is not None:
            progress(len(data))
    if state.hexdigest() != entry.id:
        # The snapshotter names it by the digest of the compressed layer (spec 6.1).
        text = f"the tar's SHA-256 is {state.hexdigest()}, so its id proves nothing"
        yield Finding(WARNING, text)


def _chunks_v5(image: BootstrapV5) -> list[list[ChunkInfo]]:
    """Return the chunks that files refer to, for each blob, in the order in which they lie."""
    places: list[dict[int, ChunkInfo]] = [{} for _ in image.blobs]
    for _, inode in image.walk():
        if inode.is_regular:
            for info in inode.file_chunks():
                places[info.blob_index][info.compressed_offset] = info
    return [[chunks[offset] for offset in sorted(chunks)] for chunks in places]


def _check_chunks(
    entry: BlobEntry, reader: ReadAt, chunks: Sequence[ChunkInfo], progress: _Progress
) -> Iterator[Finding]:
    if reader.size() < entry.compressed_size:
        text = f"{reader.size()} bytes, expected {entry.compressed_size}"
        yield Finding(ERROR, f"stored blob is too short: {text}")
    for info in chunks:
        try:
            data = read_chunk(reader, entry, Chunk.from_info(info))
        except NydusError as error:
            yield Finding(
                ERROR, f"chunk {info.chunk_index}: {error.reason}", None, info.compressed_offset
            )
            continue
        if progress is not None:
            progress(len(data))
