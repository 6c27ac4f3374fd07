"""A whole conversion: what the source has, its images, the index, and the name at last."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from builder.convert.image import ConvertedImage, ImageConverter, LayerCache, SourceImage
from builder.convert.layer import copy_blob
from builder.convert.options import ConvertOptions
from builder.convert.witness import Witness
from builder.oci import media
from builder.oci.config import ImageConfig, history_entry
from builder.oci.errors import ImageError
from builder.oci.names import host_platform, matches, parse_platforms
from builder.oci.place import BlobStore, Source, Target
from builder.oci.records import Descriptor, Index, Manifest, Platform, describe

__all__ = ["Conversion", "ConversionResult", "Hook", "HookImage", "Prover", "select_images"]

logger = logging.getLogger(__name__)

# A gzip of 1024 zero bytes, in front of the original's layers, so that they are not taken for
# those of the image that was not converted (spec tools 16.2).
EMPTY_LAYER = bytes.fromhex("1f8b08000000000000ff621805a360148c5800080000ffff2eafb5ef00040000")
EMPTY_DIFF_ID = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
# What builders put beside images: attestations, for no platform.
_NO_IMAGE = "unknown"


class Prover(Witness, Protocol):
    """Compares converted images with their sources."""

    def expect(self, manifest: Manifest, config: ImageConfig) -> None:
        """Hear of a source that will be converted."""

    def prove(self, manifest: Manifest, old: Manifest, config: ImageConfig) -> Any:
        """Return what was found; raise `NydusError` unless both trees are equal."""

    def publish(
        self, proof: Any, image: Descriptor, source: Descriptor, layers: Sequence[Descriptor]
    ) -> None:
        """Store what was found."""


@dataclass(frozen=True, slots=True)
class HookImage:
    """What a hook is told of an image; `blobs` are ids and sizes in bytes, the lowest first."""

    bootstrap: Path
    source: str
    target: str
    blobs: tuple[tuple[str, int], ...]


class Hook(Protocol):
    """Is told of every image before and after its manifest is pushed."""

    def before_push(self, image: HookImage) -> None:
        """Raise `NydusError` when it may not be pushed."""

    def after_push(self, image: HookImage) -> None:
        """Raise `NydusError` when what follows a push failed."""


@dataclass(slots=True)
class ConversionResult:
    """What was made; sizes in bytes, times in seconds."""

    descriptor: Descriptor
    images: list[ConvertedImage]
    source_bytes: int = 0
    target_bytes: int = 0
    pull_seconds: float = 0.0
    convert_seconds: float = 0.0
    push_seconds: float = 0.0
    cached: int = 0
    layers: int = 0


def select_images(index: Index, platforms: str, all_platforms: bool) -> list[Descriptor]:
    """Return the images of an index that are asked for.

    Raises:
        ImageError: it has Nydus images already, or lacks a platform.
    """
    if any(item.is_nydus_manifest for item in index.manifests):
        raise ImageError("source has a Nydus image already")
    images = [
        item for item in index.manifests if item.platform is None or item.platform.os != _NO_IMAGE
    ]
    if all_platforms:
        if not images:
            raise ImageError("source index has no images")
        return images
    chosen = []
    for wanted in parse_platforms(platforms) if platforms else (host_platform(),):
        found = next((one for one in images if matches(wanted, one.platform)), None)
        if found is None:
            there = ", ".join(str(one.platform) for one in images if one.platform is not None)
            raise ImageError(f"source has no image for platform {wanted}", got=there or "none")
        if found not in chosen:
            chosen.append(found)
    return chosen


@dataclass(slots=True)
class Conversion:
    """Converts one reference.

    Args:
        source: the image.
        target: the result.
        options: how to convert.
        blobs: where data blobs go when that is not the target.
        cache: layers that were converted before.
        prover: compares before anything gets the target's name.
        before_push: called when all images are made and proved, before the first is published.
        hook: asked before that, and told when all is published.
    """

    source: Source
    target: Target
    options: ConvertOptions
    blobs: BlobStore | None = None
    cache: LayerCache | None = None
    prover: Prover | None = None
    before_push: Callable[[], None] | None = None
    hook: Hook | None = None
    _proofs: dict[str, Any] = field(default_factory=dict)

    def run(self) -> ConversionResult:
        """Convert, prove, and publish.

        Nothing gets the target's name before all of it is there and proved.

        Raises:
            NydusError: the source cannot be read or is none, or the target does not take it.
        """
        name = self.source.name
        logger.info("pulling image %s", name)
        start = time.monotonic()
        top, images = self._load()
        pulled = time.monotonic()
        logger.info("pulled image %s , elapse %s", name, _elapsed(pulled - start))
        logger.info("converting image %s", name)
        converter = ImageConverter(
            self.source, self.target, self.options, self.blobs, self.cache, self.prover
        )
        try:
            for image in images:
                if self.prover is not None:
                    self.prover.expect(image.manifest, image.config)
                converter.begin(image)
            made = [converter.convert(image) for image in images]
        finally:
            converter.close()
        if self.prover is not None:
            for one in made:
                self._proofs[one.source.descriptor.digest] = self.prover.prove(
                    one.manifest, one.source.manifest, one.source.config
                )
        converted = time.monotonic()
        logger.info(
            "converted image %s , elapse %s", self.target.name, _elapsed(converted - pulled)
        )
        descriptor = self._push(top, made)
        pushed = time.monotonic()
        logger.info("pushed image %s, elapse %s", self.target.name, _elapsed(pushed - converted))
        result = ConversionResult(descriptor, made)
        result.pull_seconds, result.push_seconds = pulled - start, pushed - converted
        result.convert_seconds = converted - pulled
        result.source_bytes = _total(one.source.manifest for one in made)
        result.target_bytes = _total(one.manifest for one in made)
        result.cached = converter.cached
        result.layers = sum(len(one.layers) for one in made)
        return result

    def _push(self, top: Index | None, made: list[ConvertedImage]) -> Descriptor:
        """Publish the images, unless somebody who is asked before refuses."""
        told = [
            HookImage(
                one.bootstrap,
                self.source.name,
                self.target.name,
                tuple((layer.descriptor.hex, layer.descriptor.size) for layer in one.layers),
            )
            for one in made
        ]
        if self.hook is not None:
            for image in told:
                self.hook.before_push(image)
        if self.before_push is not None:
            self.before_push()
        logger.info("pushing image %s", self.target.name)
        descriptor = self._publish(top, made)
        if self.hook is not None:
            for image in told:
                self.hook.after_push(image)
        return descriptor

    def _load(self) -> tuple[Index | None, list[SourceImage]]:
        """Return the source's index, if it is one, and the images to convert."""
        descriptor = self.source.resolve()
        index = None
        if media.is_index(descriptor.media_type):
            index = Index.parse(self.source.document(descriptor), descriptor.media_type)
            options = self.options
            chosen = select_images(index, options.platforms, options.all_platforms)
        else:
            chosen = [descriptor]
        is_one = len(chosen) == 1 and not self.options.merge_platform
        origin = descriptor.digest if is_one else ""
        images = [SourceImage.load(self.source, one, origin) for one in chosen]
        for image in images:
            image.check_convertible()
        return index, images

    def _publish(self, top: Index | None, made: list[ConvertedImage]) -> Descriptor:
        if self.options.merge_platform:
            return self._publish_merged(made)
        if len(made) == 1:
            return self._name(made[0].data, made[0].manifest.media_type, made)
        return self._publish_index(top, made)

    def _attach(self, one: ConvertedImage, descriptor: Descriptor) -> None:
        proof = self._proofs.get(one.source.descriptor.digest)
        if self.prover is not None and proof is not None:
            source = one.source
            self.prover.publish(proof, descriptor, source.descriptor, source.manifest.layers)

    def _publish_index(self, top: Index | None, made: list[ConvertedImage]) -> Descriptor:
        entries = []
        for one in made:
            self.target.publish(one.data, one.descriptor, named=False)
            self._attach(one, one.descriptor)
            entries.append(replace(one.descriptor, platform=_platform(one.source)))
        kind = media.OCI_INDEX if top is None else top.media_type
        if self.options.oci or self.options.oci_ref:
            kind = media.oci_type(kind)
        data = Index(kind, tuple(entries)).pack()
        return self._name(data, kind)

    def _publish_merged(self, made: list[ConvertedImage]) -> Descriptor:
        """Publish an index with the originals, then the Nydus images."""
        originals, converted = [], []
        for one in made:
            originals.append(self._publish_original(one.source))
            config = replace(one.manifest.config, media_type=media.NYDUS_CONFIG)
            data = replace(one.manifest, config=config).pack()
            descriptor = describe(data, one.manifest.media_type)
            self.target.publish(data, descriptor, named=False)
            self._attach(one, descriptor)
            converted.append(
                replace(
                    descriptor,
                    platform=_platform(one.source),
                    artifact_type=media.NYDUS_ARTIFACT,
                )
            )
        data = Index(media.OCI_INDEX, (*originals, *converted)).pack(2, named=False)
        return self._name(data, media.OCI_INDEX)

    def _publish_original(self, image: SourceImage) -> Descriptor:
        """Publish the source's own image with an empty layer in front."""
        old = image.manifest
        for layer in old.layers:
            copy_blob(self.source, self.target, layer)
        is_oci = media.oci_type(old.media_type) == old.media_type
        kind = media.OCI_LAYER_GZIP if is_oci else media.DOCKER_LAYER_GZIP
        empty = describe(EMPTY_LAYER, kind)
        self.target.put(empty, [EMPTY_LAYER])
        config = image.config.with_layers(
            [EMPTY_DIFF_ID, *image.config.diff_ids],
            [history_entry("Nydus Empty Layer"), *image.config.history],
        ).pack(2)
        stored = describe(config, old.config.media_type)
        self.target.put(stored, [config])
        origin = {media.SOURCE_DIGEST: image.descriptor.digest}
        manifest = Manifest(
            old.media_type,
            stored,
            (empty.annotated(EMPTY_LAYER="true"), *old.layers),
            {**old.annotations, **origin},
            old.subject,
        )
        data = manifest.pack()
        descriptor = describe(data, old.media_type)
        self.target.publish(data, descriptor, named=False)
        return replace(descriptor, platform=_platform(image), annotations=origin)

    def _name(
        self, data: bytes, media_type: str, made: Sequence[ConvertedImage] = ()
    ) -> Descriptor:
        """Give the result its name; an archive takes what refers to images only before that."""
        descriptor = describe(data, media_type)
        before = self.target.attaches_first
        for one in made if before else ():
            self._attach(one, descriptor)
        self.target.publish(data, descriptor)
        for one in () if before else made:
            self._attach(one, descriptor)
        return descriptor


def _platform(image: SourceImage) -> Platform:
    return image.descriptor.platform or image.config.platform


def _total(manifests: Iterable[Manifest]) -> int:
    return sum(layer.size for one in manifests for layer in one.layers)


def _elapsed(seconds: float) -> str:
    """Return a time as the real tool prints it."""
    return f"{seconds:.6f}s" if seconds >= 1 else f"{seconds * 1000:.6f}ms"
