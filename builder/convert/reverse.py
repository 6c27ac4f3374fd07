"""Nydus to OCI: every layer of data becomes a tar again, or the original that it refers to."""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from builder.blobfiles import BlobProvider
from builder.bootstrap import load_tree, open_any_bootstrap
from builder.convert.bootlayer import extract_bootstrap
from builder.convert.layer import copy_blob
from builder.convert.tail import read_tail
from builder.oci import media
from builder.oci.config import ImageConfig
from builder.oci.errors import ImageError
from builder.oci.names import host_platform, matches, parse_platforms
from builder.oci.place import (
    BlobStore,
    PieceReader,
    Source,
    Target,
    Upload,
    uploading,
    verified_pieces,
)
from builder.oci.records import Descriptor, Index, Manifest, Platform, describe
from builder.overlay import keep_attributes
from builder.prefetch import find_node
from builder.proof.compare import require_equal
from builder.proof.prover import SourceReader
from builder.proof.target import ReadOn, load_target
from builder.source.opening import open_tar
from builder.unpack import unpack
from erofs import Node
from erofs.tree import iter_names

__all__ = ["Reverse"]

logger = logging.getLogger(__name__)

_LEVEL = 6
_PIECE_BYTES = 1 << 20
_OURS = "Nydus Converter"


class _Layer(NamedTuple):
    descriptor: Descriptor
    diff_id: str


