"""Change an image whose chunks exist already: copy chunks to a new blob, write the metadata."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from builder.blob import BlobFormat, BlobWriter, Stored
from builder.bootstrap import blob_ids, open_source_image
from builder.chunkdict import foreign_blobs
from builder.chunkreader import BlobProvider, ChunkReader
from builder.errors import BuildError
from builder.listing import log_features
from builder.output import OutputFile
from erofs import Bootstrap, BootstrapSpec, Chunk, Node, write_bootstrap
from erofs.cipher import BlobCipher
from erofs.errors import error_context
from erofs.load import load_nodes
from erofs.rafs import BlobEntry, BlobFeatures, Compressor, Digester, SuperFlags

__all__ = ["BlobCopy", "LoadedImage", "load_image"]

BLOB_MODE = 0o600
IN_FLIGHT_BYTES = 32 * 1024 * 1024


@dataclass(slots=True)
class LoadedImage:
    """An image in memory, to be changed and written again.

    `nodes` are by inode number, the root first; `ids` are those under which blobs are stored.
    """

    nodes: dict[int, Node]
    blobs: list[BlobEntry]
    ids: list[str]
    prefetch: list[Node]
    chunk_size: int
    compressor: Compressor
    digester: Digester
    explicit_owners: bool

    @property
    def root(self) -> Node:
        """The root directory."""
        return next(iter(self.nodes.values()))

    def reader(self, blobs: BlobProvider) -> ChunkReader:
        """Return a reader of the chunks that the image has now."""
        return ChunkReader(list(self.blobs), list(self.ids), blobs)

    def form(self, *, encrypted: bool, framed: bool = False) -> BlobFormat:
        """Return how a new blob of the image is written."""
        compressor = self.compressor
        if compressor is Compressor.GZIP:
            # That of layers which are only referred to.
            compressor = Compressor.ZSTD
        return BlobFormat(
            compressor,
            self.digester,
            self.chunk_size,
            cipher=BlobCipher.generate() if encrypted else None,
            framed=framed,
        )

    def write(self, blobs: Sequence[BlobEntry]) -> bytes:
        """Return the bootstrap of the image with another blob table."""
        return write_bootstrap(
            BootstrapSpec(
                root=self.root,
                blobs=list(blobs),
                chunk_size=self.chunk_size,
                compressor=self.compressor,
                digester=self.digester,
                prefetch=self.prefetch if blobs else (),
                explicit_owners=self.explicit_owners,
                encrypted=any(blob.cipher for blob in blobs),
            )
        )


def load_image(path: Path) -> LoadedImage:
    """Load an image that is to be changed.

    Raises:
        BuildError: it cannot be opened, or is of a kind that is not written this way.
        FormatError: it is broken.
    """
    with open_source_image(path) as opened, error_context(path=path):
        log_features(opened)
        if not isinstance(opened, Bootstrap):
            raise BuildError("RAFS v5 is not written: `unpack` it and `create` v6")
        if opened.is_tarfs:
            raise BuildError("tarfs has its data in a tar that stays as it is")
        nodes = load_nodes(opened)
        prefetch = [nodes[nid] for nid in opened.prefetch_nids if nid in nodes]
        return LoadedImage(
            nodes,
            foreign_blobs(opened, path),
            blob_ids(opened, path),
            prefetch,
            opened.chunk_size,
            opened.compressor,
            opened.digester,
            bool(opened.flags & SuperFlags.EXPLICIT_UID_GID),
        )


class BlobCopy:
    """A new blob that gets chunks of others, verified on the way; a context manager.

    Leaving it without `commit` removes what was written.

    Args:
        directory: where the blob will be, under its id.
        form: how it is written.
        reader: of the chunks as they are.
        progress: called with the number of content bytes after each chunk.
    """

    def __init__(
        self,
        directory: Path,
        form: BlobFormat,
        reader: ChunkReader,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        if not directory.is_dir():
            raise BuildError("directory to store blobs does not exist", path=directory)
        self._form = form
        self._reader = reader
        self._progress = progress
        self._output = OutputFile(directory, BLOB_MODE)
        self._writer = BlobWriter(self._output, form)
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, "copy")
        self._queue: deque[tuple[Chunk, bytes | memoryview, Future[Stored]]] = deque()
        self._in_flight = 0

    def copy(self, chunk: Chunk, blob_index: int) -> Chunk:
        """Add the content of a chunk; return its twin in this blob, complete after `seal`.

        Raises:
            NydusError: it cannot be read, or is not what it must be.
        """
        data = self._reader.read(chunk)
        twin = Chunk(*chunk.info())
        twin.blob_index = blob_index
        twin.compressed_offset = twin.compressed_size = 0
        self._queue.append((twin, data, self._pool.submit(self._form.encode, data)))
        self._in_flight += len(data)
        while self._in_flight > IN_FLIGHT_BYTES:
            self._write()
        return twin

    def _write(self) -> None:
        twin, data, job = self._queue.popleft()
        self._in_flight -= len(data)
        self._writer.add_chunk(twin, data, job.result())
        if self._progress is not None:
            self._progress(len(data))

    def seal(self) -> BlobEntry:
        """End the blob and return its table entry; raise `BuildError`."""
        while self._queue:
            self._write()
        entry = self._writer.finish_data()
        if entry is None:
            raise BuildError("new blob without chunks")
        blob_id = self._writer.blob_id()
        self._output.sync()
        return entry._replace(blob_id=blob_id.encode("ascii"))

    def commit(self, entry: BlobEntry) -> Path:
        """Make the blob durable under its id; raise `BuildError`."""
        return self._output.commit(entry.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._output.__exit__(kind, *rest)


def is_encrypted(blob: BlobEntry) -> bool:
    """Tell whether the content of a blob is protected, so that copies have to be."""
    return bool(blob.features & BlobFeatures.ENCRYPTED)
