"""Nydus images made of Nydus images: optimised ones, and dictionaries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from builder.convert.bootlayer import Content, extract_bootstrap, write_bootstrap_layer
from builder.convert.layer import copy_blob, push_blob
from builder.dictgenerate import DictionaryOptions, generate_dictionary
from builder.oci import media
from builder.oci.config import ImageConfig
from builder.oci.errors import ImageError
from builder.oci.place import BlobStore, Source, Target
from builder.oci.records import Descriptor, Manifest, describe
from builder.oci.transfer import resumed_pieces
from builder.optimize import OptimizeOptions, optimize, parse_files
from fscache.backend import Backend

__all__ = ["make_dictionary", "optimize_image", "publish", "store_config"]

logger = logging.getLogger(__name__)


def store_config(target: Target, media_type: str, config: ImageConfig) -> Descriptor:
    """Store a configuration; raise `NydusError`."""
    data = config.pack(2)
    stored = describe(data, media_type)
    target.put(stored, [data])
    return stored


def publish(target: Target, manifest: Manifest) -> Descriptor:
    """Publish an image under the target's name; raise `NydusError`."""
    data = manifest.pack()
    descriptor = describe(data, manifest.media_type)
    target.publish(data, descriptor)
    return descriptor


def optimize_image(
    source: Source,
    target: Target,
    descriptor: Descriptor,
    files: str,
    work: Path,
    store: BlobStore | None = None,
    progress: Callable[[int], None] | None = None,
) -> Descriptor:
    """Put the chunks of chosen files into one blob more, and publish the image that has it.

    Args:
        source: the image.
        target: the result.
        descriptor: of the image's manifest.
        files: the list, in JSON (spec tools 2.10).
        work: a scratch directory.
        store: where the image's data is, if not beside it; the new blob is put there.
        progress: called with numbers of bytes that are copied into that blob, or elsewhere.

    Raises:
        NydusError: the image cannot be read, is none of Nydus, or a list that is none.
    """
    old = Manifest.parse(source.document(descriptor), descriptor.media_type)
    layer = old.bootstrap
    if layer is None:
        raise ImageError(f"{source.name} is no Nydus image")
    wanted = parse_files(files)
    bootstrap = work / "nydus_bootstrap"
    extract_bootstrap(source.pieces(layer), layer, bootstrap)
    logger.info("begin to build new prefetch blob and bootstrap")
    made = work / "optimized_bootstrap"
    result = optimize(bootstrap, wanted, store or source, OptimizeOptions(made, work, progress))
    if result.blob_path is None:
        raise ImageError("no file of the list is in the image: there is nothing to optimise")
    logger.info("build success for prefetch blob : %s", result.blob_path.name)
    blobs = [one for one in old.layers if not one.is_bootstrap]
    for one in blobs:
        copy_blob(source, target, one, progress)
    prefetch = push_blob(store or target, result.blob_path).annotated(BLOB="true")
    # What is in a backend is no layer.
    own = [] if store is not None else [prefetch]
    content: list[tuple[str, Content]] = [
        ("image.boot", made), ("prefetch.files", files.encode("utf-8", "surrogateescape")),
    ]  # fmt: skip
    boot = write_bootstrap_layer(target, content, layer.media_type)
    marks = {**layer.annotations, media.PREFETCH_BLOB: prefetch.hex}
    last = replace(boot.descriptor, annotations=marks)
    config = ImageConfig.parse(source.document(old.config))
    diff_ids = [*config.diff_ids[:-1], *(one.digest for one in own), boot.diff_id]
    stored = store_config(
        target, old.config.media_type, config.with_layers(diff_ids, config.history)
    )
    return publish(target, replace(old, config=stored, layers=(*blobs, *own, last)))


def make_dictionary(
    sources: Sequence[tuple[Source, Descriptor]],
    target: Target,
    database: str,
    work: Path,
    store: Backend | None = None,
) -> Descriptor:
    """Choose the chunks that images share, and publish them as a dictionary image.

    The dictionary has the manifest of the first image with its bootstrap alone as layers.

    Args:
        sources: images, and the descriptors of their manifests.
        target: the dictionary.
        database: a file of SQLite with the chunks of earlier runs, or `:memory:`.
        work: a scratch directory.
        store: where data is that the images' manifests do not have.

    Raises:
        NydusError: an image that cannot be read, or is none of Nydus.
    """
    paths, manifests = [], []
    for source, descriptor in sources:
        manifest = Manifest.parse(source.document(descriptor), descriptor.media_type)
        layer = manifest.bootstrap
        if layer is None:
            raise ImageError(f"{source.name} is no Nydus image")
        # The last two words of the folder's name are image and version.
        path = work / source.name.replace("/", ":") / "nydus_bootstrap"
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.info("Pulling Nydus bootstrap to %s", path)
        extract_bootstrap(source.pieces(layer), layer, path)
        paths.append(path)
        manifests.append(manifest)
    made = work / "chunkdict_bootstrap"
    result = generate_dictionary(paths, DictionaryOptions(database, made))
    logger.info("Successfully generate image chunk dictionary")
    first, old = sources[0][0], manifests[0]
    _bring_blobs(target, result.blobs, sources, manifests, store)
    boot = write_bootstrap_layer(target, [("image.boot", made)], media.DOCKER_LAYER_GZIP)
    last = boot.descriptor.annotated(BOOTSTRAP="true", FS_VERSION="")
    config = ImageConfig.parse(first.document(old.config))
    stored = store_config(
        target, old.config.media_type, config.with_layers([boot.diff_id], config.history)
    )
    return publish(target, replace(old, config=stored, layers=(last,)))


def _bring_blobs(
    target: Target,
    wanted: Sequence[str],
    sources: Sequence[tuple[Source, Descriptor]],
    manifests: Sequence[Manifest],
    store: Backend | None,
) -> None:
    """Bring the blobs of a dictionary to its repository, where images will look for them."""
    places: Mapping[str, tuple[Source, Descriptor]] = {
        layer.hex: (source, layer)
        for (source, _), manifest in zip(sources, manifests, strict=True)
        for layer in manifest.layers
    }
    for blob in wanted:
        if blob in places:
            copy_blob(places[blob][0], target, places[blob][1])
        elif store is not None:
            found = Descriptor(media.NYDUS_BLOB, f"sha256:{blob}", store.open(blob).size())
            target.put(found, resumed_pieces(store.open(blob), found))
        else:
            raise ImageError("dictionary refers to a blob of no image", blob=blob)
