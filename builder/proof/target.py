"""The tree of a Nydus image, and whether its blobs hold what the bootstrap promises."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from builder.blobfiles import BlobProvider
from builder.bootstrap import blob_ids, load_tree, open_any_bootstrap
from builder.chunkreader import ChunkReader
from builder.proof.entry import Entry
from erofs import AnyBootstrap, Chunk, Node
from erofs.errors import error_context
from erofs.tree import iter_names
from erofs.view import ReadAt

__all__ = ["ReadOn", "TargetTree", "load_target"]

logger = logging.getLogger(__name__)

_WINDOW_BYTES = 4 << 20
_READERS = 2


class _Window:
    """A blob that is read on: what is asked for next is mostly there; for one thread."""

    def __init__(self, blob: ReadAt) -> None:
        self._blob = blob
        self._size = blob.size()
        self._start = 0
        self._data: bytes | memoryview = b""

    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes | memoryview:
        end = self._start + len(self._data)
        if not (self._start <= offset and offset + length <= end):
            if length >= _WINDOW_BYTES or offset + length > self._size:
                return self._blob.read_at(offset, length)
            self._data = memoryview(
                self._blob.read_at(offset, min(_WINDOW_BYTES, self._size - offset))
            )
            self._start = offset
        place = offset - self._start
        return self._data[place : place + length]


class ReadOn:
    """Blobs that are read from front to back by small ranges: large ones are fetched."""

    def __init__(self, provider: BlobProvider) -> None:
        self._provider = provider

    def open(self, blob_id: str) -> ReadAt:
        """Return a reader for one thread; raise `NydusError`."""
        return _Window(self._provider.open(blob_id))


class TargetTree:
    """A loaded image: its tree as entries, and its chunks.

    Args:
        path: of the bootstrap.
        root: of the tree.
        opened: the image, which may be closed afterwards.
    """

    def __init__(self, path: Path, root: Node, opened: AnyBootstrap) -> None:
        self._path = path
        self._blobs = opened.blobs
        self._ids = blob_ids(opened, path)
        self.chunk_bytes = opened.chunk_size
        self.digester = opened.digester
        self._chunks: dict[int, Chunk] = {}
        self.root = self._entries(root)

    def _entries(self, root: Node) -> Entry:
        made: dict[int, Entry] = {}
        top = Entry.directory()
        directories: dict[bytes, Entry] = {}
        for directory, name, node in iter_names(root):
            entry = made.get(id(node))
            if entry is None:
                entry = made[id(node)] = self._entry(node)
            if not name:
                top = entry
                directories[b""] = entry
                continue
            children = directories[directory].children
            assert children is not None  # noqa: S101 - it is a directory
            children[name] = entry
            if entry.children is not None:
                directories[directory + b"/" + name] = entry
        return top

    def _entry(self, node: Node) -> Entry:
        for chunk in node.chunks:
            self._chunks[id(chunk)] = chunk
        return Entry(
            node.mode,
            node.uid,
            node.gid,
            node.mtime,
            node.rdev,
            0 if node.is_dir else node.size,
            node.target,
            dict(node.xattrs),
            tuple(chunk.digest for chunk in node.chunks),
            {} if node.is_dir else None,
        )

    def verify_blobs(
        self, provider: BlobProvider, progress: Callable[[int], None] | None = None
    ) -> int:
        """Read every chunk that a file has, each once; return the bytes of their content.

        Raises:
            IntegrityError: one is not what the bootstrap promises; says which.
            NydusError: one cannot be read.
        """
        chunks = sorted(
            self._chunks.values(), key=lambda one: (one.blob_index, one.uncompressed_offset)
        )
        stop = threading.Event()

        def read(part: Sequence[Chunk]) -> int:
            reader = ChunkReader(self._blobs, self._ids, ReadOn(provider), self._path)
            total = 0
            for chunk in part:
                if stop.is_set():
                    break
                size = len(reader.read(chunk))
                total += size
                if progress is not None:
                    progress(size)
            return total

        with ThreadPoolExecutor(_READERS, "verify") as pool:
            futures = [pool.submit(read, part) for part in _halves(chunks)]
            try:
                return sum(future.result() for future in futures)
            finally:
                stop.set()


def _halves(chunks: Sequence[Chunk]) -> Iterable[Sequence[Chunk]]:
    """Cut a list where half of the content is reached."""
    total, seen = sum(chunk.uncompressed_size for chunk in chunks), 0
    for number, chunk in enumerate(chunks):
        seen += chunk.uncompressed_size
        if seen * _READERS >= total:
            return chunks[: number + 1], chunks[number + 1 :]
    return [chunks]


def load_target(path: Path) -> TargetTree:
    """Load a bootstrap; raise `FormatError`."""
    with error_context(path=path), open_any_bootstrap(path) as image:
        return TargetTree(path, load_tree(image), image)
