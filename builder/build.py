"""Build one layer or a whole filesystem: source → tree and blob → bootstrap."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from builder.blob import BlobFormat, BlobWriter, Data
from builder.blobtable import BlobTable
from builder.cachefiles import CacheFiles, Discard, TableOnly
from builder.child import can_fork
from builder.chunker import Chunker, Deduplication
from builder.errors import BuildError
from builder.options import BlobSink, BuildOptions, BuildResult, SourceType, check_options
from builder.output import OutputFile, write_file
from builder.prefetch import PrefetchPolicy, files_below, parse_patterns, pattern_nodes
from builder.rangechunker import RangeChunker
from builder.source.opening import open_seekable_tar, open_tar, source_name
from builder.source.tar import load_tar
from erofs import BootstrapSpec, Node
from erofs.rafs import INLINED_BLOB_ID, BlobEntry, BlobFeatures, Compressor, Digester
from erofs.tree import iter_directories
from erofs.writer import emit_bootstrap

if TYPE_CHECKING:
    from builder.external import ExternalTree
    from builder.parent import ParentImage

__all__ = ["BuildOptions", "BuildResult", "SourceType", "build", "write_bootstrap_file"]

BLOB_MODE = 0o600
BLOB_FILE_MODE = 0o644
BOOTSTRAP_FILE_MODE = 0o644
BOOTSTRAP_IN_DIRECTORY_MODE = 0o600
EXTERNAL_SUFFIX = ".external"


class _Outputs:
    """Where a blob goes: a file, a directory, or cache files."""

    def __init__(
        self,
        blob: OutputFile | None,
        cache: CacheFiles | TableOnly | None,
        is_named: bool,
        sink: BlobSink | None = None,
    ) -> None:
        self.blob = blob
        self.cache = cache
        self._is_named = is_named
        self.sink = sink or blob or Discard()

    def commit(self, blob_id: str, file_name: str) -> Path | None:
        """Make the blob durable under its name, and the cache by the blob's; raise `BuildError`."""
        path = None if self.cache is None else self.cache.commit(blob_id)
        if self.blob is None:
            return path
        return self.blob.commit(None if self._is_named else file_name)

    def commit_empty(self) -> None:
        """Leave an empty file where a blob was asked for by name; raise `BuildError`.

        Callers go on with that name, and what lies there may be the blob of an earlier build.
        """
        if self.blob is not None and self._is_named:
            self.blob.commit()


@contextmanager
def _open_outputs(options: BuildOptions) -> Iterator[_Outputs]:
    if options.blob_cache_dir is not None:
        with CacheFiles(options.blob_cache_dir) as cache:
            yield _Outputs(None, cache, False)
        return
    table = None if options.blob_meta is None else TableOnly(options.blob_meta)
    target = options.blob or options.blob_dir
    if target is None:
        yield _Outputs(None, table, False, options.blob_sink)
        return
    mode = BLOB_MODE if options.blob is None else BLOB_FILE_MODE
    with OutputFile(target, mode) as blob:
        yield _Outputs(blob, table, options.blob is not None)


def _form(options: BuildOptions) -> BlobFormat:
    return BlobFormat(
        compressor=options.compressor,
        digester=options.digester,
        chunk_size=options.chunk_size,
        inline_bootstrap=options.inline_bootstrap,
        toc=options.toc,
        batch_size=options.batch_size,
        cipher=options.encryption,
        offset=options.blob_offset,
    )


