"""Turn an image back into a tar, as a stream: some mebibytes of content are in memory."""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from builder.behind import WriteBehind
from builder.bootstrap import blob_ids, load_tree, open_any_bootstrap
from builder.chunkreader import BlobProvider, ChunkReader
from builder.errors import BuildError
from builder.listing import log_features, readable
from builder.output import OutputFile
from builder.readahead import ReadAhead
from builder.tarmember import BLOCK_SIZE, END_OF_ARCHIVE, fits_tar, pack_member
from erofs import Chunk, Node
from erofs.errors import error_context
from erofs.tree import iter_names

__all__ = ["UnpackResult", "unpack"]

logger = logging.getLogger(__name__)

TAR_MODE = 0o644


class Sink(Protocol):
    """Where the tar goes."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Append all bytes, or raise."""


class UnpackResult:
    """What was written: members, bytes of file content, and paths that tar cannot hold."""

    def __init__(self) -> None:
        self.members = self.content_bytes = self.left_out = 0


class _Packer:
    def __init__(
        self, sink: Sink, chunks: ReadAhead, progress: Callable[[int], None] | None
    ) -> None:
        self._sink = sink
        self._chunks = chunks
        self._progress = progress
        self._first_names: dict[int, bytes] = {}
        self.result = UnpackResult()

    def pack(self, root: Node) -> None:
        for directory, name, node in iter_names(root):
            path = (directory + b"/" + name)[1:]
            if path or not _is_default_root(node):
                with error_context(entry=b"/" + path):
                    self._add(path, node)
        self._sink.write(END_OF_ARCHIVE)

    def _add(self, path: bytes, node: Node) -> None:
        if not fits_tar(node):
            logger.warning("%s is a socket, which tar cannot hold: left out", readable(b"/" + path))
            self.result.left_out += 1
            return
        self.result.members += 1
        if not stat.S_ISREG(node.mode):
            self._sink.write(pack_member(path, node))
            return
        first = self._first_names.setdefault(id(node), path)
        if first != path:
            self._sink.write(pack_member(path, node, first))
            return
        self._sink.write(pack_member(path, node))
        for _ in node.chunks:
            data = self._chunks.read()
            self._sink.write(data)
            self.result.content_bytes += len(data)
            if self._progress is not None:
                self._progress(len(data))
        self._sink.write(bytes(-node.size % BLOCK_SIZE))


def _is_default_root(root: Node) -> bool:
    """Tell whether the root says nothing that building from a tar without one would not say."""
    times = (root.mtime, root.mtime_nsec)
    return (
        root.mode == stat.S_IFDIR | 0o755
        and (root.uid, root.gid, *times) == (0, 0, 0, 0)
        and not root.xattrs
    )


def unpack(
    bootstrap: Path,
    output: Path | BinaryIO,
    blobs: BlobProvider,
    *,
    inlined: bool = False,
    adjust: Callable[[Node], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> UnpackResult:
    """Write the tree of an image as a tar in PAX format.

    Names come in the visiting order of spec rafs-v6 3.1, so that an image built from the
    result has its content in the order of one built from a directory. Every chunk is
    verified before it is written. Whiteouts stay the files that they are in the image.

    Args:
        bootstrap: the metadata; with `inlined` also a blob that carries it.
        output: a path, where the tar appears whole or not at all (a FIFO takes it as it is
            made), or a stream, which is not closed.
        blobs: where the data is, by blob id.
        inlined: the metadata may be inside of a blob.
        adjust: changes the tree before it is written.
        progress: called with the number of content bytes after each chunk.

    Raises:
        FormatError: the bootstrap is broken, or of a kind whose data is not read yet.
        IntegrityError: a chunk is not what the bootstrap promises.
        BuildError: the output cannot be written.
        OSError: the bootstrap cannot be read, or the stream not be written.
    """
    with open_any_bootstrap(bootstrap, inlined=inlined) as image:
        log_features(image)
        chunks = ChunkReader(image.blobs, blob_ids(image, bootstrap), blobs, bootstrap)
        with error_context(path=bootstrap):
            root = load_tree(image)
    if adjust is not None:
        adjust(root)
    if not isinstance(output, Path):
        return _write(root, output, chunks, progress)
    if output.is_dir():
        raise BuildError("is a directory, a file is wanted", path=output)
    with OutputFile(output, TAR_MODE) as file:
        if file.is_file:
            with WriteBehind(file.write_all) as behind:
                result = _write(root, behind, chunks, progress)
        else:
            result = _write(root, file, chunks, progress)
        file.commit()
    return result


def _write(
    root: Node, sink: Sink, chunks: ChunkReader, progress: Callable[[int], None] | None
) -> UnpackResult:
    with ReadAhead(chunks, _content(root)) as ahead:
        packer = _Packer(sink, ahead, progress)
        packer.pack(root)
    return packer.result


def _content(root: Node) -> Iterator[Chunk]:
    """Yield the chunks of all files in the order of their first names."""
    done: set[int] = set()
    for _, _, node in iter_names(root):
        if node.chunks and stat.S_ISREG(node.mode) and id(node) not in done:
            done.add(id(node))
            yield from node.chunks
