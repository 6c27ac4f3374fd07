"""Build one layer or a whole filesystem: source → tree and blob → bootstrap."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from builder.blob import BlobWriter
from builder.chunker import Chunker, ChunkerStats
from builder.errors import BuildError
from builder.output import OutputFile, write_file
from builder.prefetch import PrefetchPolicy, files_below, parse_patterns, pattern_nodes
from builder.source.directory import ScannedDirectory
from builder.source.options import SourceOptions
from builder.source.tar import load_tar, open_tar, source_name
from erofs import BootstrapSpec, Node, write_bootstrap
from erofs.rafs import (
    DEFAULT_CHUNK_SIZE,
    INLINED_BLOB_ID,
    MAX_CHUNK_SIZE,
    MIN_CHUNK_SIZE,
    BlobEntry,
    Compressor,
    Digester,
)
from erofs.tree import iter_names

__all__ = ["BuildOptions", "BuildResult", "SourceType", "build", "write_bootstrap_file"]

BLOB_MODE = 0o600
BOOTSTRAP_FILE_MODE = 0o644
BOOTSTRAP_IN_DIRECTORY_MODE = 0o600


class SourceType(StrEnum):
    """Kinds of input."""

    DIRECTORY = "dir-rafs"
    TAR = "tar-rafs"


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What to build and where to put it.

    Args:
        bootstrap: path of the metadata; None puts it into `blob_dir` under its SHA-256.
        blob_dir: directory where the blob gets its id as name.
        blob: path of the blob: a file, or a FIFO that takes it as it is made.
        inline_bootstrap: put the metadata into the blob; then `bootstrap` must be None.
        blob_id: name to use in place of the SHA-256.
        toc: append digests and a table of contents to the blob.
        prefetch_patterns: absolute in-image paths, in order, used as the policy says.
        progress: called with the number of content bytes after each chunk.
        workers: threads for digests and compression; the bytes do not depend on it.
    """

    source_type: SourceType = SourceType.DIRECTORY
    bootstrap: Path | None = None
    blob_dir: Path | None = None
    blob: Path | None = None
    inline_bootstrap: bool = False
    blob_id: str | None = None
    toc: bool = False
    chunk_size: int = DEFAULT_CHUNK_SIZE
    compressor: Compressor = Compressor.ZSTD
    digester: Digester = Digester.BLAKE3
    source: SourceOptions = field(default_factory=SourceOptions)
    prefetch_policy: PrefetchPolicy = PrefetchPolicy.NONE
    prefetch_patterns: Sequence[bytes] = ()
    progress: Callable[[int], None] | None = None
    workers: int | None = None


@dataclass(slots=True)
class BuildResult:
    """What was built.

    `blobs` are the ids of the blob table in order (for inlined metadata: the id of the
    object that was written), `blob_size` the bytes of the new blob, 0 when there is none.
    """

    bootstrap: Path | None = None
    blobs: list[str] = field(default_factory=list)
    blob_path: Path | None = None
    blob_size: int = 0
    names: int = 0
    stats: ChunkerStats = field(default_factory=ChunkerStats)
    blob_content_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time that the block takes to `seconds`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - start


def _check_options(options: BuildOptions) -> None:
    size = options.chunk_size
    if size & (size - 1) or not MIN_CHUNK_SIZE <= size <= MAX_CHUNK_SIZE:
        raise BuildError("invalid chunk size", got=size)
    if options.blob_dir is not None and not options.blob_dir.is_dir():
        raise BuildError("directory to store blobs does not exist", path=options.blob_dir)
    if options.blob_dir is None and options.blob is None:
        raise BuildError("neither a blob nor a directory for it was given")
    if options.inline_bootstrap:
        if options.bootstrap is not None or options.blob_id is not None:
            raise BuildError("an inlined bootstrap has neither a path nor a blob id of its own")
    elif options.bootstrap is None and options.blob_dir is None:
        raise BuildError("neither a bootstrap nor a directory for it was given")
    if options.blob_id is not None and (
        not 0 < len(options.blob_id) < 65 or not options.blob_id.isascii() or "/" in options.blob_id
    ):
        raise BuildError("blob id of 1 to 64 ASCII characters without '/'", got=options.blob_id)


def _load(
    source: Path | BinaryIO, options: BuildOptions, chunker: Chunker, result: BuildResult
) -> Node:
    if options.source_type is SourceType.TAR:
        with open_tar(source) as stream:
            return load_tar(stream, source_name(source), chunker, options.source)
    if not isinstance(source, Path):
        raise BuildError("a directory is wanted, not a stream", path=source_name(source))
    with result.timed("load_from_directory"):
        directory = ScannedDirectory(source, options.source)
    first: list[Node] = []
    if options.prefetch_policy is PrefetchPolicy.BLOB:
        first = files_below(directory.root, parse_patterns(options.prefetch_patterns))
    directory.feed(chunker, first)
    return directory.root