class _Builder:
    """One build: what was loaded, the tree, and the blob table."""

    def __init__(self, options: BuildOptions, result: BuildResult) -> None:
        self.options = options
        self.result = result
        self.parent: ParentImage | None = None
        self.external: ExternalTree | None = None
        self.empty_root = Node.directory()
        self.dedup = Deduplication()

    def load_others(self) -> None:
        """Load the parent and the chunk dictionary; raise `BuildError`, `FormatError`."""
        options = self.options
        if options.parent_bootstrap is None and options.chunk_dict is None:
            return
        # Imported here, as all that only some sources need: each takes its time.
        from builder.chunkdict import load_dictionary
        from builder.consistency import Profile
        from builder.parent import load_parent

        profile = Profile(options.chunk_size, options.source.keep_owners)
        if options.parent_bootstrap is not None:
            with self.result.timed("load_tree_from_bootstrap"):
                self.parent = load_parent(options.parent_bootstrap, profile, options.digester)
            self.dedup.table = BlobTable(self.parent.blobs)
            self.dedup.known.update(self.parent.known)
        if options.chunk_dict is not None:
            with self.result.timed("import_chunk_dict"):
                self.dedup.dictionary = load_dictionary(
                    options.chunk_dict,
                    profile,
                    options.digester,
                    () if self.parent is None else self.parent.blobs,
                )

    def store(self, source: Path | BinaryIO, outputs: _Outputs) -> tuple[Node, BlobWriter]:
        """Put the content of the source into a blob; raise `BuildError`."""
        options, form = self.options, _form(self.options)
        writer = BlobWriter(outputs.sink, form, outputs.cache)
        is_file = outputs.blob is not None and outputs.blob.is_file
        with (
            self.result.timed("build_tree"),
            writer.in_background() if is_file else nullcontext(),
            self._seekable(source, outputs) as tar,
            RangeChunker(writer, form, self.dedup, options.progress, options.workers, tar.fileno())
            if tar is not None
            else Chunker(writer, form, self.dedup, options.progress, options.workers) as chunker,
        ):
            root = self._load(source, chunker) if tar is None else self._walk(tar, source, chunker)
            chunker.finish()
        self.result.stats = chunker.stats
        return root, writer

    def _seekable(
        self, source: Path | BinaryIO, outputs: _Outputs
    ) -> AbstractContextManager[io.BufferedReader[Any] | None]:
        """Open a tar whose content other processes may read; raise `BuildError`."""
        # A cache takes the content itself.
        if self.options.source_type is SourceType.TAR and outputs.cache is None and can_fork():
            return open_seekable_tar(source)
        return nullcontext()

    def _walk(self, tar: io.BufferedReader[Any], source: Path | BinaryIO, chunker: Chunker) -> Node:
        """Read a tar that lies in a file, but not its content; raise `BuildError`."""
        length = os.fstat(tar.fileno()).st_size
        return load_tar(
            tar, source_name(source), chunker, self.options.source,
            seek=lambda count: tar.seek(count, os.SEEK_CUR), length=length,
        )  # fmt: skip

    def refer(self, source: Path | BinaryIO, outputs: _Outputs) -> tuple[Node, BlobWriter]:
        """Make tables for the content of the source, which stays there; raise `BuildError`."""
        from builder.reference import ReferenceChunker, ReferenceWriter, load_layer

        options, form = self.options, _form(self.options)
        writer = ReferenceWriter(outputs.sink, form, outputs.cache)
        with (
            self.result.timed("build_tree"),
            ReferenceChunker(
                writer, form, self.dedup, options.progress, options.workers
            ) as chunker,
        ):
            root = load_layer(
                source, writer, chunker, options.chunk_size, options.source, options.layer_digest
            )
            chunker.finish()
        self.result.stats = chunker.stats
        return root, writer

    def refer_to_toc(self, source: Path | BinaryIO, outputs: _Outputs) -> tuple[Node, BlobWriter]:
        """Make tables for a layer of which only the table of contents is there."""
        from builder.reference import ReferenceWriter, refer_to_members
        from builder.stargz import read_toc

        options = self.options
        writer = ReferenceWriter(outputs.sink, _form(options), outputs.cache, members=True)
        with self.result.timed("build_tree"):
            toc = read_toc(source, options.chunk_size, options.blob_data_size, options.source)
            self.result.stats = refer_to_members(
                toc, writer, self.dedup, options.blob_id or "", options.blob_data_size
            )
        return toc.root, writer

    def _load(self, source: Path | BinaryIO, chunker: Chunker) -> Node:
        """Read the source and feed its content to the chunker; raise `BuildError`."""
        options, result = self.options, self.result
        if options.source_type is SourceType.TAR:
            with open_tar(source) as stream:
                return load_tar(stream, source_name(source), chunker, options.source)
        if not isinstance(source, Path):
            raise BuildError("a directory is wanted, not a stream", path=source_name(source))
        from builder.external import split_external
        from builder.source.directory import ScannedDirectory

        with result.timed("load_from_directory"):
            directory = ScannedDirectory(source, options.source, lowest=self.parent is None)
        result.scanned = directory.entries
        self.empty_root = directory.root.copy()
        if options.attributes is not None:
            self.external = split_external(
                directory.root, options.attributes, options.chunk_size, options.digester
            )
        first: list[Node] = []
        if options.prefetch_policy is not PrefetchPolicy.NONE:
            first = files_below(directory.root, options.prefetch_patterns)
        directory.feed(chunker, first)
        return directory.root

    def combine(self, root: Node) -> Node:
        """Lay the tree over the parent's, and settle what depends on the whole tree."""
        chunk_size = self.options.chunk_size
        if self.parent is None:
            self.result.names = _settle_file_offsets(root, chunk_size)
            return root
        with self.result.timed("merge_bootstrap"):
            root = self.parent.overlaid(root, self.options.source.whiteout_spec)
        self.result.names = self.parent.settle_file_offsets(root, chunk_size)
        return root


