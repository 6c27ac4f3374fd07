"""One layer: registry → builder → registry, without a copy of the whole in between."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from builder.build import build
from builder.convert.options import ConvertOptions
from builder.convert.tail import LayerTail, read_tail
from builder.convert.witness import Witness, followed
from builder.oci import media
from builder.oci.ahead import read_ahead, until
from builder.oci.errors import ImageError
from builder.oci.place import BlobStore, PieceReader, Source, uploading
from builder.oci.plain import PIECE_BYTES, plain_pieces
from builder.oci.records import Descriptor
from builder.oci.upload import UploadLost
from builder.options import BuildOptions, SourceType
from builder.prefetch import PrefetchPolicy
from builder.progress import counted
from builder.source.options import SourceOptions, WhiteoutSpec
from erofs.errors import error_context

__all__ = ["ConvertedLayer", "convert_layer", "copy_blob", "push_blob"]

logger = logging.getLogger(__name__)

_GZIP_MAGIC = b"\x1f\x8b"
_PIECES_AHEAD = 4


class ConvertedLayer(NamedTuple):
    """A layer of the Nydus image, its source, and its metadata.

    `undescribed` are the directories that it has entries in but none for.
    """

    descriptor: Descriptor
    source: Descriptor
    tail: LayerTail
    undescribed: tuple[bytes, ...] = ()


def _build_options(options: ConvertOptions, layer: Descriptor) -> BuildOptions:
    """Return what the real converter asks of its builder (spec tools 2.14)."""
    if options.oci_ref:
        return BuildOptions(
            source_type=SourceType.TARGZ_REF, inline_bootstrap=True, toc=True,
            chunk_size=options.chunk_size, progress=options.progress, layer_digest=layer.hex,
            workers=options.workers,
        )  # fmt: skip
    return BuildOptions(
        source_type=SourceType.TAR,
        inline_bootstrap=True,
        toc=True,
        chunk_size=options.chunk_size,
        batch_size=options.batch_size,
        compressor=options.compressor,
        chunk_dict=None if options.dictionary is None else options.dictionary.bootstrap,
        source=SourceOptions(whiteout_spec=WhiteoutSpec.NONE),
        prefetch_policy=PrefetchPolicy.FS,
        prefetch_patterns=options.patterns,
        progress=options.progress,
        workers=options.workers,
    )


def convert_layer(
    source: Source,
    target: BlobStore,
    layer: Descriptor,
    options: ConvertOptions,
    witness: Witness | None = None,
    stop: threading.Event | None = None,
) -> ConvertedLayer:
    """Build a layer while it is read, and send it while it is built.

    An upload that the registry forgets begins anew.

    Args:
        source: has the layer.
        target: takes the result.
        layer: which one it is.
        options: how to convert.
        witness: sees the unpacked layer, too.
        stop: set when the layer is not wanted any more.

    Raises:
        NydusError: the layer cannot be read, built or sent; says which one.
    """
    attempt, stop = 1, stop or threading.Event()
    while True:
        content = until(stop, _content(source, layer, options, witness))
        try:
            with error_context(blob=layer.digest):
                descriptor, undescribed = _convert(content, target, layer, options)
            break
        except UploadLost as error:
            if attempt >= options.layer_attempts:
                raise
            attempt += 1
            logger.warning("layer %s begins anew: %s", layer.digest, error)
    return ConvertedLayer(descriptor, layer, read_tail(target, descriptor), tuple(undescribed))


def _content(
    source: Source, layer: Descriptor, options: ConvertOptions, witness: Witness | None
) -> Generator[bytes]:
    """Return what the builder gets: the unpacked layer, for zran the layer as it is."""
    if options.oci_ref:
        return source.pieces(layer)
    pieces = plain_pieces(source, layer)
    return pieces if witness is None else followed(pieces, witness, layer)


def _convert(
    content: Generator[bytes], target: BlobStore, layer: Descriptor, options: ConvertOptions
) -> tuple[Descriptor, list[bytes]]:
    built = _build_options(options, layer)
    undescribed: list[bytes] = []
    reading = built.source._replace(undescribed=undescribed)
    with closing(read_ahead(content, _PIECES_AHEAD)) as pieces, uploading(target) as upload:
        stream = io.BufferedReader(PieceReader(pieces, layer.digest), PIECE_BYTES)
        if options.oci_ref and stream.peek(2)[:2] != _GZIP_MAGIC:
            raise ImageError("layers for --oci-ref have to be compressed by gzip")
        build(cast(BinaryIO, stream), built._replace(blob_sink=upload, source=reading))
        for _ in pieces:
            pass  # the same when the builder did not look behind the end of the tar
        descriptor = upload.finish(media.NYDUS_BLOB)
    descriptor = descriptor.annotated(BLOB="true")
    if options.oci_ref:
        descriptor = descriptor.annotated(LAYER_REF=layer.digest)
    return descriptor, undescribed


def copy_blob(
    source: Source,
    target: BlobStore,
    descriptor: Descriptor,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Bring a blob from one place to another, by the shortest way; raise `NydusError`.

    `progress` is called with numbers of bytes that were read.
    """
    if target.has(descriptor) or target.mount(descriptor, source):
        return
    with closing(source.pieces(descriptor)) as pieces:
        target.put(descriptor, counted(pieces, progress))


def push_blob(target: BlobStore, path: Path) -> Descriptor:
    """Store a blob that was built into a file; raise `NydusError`."""
    with uploading(target) as upload, path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            upload.write(piece)
        return upload.finish(media.NYDUS_BLOB)