def _settle_file_offsets(root: Node, chunk_size: int) -> int:
    """Give each chunk the offset of its last visited reference (spec 2.5); count the names."""
    names = 0
    for _, _, node in iter_names(root):
        names += 1
        for number, chunk in enumerate(node.chunks):
            chunk.file_offset = number * chunk_size
    return names


def _bootstrap(root: Node, blob: BlobEntry | None, options: BuildOptions) -> bytes:
    prefetch: list[Node] = []
    if blob is not None and options.prefetch_policy is PrefetchPolicy.FS:
        prefetch = pattern_nodes(root, parse_patterns(options.prefetch_patterns))
    return write_bootstrap(
        BootstrapSpec(
            root=root,
            blobs=[] if blob is None else [blob],
            chunk_size=options.chunk_size,
            compressor=options.compressor,
            digester=options.digester,
            prefetch=prefetch,
            explicit_owners=options.source.keep_owners,
        )
    )


def _seal_separate(
    writer: BlobWriter, entry: BlobEntry | None, options: BuildOptions
) -> BlobEntry | None:
    """End a blob whose bootstrap is a file of its own; return its final table entry."""
    if entry is None:
        return None
    if options.toc:
        toc = writer.write_toc()
        entry = entry._replace(
            blob_toc_size=len(toc),
            blob_toc_digest=hashlib.sha256(toc).digest(),
            compressed_size=writer.position,
        )
    blob_id = options.blob_id or writer.blob_id()
    return entry._replace(blob_id=blob_id.encode("ascii"))


def build(source: Path | BinaryIO, options: BuildOptions) -> BuildResult:
    """Build an image from a directory or a tar stream.

    Nothing appears under a final name before it is whole; on any error what was begun
    is removed again.

    Raises:
        BuildError: an option, the source or an output is at fault; says where.
        FormatError: the tree does not fit the format (for instance an unknown xattr).
    """
    _check_options(options)
    result = BuildResult()
    target = options.blob or options.blob_dir
    if target is None:
        raise BuildError("neither a blob nor a directory for it was given")
    with result.timed("total_build"), OutputFile(target, BLOB_MODE) as output:
        writer = BlobWriter(
            output,
            options.compressor,
            options.digester,
            options.chunk_size,
            inline_bootstrap=options.inline_bootstrap,
            toc=options.toc,
        )
        with (
            result.timed("build_tree"),
            Chunker(
                writer,
                options.compressor,
                options.digester,
                options.chunk_size,
                options.progress,
                options.workers,
            ) as chunker,
        ):
            root = _load(source, options, chunker, result)
            chunker.finish()
        result.stats = chunker.stats
        result.blob_content_bytes = writer.content_size
        result.names = _settle_file_offsets(root, options.chunk_size)
        _finish(root, writer, output, options, result)
    return result


def _finish(
    root: Node,
    writer: BlobWriter,
    output: OutputFile,
    options: BuildOptions,
    result: BuildResult,
) -> None:
    with result.timed("dump_blob"):
        entry = writer.finish_data()
    with result.timed("build_bootstrap"):
        if options.inline_bootstrap:
            if entry is not None:
                entry = entry._replace(blob_id=INLINED_BLOB_ID)
            writer.write_bootstrap(_bootstrap(root, entry, options))
            if options.toc:
                writer.write_toc()
        else:
            entry = _seal_separate(writer, entry, options)
            bootstrap = _bootstrap(root, entry, options)
    result.blob_size = writer.position
    with result.timed("dump_bootstrap"):
        if options.inline_bootstrap:
            name = writer.blob_id()
            result.blobs = [name]
            result.blob_path = output.commit(None if options.blob else name)
            return
        # Both are written before the first gets its name, so that a full disk leaves neither.
        target, mode, digest = _bootstrap_place(bootstrap, options.bootstrap, options.blob_dir)
        with OutputFile(target, mode) as bootstrap_output:
            bootstrap_output.write(bootstrap)
            bootstrap_output.sync()
            if entry is not None:
                result.blobs = [entry.id]
                result.blob_path = output.commit(None if options.blob else entry.id)
            result.bootstrap = bootstrap_output.commit(digest)


def _bootstrap_place(
    data: bytes, path: Path | None, directory: Path | None
) -> tuple[Path, int, str | None]:
    """Return target, mode and, for a directory, the name of a bootstrap: its SHA-256."""
    if path is not None:
        return path, BOOTSTRAP_FILE_MODE, None
    if directory is None:
        raise BuildError("neither a bootstrap nor a directory for it was given")
    return directory, BOOTSTRAP_IN_DIRECTORY_MODE, hashlib.sha256(data).hexdigest()


def write_bootstrap_file(data: bytes, path: Path | None, directory: Path | None) -> Path:
    """Write a bootstrap to `path`, or into `directory` under its SHA-256."""
    target, mode, name = _bootstrap_place(data, path, directory)
    return write_file(target, data, mode, name)
