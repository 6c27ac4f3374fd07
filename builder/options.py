"""What `build` is asked for and what it answers; which wishes exclude each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from builder.chunker import ChunkerStats
from builder.errors import BuildError
from builder.prefetch import PrefetchPolicy
from builder.source.options import SourceOptions
from erofs.cipher import BlobCipher
from erofs.rafs import (
    DEFAULT_CHUNK_SIZE,
    MAX_CHUNK_SIZE,
    MIN_CHUNK_SIZE,
    Compressor,
    Digester,
)
from erofs.values import Value

if TYPE_CHECKING:
    from builder.attributes import Attributes

__all__ = [
    "TOC_CHUNK_SIZE",
    "BlobSink",
    "BuildOptions",
    "BuildResult",
    "SourceType",
    "check_options",
]


# What `create` takes where only a table of contents is given: eStargz has chunks of that size.
TOC_CHUNK_SIZE = 4 << 20


class SourceType(StrEnum):
    """Kinds of input."""

    DIRECTORY = "dir-rafs"
    TAR = "tar-rafs"
    TARFS = "tar-tarfs"
    TARGZ_REF = "targz-ref"
    ESTARGZ_REF = "estargz-ref"
    ESTARGZTOC_REF = "estargztoc-ref"

    @property
    def is_reference(self) -> bool:
        """Whether the content stays in the original layer."""
        return self in _REFERENCES


_REFERENCES = frozenset({SourceType.TARGZ_REF, SourceType.ESTARGZ_REF, SourceType.ESTARGZTOC_REF})


class BlobSink(Protocol):
    """Takes the bytes of a blob."""

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """Append bytes; raise `NydusError`."""


class BuildOptions(Value):
    """What to build and where to put it.

    A tarfs image is metadata over a tar that stays as it is: there is no blob to write,
    `compressor` and `digester` have no say, and `blob_id` is what the tar is called.

    Args:
        bootstrap: path of the metadata; None puts it into `blob_dir` under its SHA-256.
        blob_dir: directory where the blob gets its id as name.
        blob: path of the blob: a file, or a FIFO that takes it as it is made.
        blob_sink: takes the blob as it is made, and stays the caller's.
        blob_cache_dir: directory for the files that a daemon's cache would have, instead of
            a blob; nothing is compressed then.
        inline_bootstrap: put the metadata into the blob; then `bootstrap` must be None.
        blob_id: name to use in place of the SHA-256, or of a layer that is not there.
        layer_digest: SHA-256 in hex of a layer that is referred to, when the caller knows it and
            looks at it.
        blob_meta: path for the compression table of such a layer, in the form of caches.
        blob_data_size: length of such a layer in bytes, as far as it is known.
        blob_offset: where the blob will begin in what holds it, in bytes.
        toc: append digests and a table of contents to the blob.
        batch_size: bytes of small chunks that are compressed together, 0 for none.
        encryption: encrypts the blob; its key is in the bootstrap.
        chunk_dict: bootstrap of an image whose chunks need not be stored again.
        parent_bootstrap: the image to build on top of.
        attributes: files of a directory whose content is elsewhere.
        external_blob: path for the metadata of those files when metadata is inlined.
        prefetch_patterns: absolute in-image paths, in order, used as the policy says.
        progress: called with the number of content bytes after each chunk.
        workers: threads for digests and compression; the bytes do not depend on it.
    """

    source_type: SourceType = SourceType.DIRECTORY
    bootstrap: Path | None = None
    blob_dir: Path | None = None
    blob: Path | None = None
    blob_sink: BlobSink | None = None
    blob_cache_dir: Path | None = None
    inline_bootstrap: bool = False
    blob_id: str | None = None
    layer_digest: str | None = None
    blob_meta: Path | None = None
    blob_data_size: int | None = None
    blob_offset: int = 0
    toc: bool = False
    chunk_size: int = DEFAULT_CHUNK_SIZE
    batch_size: int = 0
    compressor: Compressor = Compressor.ZSTD
    digester: Digester = Digester.BLAKE3
    encryption: BlobCipher | None = None
    chunk_dict: Path | None = None
    parent_bootstrap: Path | None = None
    attributes: Attributes | None = None
    external_blob: Path | None = None
    source: SourceOptions = SourceOptions()
    prefetch_policy: PrefetchPolicy = PrefetchPolicy.NONE
    prefetch_patterns: Sequence[bytes] = ()
    progress: Callable[[int], None] | None = None
    workers: int | None = None


class BuildResult:
    """What was built.

    `blobs` are the ids of the blob table in order (for inlined metadata: the own one is the
    id of the object that was written), `blob_size` the bytes of the last of them as the table
    has it, for tarfs those of the tar. `compressor` is the one that the bootstrap names.
    `scanned` counts what a directory had, deletion marks included.
    """

    def __init__(self, compressor: Compressor = Compressor.NONE) -> None:
        self.compressor = compressor
        self.bootstrap: Path | None = None
        self.blobs: list[str] = []
        self.blob_path: Path | None = None
        self.blob_size = 0
        self.external_bootstrap: Path | None = None
        self.external_blobs: list[str] = []
        self.names = 0
        self.scanned = 0
        self.stats = ChunkerStats()
        self.blob_content_bytes = 0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time that the block takes to `seconds`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - start


def _conflicts(kind: SourceType, words: dict[str, bool]) -> None:
    for word, given in words.items():
        if given:
            raise BuildError(f"conversion type '{kind}' conflicts with '{word}'")


def _check_tarfs(options: BuildOptions) -> None:
    _conflicts(
        SourceType.TARFS,
        {
            "--blob": options.blob is not None,
            "--blob-cache-dir": options.blob_cache_dir is not None,
            "--chunk-dict": options.chunk_dict is not None,
            "--parent-bootstrap": options.parent_bootstrap is not None,
            "--blob-inline-meta": options.inline_bootstrap,
            "--features blob-toc": options.toc,
            "--batch-size": bool(options.batch_size),
            "--encrypt": options.encryption is not None,
            "--prefetch-policy blob": options.prefetch_policy is PrefetchPolicy.BLOB,
        },
    )


def _check_reference(options: BuildOptions) -> None:
    is_toc = options.source_type is SourceType.ESTARGZTOC_REF
    if is_toc and options.blob_id is None:
        raise BuildError("--blob-id is needed: a table of contents does not name its layer")
    _conflicts(
        options.source_type,
        {
            "--blob-id": options.blob_id is not None and not is_toc,
            "--batch-size": bool(options.batch_size),
            "--encrypt": options.encryption is not None,
            "--prefetch-policy blob": options.prefetch_policy is PrefetchPolicy.BLOB,
            "--blob-cache-dir": (
                options.blob_cache_dir is not None
                and options.source_type is not SourceType.TARGZ_REF
            ),
        },
    )


def _check_sizes(options: BuildOptions) -> None:
    size = options.chunk_size
    if size & (size - 1) or not MIN_CHUNK_SIZE <= size <= MAX_CHUNK_SIZE:
        raise BuildError("invalid chunk size", got=size)
    batch = options.batch_size
    if batch and (batch & (batch - 1) or not MIN_CHUNK_SIZE <= batch <= MAX_CHUNK_SIZE):
        raise BuildError("invalid batch size", got=batch)
    if batch > size:
        raise BuildError("batch size exceeds the chunk size", expected=size, got=batch)
    if options.blob_offset and (options.inline_bootstrap or options.toc):
        raise BuildError("--blob-offset is for blobs without tar headers")


def _check_kinds(options: BuildOptions) -> None:
    for directory in (options.blob_dir, options.blob_cache_dir):
        if directory is not None and not directory.is_dir():
            raise BuildError("directory to store blobs does not exist", path=directory)
    for file in (options.blob, options.bootstrap, options.external_blob, options.blob_meta):
        if file is not None and file.is_dir():
            raise BuildError("is a directory", path=file)


def _check_places(options: BuildOptions) -> None:
    if options.blob_cache_dir is not None:
        if options.blob is not None or options.blob_dir is not None or options.inline_bootstrap:
            raise BuildError("cache files are made instead of a blob")
    elif options.source_type is SourceType.ESTARGZTOC_REF:
        # It can do without a blob: its bootstrap says everything.
        pass
    elif options.blob_dir is None and options.blob is None and options.blob_sink is None:
        raise BuildError("neither a blob nor a directory for it was given")
    if options.blob_sink is not None and (options.blob is not None or options.blob_dir is not None):
        raise BuildError("a blob goes to one place")
    if options.inline_bootstrap:
        if options.bootstrap is not None or options.blob_id is not None:
            raise BuildError("an inlined bootstrap has neither a path nor a blob id of its own")
    elif options.bootstrap is None and options.blob_dir is None:
        raise BuildError("neither a bootstrap nor a directory for it was given")


def check_options(options: BuildOptions) -> None:
    """Raise `BuildError` unless the options can be carried out together."""
    if options.source_type is SourceType.TARFS:
        _check_tarfs(options)
    if options.source_type.is_reference:
        _check_reference(options)
    _check_sizes(options)
    _check_kinds(options)
    _check_places(options)
    if options.attributes is not None and options.source_type is not SourceType.DIRECTORY:
        _conflicts(options.source_type, {"--attributes": True})
    if options.blob_id is not None and (
        not 0 < len(options.blob_id) < 65 or not options.blob_id.isascii() or "/" in options.blob_id
    ):
        raise BuildError("blob id of 1 to 64 ASCII characters without '/'", got=options.blob_id)
