"""Model artifacts: metadata over the tars that their files stay in (spec tools 15.11).

The real tool marks such files as external ones of RAFS v5. Content within a tar begins at
multiples of 512 bytes, where v6 has blocks of 4096; only tarfs has blocks of 512 (rafs-v6 6.1).
So the metadata is tarfs here, which the kernel mounts over the very same tars.
"""

from __future__ import annotations

import io
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, cast

from builder.build import BuildOptions, SourceType, build
from builder.convert.bootlayer import Content, write_bootstrap_layer
from builder.convert.layer import copy_blob
from builder.convert.options import FS_VERSION
from builder.merge import MergeOptions, merge
from builder.oci import media
from builder.oci.errors import ImageError
from builder.oci.place import PieceReader, Source, Target
from builder.oci.records import Descriptor, Manifest, describe
from builder.source.options import SourceOptions, WhiteoutSpec
from erofs.errors import error_context

__all__ = ["convert_model"]

logger = logging.getLogger(__name__)

_LAYERS_AT_ONCE = 3
_READ_BYTES = 1 << 20


def convert_model(source: Source, target: Target, chunk_size: int, work: Path) -> Descriptor:
    """Publish a model artifact with one layer more, by which it can be mounted.

    Layers stay as they are; every one is read once, front to back, so that its digest is known
    to be right.

    Args:
        source: the artifact.
        target: takes layers that it has not, and the result.
        chunk_size: bytes that the daemon fetches at a time.
        work: a scratch directory.

    Raises:
        ImageError: no model artifact, or a layer that is no plain tar.
        NydusError: something cannot be read, indexed or stored.
    """
    top = source.resolve()
    if media.is_index(top.media_type):
        raise ImageError(f"{source.name} is an index, a model artifact is wanted")
    old = Manifest.parse(source.document(top), top.media_type)
    if old.artifact_type != media.MODEL_ARTIFACT:
        raise ImageError(
            f"{source.name} is no model artifact", expected=media.MODEL_ARTIFACT,
            got=old.artifact_type or "no artifactType",
        )  # fmt: skip
    if not old.layers or old.bootstrap is not None:
        raise ImageError(f"{source.name} has no layers, or a bootstrap already")
    for layer in old.layers:
        if not layer.media_type.endswith(".tar"):
            raise ImageError("layer is no plain tar", blob=layer.digest, got=layer.media_type)
    logger.info("converting model artifact %s", source.name)
    with ThreadPoolExecutor(_LAYERS_AT_ONCE, "model") as pool:
        paths = list(pool.map(lambda layer: _index(source, layer, chunk_size, work), old.layers))
        list(pool.map(lambda one: copy_blob(source, target, one), (old.config, *old.layers)))
    bootstrap = work / "image.boot"
    merge(paths, MergeOptions(bootstrap=bootstrap, whiteout_spec=WhiteoutSpec.NONE))
    described: Content = _backends(old, chunk_size)
    files = [("backend.json", described), ("image.boot", bootstrap)]
    layer = write_bootstrap_layer(target, files, media.OCI_LAYER_GZIP).descriptor
    marked = layer.annotated(
        ARTIFACT_TYPE=media.MODEL_ARTIFACT, BOOTSTRAP="true", FS_VERSION=FS_VERSION
    )
    made = Manifest(
        old.media_type, old.config, (*old.layers, marked), old.annotations, top.plain(),
        media.MODEL_ARTIFACT,
    )  # fmt: skip
    data = made.pack()
    descriptor = describe(data, old.media_type)
    target.publish(data, descriptor)
    logger.info("pushed image %s", target.name)
    return descriptor


def _index(source: Source, layer: Descriptor, chunk_size: int, work: Path) -> Path:
    """Write the metadata of one tar; return its path."""
    path = work / f"{layer.hex}.boot"
    with error_context(blob=layer.digest), closing(source.pieces(layer)) as pieces:
        stream = io.BufferedReader(PieceReader(pieces, layer.digest), _READ_BYTES)
        build(
            cast(BinaryIO, stream),
            BuildOptions(
                source_type=SourceType.TARFS,
                bootstrap=path,
                blob_dir=work,
                blob_id=layer.hex,
                chunk_size=chunk_size,
                source=SourceOptions(whiteout_spec=WhiteoutSpec.NONE),
            ),
        )
        for _ in pieces:
            pass  # the digest of the layer is looked at behind its last byte
    return path


def _backends(manifest: Manifest, chunk_size: int) -> bytes:
    """Return what says where the files' content is, as the real tool has it."""
    # As people write it; chunks are powers of two from 4 KiB.
    size = f"{chunk_size >> 10}KiB" if chunk_size % (1 << 20) else f"{chunk_size >> 20}MiB"
    blobs = [
        {
            "backend": 0,
            "config": {
                "media_type": layer.media_type,
                "digest": layer.hex,
                "size": str(layer.size),
                "chunk_size": size,
            },
        }
        for layer in manifest.layers
    ]
    value = {"version": "v1", "backends": [{"type": "registry"}], "blobs": blobs}
    return json.dumps(value, indent=2).encode()
