"""One image of one platform: its layers, the merged bootstrap, configuration and manifest."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from builder.convert.bootlayer import Content, write_bootstrap_layer
from builder.convert.layer import ConvertedLayer, convert_layer, copy_blob
from builder.convert.options import FS_VERSION, ConvertOptions, Dictionary
from builder.convert.tail import read_tail
from builder.convert.witness import Witness
from builder.merge import MergeOptions, merge
from builder.oci import media
from builder.oci.config import ImageConfig, history_entry
from builder.oci.errors import ImageError
from builder.oci.place import BlobStore, Source, Target
from builder.oci.records import Descriptor, Manifest, describe
from builder.prefetch import PrefetchPolicy

__all__ = ["ConvertedImage", "ImageConverter", "LayerCache", "SourceImage"]

logger = logging.getLogger(__name__)


class LayerCache(Protocol):
    """Knows layers that were converted before."""

    def find(self, layer: Descriptor) -> tuple[Descriptor, tuple[bytes, ...]] | None:
        """Return the converted layer of a source layer, stored in the target now.

        With it come the directories that it has entries in but none for.
        """

    def note(self, layer: ConvertedLayer) -> None:
        """Remember a layer."""


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image to convert: what refers to it, its manifest and its configuration.

    `origin` is the digest that the result names as its source: of the image itself, or of
    the index when one image was chosen from it.
    """

    descriptor: Descriptor
    manifest: Manifest
    config: ImageConfig
    origin: str

    @classmethod
    def load(cls, source: Source, descriptor: Descriptor, origin: str = "") -> SourceImage:
        """Read manifest and configuration; raise `NydusError`."""
        manifest = Manifest.parse(source.document(descriptor), descriptor.media_type)
        config = ImageConfig.parse(source.document(manifest.config))
        return cls(descriptor, manifest, config, origin or descriptor.digest)

    def check_convertible(self) -> None:
        """Raise `ImageError` for what is no plain image of a container."""
        manifest = self.manifest
        if manifest.bootstrap is not None or any(one.is_nydus_blob for one in manifest.layers):
            raise ImageError("source is a Nydus image already", blob=self.descriptor.digest)
        if not media.is_config(manifest.config.media_type):
            raise ImageError(
                "source is no image of a container", blob=self.descriptor.digest,
                got=manifest.config.media_type,
            )  # fmt: skip
        for layer in manifest.layers:
            if layer.media_type not in media.LAYER_TYPES:
                raise ImageError(
                    "layer of an unknown type", blob=layer.digest, got=layer.media_type
                )
        if len(self.config.diff_ids) != len(manifest.layers):
            raise ImageError(
                "configuration and manifest have different layers", blob=self.descriptor.digest,
                expected=len(manifest.layers), got=len(self.config.diff_ids),
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ConvertedImage:
    """A Nydus image whose blobs are stored; its manifest is not published yet.

    `bootstrap` is the file of the merged metadata.
    """

    source: SourceImage
    manifest: Manifest
    data: bytes
    layers: tuple[ConvertedLayer, ...]
    bootstrap: Path

    @property
    def descriptor(self) -> Descriptor:
        """Type, digest and size of the manifest."""
        return describe(self.data, self.manifest.media_type)


class ImageConverter:
    """Converts the images of one source; equal layers are converted once.

    Args:
        source: where the layers are.
        target: where the results go.
        options: how to convert.
        blobs: where data blobs go when that is not the target.
        cache: layers that were converted before.
        witness: sees the source's layers, too.
    """

    def __init__(
        self,
        source: Source,
        target: Target,
        options: ConvertOptions,
        blobs: BlobStore | None = None,
        cache: LayerCache | None = None,
        witness: Witness | None = None,
    ) -> None:
        self._source = source
        self._target = target
        self._options = options
        self._blobs: BlobStore = target if blobs is None else blobs
        self._cache = cache
        self._witness = witness
        self._pool = ThreadPoolExecutor(options.layers_at_once, "layer")
        self._layers: dict[str, Future[ConvertedLayer]] = {}
        self._stop = threading.Event()
        self.cached = 0

    def close(self) -> None:
        """Stop what is under way, which is nothing when all went well, and wait for that."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, image: SourceImage) -> None:
        """Put the layers of an image on their way."""
        for layer in image.manifest.layers:
            if layer.digest not in self._layers:
                self._layers[layer.digest] = self._pool.submit(self._layer, layer)

    def _layer(self, layer: Descriptor) -> ConvertedLayer:
        found = None if self._cache is None else self._cache.find(layer)
        if self._witness is not None and (found is not None or self._options.oci_ref):
            self._witness.read(layer)
        if self._options.oci_ref:
            # What the result refers to has to be where the result is.
            copy_blob(self._source, self._target, layer)
        if found is not None:
            self.cached += 1
            descriptor, undescribed = found
            tail = read_tail(self._blobs, descriptor)
            return ConvertedLayer(descriptor, layer, tail, undescribed)
        made = convert_layer(
            self._source, self._blobs, layer, self._options, self._witness, self._stop
        )
        if self._cache is not None:
            self._cache.note(made)
        return made

    def convert(self, image: SourceImage) -> ConvertedImage:
        """Wait for the layers of an image, and store the rest of it; raise `NydusError`."""
        self.begin(image)
        futures = [self._layers[one.digest] for one in image.manifest.layers]
        failed = [one for one in wait(futures, None, FIRST_EXCEPTION).done if one.exception()]
        layers = tuple(one.result() for one in failed or futures)
        work = self._options.work / f"image-{image.descriptor.hex}"
        work.mkdir(parents=True, exist_ok=True)
        bootstrap = work / "image.boot"
        blobs = self._merge(layers, work, bootstrap)
        manifest = self._manifest(image, layers, bootstrap, blobs)
        return ConvertedImage(image, manifest, manifest.pack(), layers, bootstrap)

    def _merge(self, layers: Sequence[ConvertedLayer], work: Path, bootstrap: Path) -> list[str]:
        """Merge the bootstraps of layers, and return the blob table."""
        if not layers:
            raise ImageError("image without layers")
        options = self._options
        paths = []
        for number, layer in enumerate(layers):
            # The same layer may come twice; a name up to its first dot is what merging looks at.
            name = layer.source.hex if options.oci_ref else layer.descriptor.hex
            path = work / f"{name}.{number}"
            path.write_bytes(layer.tail.bootstrap)
            paths.append(path)
        merging = MergeOptions(
            bootstrap=bootstrap,
            chunk_dict=None if options.dictionary is None else options.dictionary.bootstrap,
            prefetch_policy=PrefetchPolicy.FS,
            prefetch_patterns=options.patterns,
            undescribed=[layer.undescribed for layer in layers],
        )
        if options.oci_ref:
            merging = replace(
                merging,
                blob_digests=[bytes.fromhex(one.descriptor.hex) for one in layers],
                blob_sizes=[one.descriptor.size for one in layers],
                blob_toc_digests=[one.tail.toc_digest for one in layers],
            )
        result = merge(paths, merging)
        for path in paths:
            path.unlink()
        return result.blobs

    def _manifest(
        self,
        image: SourceImage,
        layers: Sequence[ConvertedLayer],
        bootstrap: Path,
        blobs: Sequence[str],
    ) -> Manifest:
        options, old = self._options, image.manifest
        is_oci = options.oci or options.oci_ref or old.media_type == media.OCI_MANIFEST
        boot = write_bootstrap_layer(
            self._target,
            _files(bootstrap, layers),
            media.OCI_LAYER_GZIP if is_oci else media.DOCKER_LAYER_GZIP,
        )
        boot_layer = boot.descriptor.annotated(BOOTSTRAP="true", FS_VERSION=FS_VERSION)
        history = image.config.history
        if self._blobs is self._target:
            data = [layer.descriptor for layer in layers]
            data += self._borrowed(data, blobs)
            diff_ids = [layer.digest for layer in data]
        else:
            data, diff_ids, history = [], [], []
            boot_layer = boot_layer.annotated(UNCOMPRESSED=boot.diff_id)
        config = image.config.with_layers(
            [*diff_ids, boot.diff_id], [*history, history_entry("Nydus Bootstrap Layer")]
        ).pack()
        config_type = old.config.media_type
        stored = describe(config, media.oci_type(config_type) if is_oci else config_type)
        self._target.put(stored, [config])
        return Manifest(
            media.oci_type(old.media_type) if is_oci else old.media_type,
            stored,
            (*data, boot_layer),
            {
                media.BUILDER_VERSION: options.builder_version,
                media.FS_VERSION: FS_VERSION,
                media.SOURCE_DIGEST: image.origin,
                media.SOURCE_REFERENCE: self._source.name,
            },
            image.descriptor.plain() if options.with_referrer else None,
        )

    def _borrowed(self, own: Sequence[Descriptor], blobs: Sequence[str]) -> Iterator[Descriptor]:
        """Yield the blobs of a dictionary that are used, after they were brought to the target."""
        dictionary: Dictionary | None = self._options.dictionary
        if dictionary is None:
            return
        names = {layer.hex for layer in own}
        known = {layer.hex: layer for layer in dictionary.blobs}
        for blob in blobs:
            if blob in names:
                continue
            if dictionary.source is None:
                yield self._there_already(blob)
                continue
            if blob not in known:
                raise ImageError("chunk dictionary does not have a blob it refers to", blob=blob)
            copy_blob(dictionary.source, self._target, known[blob])
            yield known[blob]

    def _there_already(self, blob: str) -> Descriptor:
        """Return a blob of a dictionary that is only metadata: the target has to have it."""
        size = self._target.open(blob).size()
        return Descriptor(media.NYDUS_BLOB, f"sha256:{blob}", size).annotated(BLOB="true")


def _files(bootstrap: Path, layers: Sequence[ConvertedLayer]) -> Iterator[tuple[str, Content]]:
    yield "image.boot", bootstrap
    seen = set()
    for layer in layers:
        table = layer.tail.table
        if table is not None and layer.descriptor.hex not in seen:
            seen.add(layer.descriptor.hex)
            yield f"{layer.descriptor.hex}.blob.meta", table
