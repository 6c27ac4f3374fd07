"""Copies images as they are: blobs by the shortest way, documents byte for byte."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from builder.bootstrap import blob_ids, open_any_bootstrap
from builder.convert.bootlayer import extract_bootstrap
from builder.convert.layer import copy_blob
from builder.oci import media
from builder.oci.config import ImageConfig
from builder.oci.errors import ImageError
from builder.oci.names import host_platform, matches, parse_platforms
from builder.oci.place import Source, Target
from builder.oci.records import Descriptor, Index, Manifest, check_digest, describe
from builder.oci.transfer import resumed_pieces
from builder.progress import counted
from fscache.backend import Backend

__all__ = ["copy_image", "copy_layers", "original_layers"]

logger = logging.getLogger(__name__)

_BLOBS_AT_ONCE = 3

_Progress = Callable[[int], None] | None


def copy_layers(
    source: Source, target: Target, descriptors: Sequence[Descriptor], progress: _Progress = None
) -> None:
    """Copy blobs, several at once, unless they are there; raise `NydusError`."""
    blobs = {one.digest: one for one in descriptors}

    def copy(descriptor: Descriptor) -> None:
        if descriptor.size < 0:
            # What a Nydus layer refers to comes without a length.
            size = source.open(descriptor.hex).size()
            descriptor = replace(descriptor, size=size)
        copy_blob(source, target, descriptor, progress)

    with ThreadPoolExecutor(_BLOBS_AT_ONCE, "copy") as pool:
        list(pool.map(copy, blobs.values()))


def original_layers(manifest: Manifest) -> list[Descriptor]:
    """Return the original layers that a zran image reads, their lengths unknown."""
    found = (layer.annotations.get(media.LAYER_REF) for layer in manifest.layers)
    return [Descriptor(media.OCTET_STREAM, check_digest(one), -1) for one in found if one]


class _Copier:
    def __init__(
        self, source: Source, target: Target, blobs: Backend | None, progress: _Progress
    ) -> None:
        self._source = source
        self._target = target
        self._blobs = blobs
        self._progress = progress

    def image(self, descriptor: Descriptor, *, named: bool) -> Descriptor:
        """Copy one manifest and all that it refers to."""
        data = self._source.document(descriptor)
        manifest = Manifest.parse(data, descriptor.media_type)
        blobs = [manifest.config, *manifest.layers, *original_layers(manifest)]
        copy_layers(self._source, self._target, blobs, self._progress)
        if self._blobs is not None and manifest.bootstrap is not None:
            data = self._with_blobs(self._blobs, manifest, manifest.bootstrap)
            descriptor = replace(
                describe(data, descriptor.media_type),
                platform=descriptor.platform,
                annotations=descriptor.annotations,
                artifact_type=descriptor.artifact_type,
            )
        logger.info("pushing target manifest %s", descriptor.digest)
        self._target.publish(data, descriptor.plain(), named=named)
        logger.info("pushed target manifest %s", descriptor.digest)
        return descriptor

    def _with_blobs(self, blobs: Backend, old: Manifest, layer: Descriptor) -> bytes:
        """Bring the blobs that a bootstrap names, and return a manifest that has them as layers."""
        with tempfile.TemporaryDirectory(prefix="nydusify-copy-") as work:
            path = Path(work, "image.boot")
            extract_bootstrap(self._source.pieces(layer), layer, path)
            with open_any_bootstrap(path) as opened:
                names = list(dict.fromkeys(blob_ids(opened, path)))
        known = {one.hex for one in old.layers}
        layers = [
            Descriptor(media.NYDUS_BLOB, f"sha256:{name}", blobs.open(name).size()).annotated(
                BLOB="true"
            )
            for name in names
            if name not in known
        ]
        for one in layers:
            logger.info("pushing blob from backend digest=%s", one.digest)
            pieces = resumed_pieces(blobs.open(one.hex), one)
            self._target.put(one, counted(pieces, self._progress))
        config = ImageConfig.parse(self._source.document(old.config))
        diff_ids = [*(one.digest for one in layers), *config.diff_ids]
        packed = config.with_layers(diff_ids, config.history).pack()
        stored = describe(packed, old.config.media_type)
        self._target.put(stored, [packed])
        return replace(old, config=stored, layers=(*layers, *old.layers)).pack()


def _chosen(index: Index, platforms: str, all_platforms: bool) -> Sequence[Descriptor]:
    if all_platforms:
        return index.manifests
    wanted = parse_platforms(platforms) if platforms else [host_platform()]
    chosen = [one for one in index.manifests if any(matches(each, one.platform) for each in wanted)]
    for each in wanted:
        if not any(matches(each, one.platform) for one in chosen):
            raise ImageError(f"source has no image for platform {each}")
    return chosen


def copy_image(
    source: Source,
    target: Target,
    platforms: str = "",
    all_platforms: bool = False,
    blobs: Backend | None = None,
    progress: _Progress = None,
) -> Descriptor:
    """Copy an image, or the images of an index for the wanted platforms.

    What is copied whole keeps its digest; of a part of an index a new one is made. The original
    layers that a zran image refers to are copied, too. With `blobs`, a storage backend, the data of
    Nydus images is brought from there and becomes layers. `progress` is called with
    numbers of bytes.

    Raises:
        ImageError: the index lacks a platform.
        NydusError: something cannot be read or stored.
    """
    top = source.resolve()
    copier = _Copier(source, target, blobs, progress)
    if not media.is_index(top.media_type):
        return copier.image(top, named=True)
    data = source.document(top)
    index = Index.parse(data, top.media_type)
    chosen = _chosen(index, platforms, all_platforms)
    if len(chosen) == 1:
        return copier.image(chosen[0], named=True)
    copied = tuple(copier.image(one, named=False) for one in chosen)
    if copied != index.manifests:
        data = replace(index, manifests=copied).pack()
    descriptor = describe(data, top.media_type)
    target.publish(data, descriptor)
    return descriptor