class _Packer:
    """A tar on its way to a place, compressed by gzip and summed up."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
        self.plain = hashlib.sha256()

    def write(self, data: bytes | memoryview, /) -> None:
        self.plain.update(data)
        if packed := self._packer.compress(data):
            self._upload.write(packed)

    def finish(self, media_type: str) -> Descriptor:
        self._upload.write(self._packer.flush())
        return self._upload.finish(media_type)


class _Stored:
    """What was stored, as something to read layers from."""

    def __init__(self, place: BlobStore) -> None:
        self._place = place

    def pieces(self, descriptor: Descriptor) -> Generator[bytes]:
        return verified_pieces(self._place, descriptor)


class Reverse:
    """Converts Nydus images of one source to OCI.

    Args:
        source: the images.
        target: takes the results.
        work: a scratch directory.
        blobs: where the data is when that is not the source.
        proves: whether both trees are compared before anything is published.
    """

    def __init__(
        self,
        source: Source,
        target: Target,
        work: Path,
        blobs: BlobProvider | None = None,
        *,
        proves: bool = True,
    ) -> None:
        self._source = source
        self._target = target
        self._work = work
        self._blobs = blobs
        self._proves = proves

    def run(self, platforms: str = "", all_platforms: bool = False) -> Descriptor:
        """Convert, compare and publish; raise `NydusError`."""
        top = self._source.resolve()
        if not media.is_index(top.media_type):
            data, descriptor = self._image(top)
            self._target.publish(data, descriptor)
            return descriptor
        index = Index.parse(self._source.document(top), top.media_type)
        found = []
        for one in self._chosen(index, platforms, all_platforms):
            data, descriptor = self._image(one)
            self._target.publish(data, descriptor, named=False)
            found.append((data, replace(descriptor, platform=_without_mark(one))))
        if len(found) == 1:
            self._target.publish(found[0][0], found[0][1].plain())
            return found[0][1].plain()
        data = Index(media.OCI_INDEX, tuple(entry for _, entry in found)).pack()
        descriptor = describe(data, media.OCI_INDEX)
        self._target.publish(data, descriptor)
        return descriptor

    @staticmethod
    def _chosen(index: Index, platforms: str, all_platforms: bool) -> Sequence[Descriptor]:
        """Return the Nydus images: marked ones, or all where none is marked."""
        marked = [one for one in index.manifests if one.is_nydus_manifest]
        images = marked or list(index.manifests)
        if all_platforms:
            return images
        wanted = parse_platforms(platforms) if platforms else [host_platform()]
        chosen = [one for one in images if any(matches(each, one.platform) for each in wanted)]
        if not chosen:
            raise ImageError("source has no Nydus image for this platform")
        return chosen

    def _image(self, descriptor: Descriptor) -> tuple[bytes, Descriptor]:
        old = Manifest.parse(self._source.document(descriptor), descriptor.media_type)
        boot = old.bootstrap
        if boot is None:
            raise ImageError(f"{self._source.name} is no Nydus image")
        config = ImageConfig.parse(self._source.document(old.config))
        history = [one for one in config.history if one.get("created_by") != _OURS]
        bootstrap = self._work / f"{boot.hex}.boot"
        extract_bootstrap(self._source.pieces(boot), boot, bootstrap)
        blobs = [one for one in old.layers if not one.is_bootstrap]
        own = sum(1 for one in history if not one.get("empty_layer"))
        if blobs and len(blobs) == own:
            with open_any_bootstrap(bootstrap) as opened:
                merged = load_tree(opened)
            layers = [self._layer(one, merged) for one in blobs]
        else:
            # Data of a dictionary, of an optimised image or of a backend: one tree, one layer.
            layers = [self._unpacked(bootstrap)]
            history = [{"created_by": "nydusify convert --reverse"}]
        packed = config.with_layers([one.diff_id for one in layers], history).pack()
        stored = describe(packed, media.OCI_CONFIG)
        self._target.put(stored, [packed])
        manifest = Manifest(
            media.OCI_MANIFEST, stored, tuple(one.descriptor for one in layers), old.annotations
        )
        if self._proves:
            self._prove(manifest, ImageConfig.parse(packed), bootstrap)
        data = manifest.pack(None)
        return data, describe(data, media.OCI_MANIFEST)

    def _layer(self, layer: Descriptor, merged: Node) -> _Layer:
        original = layer.annotations.get(media.LAYER_REF)
        if original is not None:
            return self._referred(original)
        tail = read_tail(self._source, layer)
        path = self._work / f"{layer.hex}.boot"
        path.write_bytes(tail.bootstrap)
        made = self._unpacked(path, partial(_describe, merged))
        path.unlink()
        return made

    def _unpacked(self, bootstrap: Path, adjust: Callable[[Node], None] | None = None) -> _Layer:
        with uploading(self._target) as upload:
            packer = _Packer(upload)
            blobs = ReadOn(self._blobs or self._source)
            unpack(bootstrap, cast(BinaryIO, packer), blobs, adjust=adjust)
            descriptor = packer.finish(media.OCI_LAYER_GZIP)
        diff_id = f"sha256:{packer.plain.hexdigest()}"
        return _Layer(descriptor.annotated(UNCOMPRESSED=diff_id), diff_id)

    def _referred(self, digest: str) -> _Layer:
        """Return the original layer of a zran image, copied as it is."""
        size = self._source.open(digest.partition(":")[2]).size()
        layer = Descriptor(media.OCI_LAYER_GZIP, digest, size)
        copy_blob(self._source, self._target, layer)
        plain = hashlib.sha256()
        with (
            closing(self._source.pieces(layer)) as pieces,
            open_tar(cast(BinaryIO, PieceReader(pieces, digest))) as stream,
        ):
            while piece := stream.read(_PIECE_BYTES):
                plain.update(piece)
        diff_id = f"sha256:{plain.hexdigest()}"
        return _Layer(layer.annotated(UNCOMPRESSED=diff_id), diff_id)

    def _prove(self, manifest: Manifest, config: ImageConfig, bootstrap: Path) -> None:
        """Compare the new layers, read back, with the tree of the bootstrap."""
        tree = load_target(bootstrap)
        reader = SourceReader(_Stored(self._target), tree.chunk_bytes, tree.digester)
        try:
            require_equal(reader.tree(manifest, config), tree.root)
        finally:
            reader.close()
        logger.info("proved: the layers have the tree of the Nydus image")


def _describe(merged: Node, layer: Node) -> None:
    """Give directories that a layer did not describe the attributes that the image has.

    In a layer's bootstrap they look like those of root, from 1970, with permissions 0755.
    """
    for directory, name, node in iter_names(layer):
        blank = (node.mode & 0o7777, node.uid, node.gid, node.mtime) == (0o755, 0, 0, 0)
        if not node.is_dir or not blank or node.xattrs:
            continue
        found = find_node(merged, directory + b"/" + name)
        if found is not None and found.is_dir:
            keep_attributes(found, node)


def _without_mark(descriptor: Descriptor) -> Platform | None:
    """Return the platform without the older mark of Nydus images."""
    platform = descriptor.platform
    if platform is None:
        return None
    features = tuple(one for one in platform.os_features if one != media.NYDUS_OS_FEATURE)
    return replace(platform, os_features=features)