def _settle_file_offsets(root: Node, chunk_size: int) -> int:
    """Give each chunk the offset of its last visited reference (spec 2.5); count the names."""
    names = 1
    for _, directory in iter_directories(root):
        children = directory.node.entries
        names += len(children)
        for name in directory.names:
            for number, chunk in enumerate(children[name].chunks):
                chunk.file_offset = number * chunk_size
    return names


def _prefetch_table(root: Node, options: BuildOptions) -> list[Node]:
    """Return what the table names; patterns that name nothing are warned about in any case."""
    if options.prefetch_policy is PrefetchPolicy.NONE:
        return []
    nodes = pattern_nodes(root, options.prefetch_patterns)
    return nodes if options.prefetch_policy is PrefetchPolicy.FS else []


def _bootstrap(root: Node, blobs: list[BlobEntry], options: BuildOptions) -> memoryview:
    return emit_bootstrap(
        BootstrapSpec(
            root=root,
            blobs=blobs,
            chunk_size=options.chunk_size,
            compressor=options.compressor,
            digester=options.digester,
            prefetch=_prefetch_table(root, options) if blobs else [],
            explicit_owners=options.source.keep_owners,
            tarfs=options.source_type is SourceType.TARFS,
            encrypted=options.encryption is not None,
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
    return writer.seal(entry, options.blob_id)


def build(source: Path | BinaryIO, options: BuildOptions) -> BuildResult:
    """Build an image from a directory or a tar stream.

    Nothing appears under a final name before it is whole; on any error what was begun
    is removed again.

    Raises:
        BuildError: an option, the source or an output is at fault; says where.
        FormatError: the tree does not fit the format (for instance an unknown xattr), or a
            parent or dictionary is broken.
    """
    if options.blob_cache_dir is not None:
        options = options._replace(compressor=Compressor.NONE)
    check_options(options)
    if options.prefetch_policy is not PrefetchPolicy.NONE:
        patterns = parse_patterns(options.prefetch_patterns)
        options = options._replace(prefetch_patterns=patterns)
    if options.source_type is SourceType.TARFS:
        return _build_tarfs(source, options)
    if options.source_type.is_reference:
        # What is in a cache is not compressed, whatever the layer is.
        compressor = Compressor.NONE if options.blob_cache_dir else Compressor.GZIP
        options = options._replace(compressor=compressor, digester=Digester.SHA256)
    result = BuildResult(options.compressor)
    with result.timed("total_build"), _open_outputs(options) as outputs:
        builder = _Builder(options, result)
        builder.load_others()
        if options.source_type is SourceType.ESTARGZTOC_REF:
            root, writer = builder.refer_to_toc(source, outputs)
        elif options.source_type.is_reference:
            root, writer = builder.refer(source, outputs)
        else:
            root, writer = builder.store(source, outputs)
        result.blob_content_bytes = writer.content_size
        _finish(builder, builder.combine(root), writer, outputs)
    return result


def _finish(builder: _Builder, root: Node, writer: BlobWriter, outputs: _Outputs) -> None:
    with builder.result.timed("dump_blob"):
        own = writer.finish_data()
    if builder.options.inline_bootstrap:
        _finish_inlined(builder, root, writer, own, outputs)
    else:
        _finish_separate(builder, root, writer, own, outputs)


def _finish_inlined(
    builder: _Builder, root: Node, writer: BlobWriter, own: BlobEntry | None, outputs: _Outputs
) -> None:
    options, result = builder.options, builder.result
    with result.timed("build_bootstrap"):
        # A layer has its name already, whatever becomes of the tables.
        if own is not None and not own.features & BlobFeatures.SEPARATE:
            own = own._replace(blob_id=INLINED_BLOB_ID)
        blobs = builder.dedup.table.entries(own)
        _inline(writer, _bootstrap(root, blobs, options), options.toc)
    with result.timed("dump_bootstrap"), ExitStack() as stack:
        name, size = writer.inlined
        is_own = [own is not None and blob.blob_id == own.blob_id for blob in blobs]
        result.blobs = [name if own else blob.id for own, blob in zip(is_own, blobs, strict=True)]
        if own is None:
            # Without data there is still an object, which the table does not name.
            result.blobs.append(name)
        own_is_last = own is None or is_own[-1]
        result.blob_size = size if own_is_last else blobs[-1].compressed_size
        external = None
        if options.external_blob is not None:
            external = stack.enter_context(OutputFile(options.external_blob, BLOB_FILE_MODE))
            _inline(BlobWriter(external, _form(options)), _external_bootstrap(builder), options.toc)
            external.sync()
        elif builder.external is not None:
            raise BuildError("external files need --external-blob for their metadata")
        result.blob_path = outputs.commit(writer.blob_id(), writer.blob_id())
        if external is not None:
            external.commit()


def _inline(writer: BlobWriter, bootstrap: Data, toc: bool) -> None:
    writer.write_bootstrap(bootstrap)
    if toc:
        writer.write_toc()


def _finish_separate(
    builder: _Builder, root: Node, writer: BlobWriter, own: BlobEntry | None, outputs: _Outputs
) -> None:
    """Write bootstraps and give everything its name.

    All is written before the first gets its name, so that a full disk leaves nothing.
    """
    options, result = builder.options, builder.result
    with result.timed("build_bootstrap"):
        own = _seal_separate(writer, own, options)
        blobs = builder.dedup.table.entries(own)
        bootstrap = _bootstrap(root, blobs, options)
    result.blobs = _names(blobs)
    result.blob_size = blobs[-1].compressed_size if blobs else 0
    with result.timed("dump_bootstrap"), ExitStack() as stack:
        target, mode, digest = _bootstrap_place(bootstrap, options.bootstrap, options.blob_dir)
        main = _written(stack, target, mode, bootstrap)
        external = None
        if builder.external is not None:
            path = _external_path(target, digest)
            external = _written(stack, path, BOOTSTRAP_FILE_MODE, _external_bootstrap(builder))
        if options.external_blob is not None:
            # External content is where it is; who asks for a file gets one.
            _written(stack, options.external_blob, BLOB_FILE_MODE, b"").commit()
        if own is not None:
            result.blob_path = outputs.commit(own.id, writer.file_name(own))
        else:
            outputs.commit_empty()
        result.bootstrap = main.commit(digest)
        if external is not None:
            result.external_bootstrap = external.commit()


def _written(stack: ExitStack, target: Path, mode: int, data: Data) -> OutputFile:
    """Return an output that holds `data` and only lacks its name."""
    output = stack.enter_context(OutputFile(target, mode))
    output.write(data)
    output.sync()
    return output


def _external_path(target: Path, digest: str | None) -> Path:
    """Return the path of the external bootstrap, beside the other one."""
    return (target if digest is None else target / digest).with_suffix(EXTERNAL_SUFFIX)


def _external_bootstrap(builder: _Builder) -> memoryview:
    external = builder.external
    root, blobs = external if external is not None else (builder.empty_root, [])
    builder.result.external_blobs = _names(blobs)
    options = builder.options._replace(prefetch_policy=PrefetchPolicy.NONE, encryption=None)
    return _bootstrap(root, blobs, options)


def _names(blobs: list[BlobEntry]) -> list[str]:
    return [blob.id for blob in blobs]


def _build_tarfs(source: Path | BinaryIO, options: BuildOptions) -> BuildResult:
    from builder.tarfs import index_tar

    options = options._replace(compressor=Compressor.NONE, digester=Digester.SHA256)
    result = BuildResult(options.compressor)
    with result.timed("total_build"):
        with result.timed("build_tree"):
            index = index_tar(source, options.chunk_size, options.source, options.blob_id)
        with result.timed("build_bootstrap"):
            result.names = _settle_file_offsets(index.root, options.chunk_size)
            blobs = [] if index.blob is None else [index.blob]
            data = _bootstrap(index.root, blobs, options)
        with result.timed("dump_bootstrap"):
            result.bootstrap = write_bootstrap_file(data, options.bootstrap, options.blob_dir)
    if index.blob is not None:
        result.blobs = [index.blob.id]
        result.blob_size = index.size
    return result


def _bootstrap_place(
    data: Data, path: Path | None, directory: Path | None
) -> tuple[Path, int, str | None]:
    """Return target, mode and, for a directory, the name of a bootstrap: its SHA-256."""
    if path is not None:
        return path, BOOTSTRAP_FILE_MODE, None
    if directory is None:
        raise BuildError("neither a bootstrap nor a directory for it was given")
    return directory, BOOTSTRAP_IN_DIRECTORY_MODE, hashlib.sha256(data).hexdigest()


def write_bootstrap_file(data: Data, path: Path | None, directory: Path | None) -> Path:
    """Write a bootstrap to `path`, or into `directory` under its SHA-256."""
    target, mode, name = _bootstrap_place(data, path, directory)
    return write_file(target, data, mode, name)
