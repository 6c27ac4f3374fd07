"""From what a bundle is made of to one bootstrap: an image in a layout, or a folder of one.

Layers of a plain OCI image are built and merged here; what a Nydus image has is used as it is.
Where images come from is `builder.oci`'s.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from builder import BuildError, BuildOptions, MergeOptions, SourceType, build, merge
from builder.backends import blob_directory
from builder.blobfiles import BlobProvider
from builder.convert.bootlayer import extract_bootstrap
from builder.oci import media
from builder.oci.names import matches
from builder.oci.place import PieceReader, Source
from builder.oci.records import Descriptor, Index, Manifest, Platform
from erofs.errors import UnsupportedFeature
from erofs.rafs import Compressor

__all__ = ["BundleSource", "Input", "open_folder", "open_image"]

_BOOTSTRAP_NAMES = ("image/image.boot", "image.boot", "bootstrap")
_COPY_BYTES = 1 << 20
# Nested indexes deeper than this are nobody's.
_MAX_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Input:
    """A file that went into a bundle: what it was, its SHA-256 in hex, its bytes."""

    name: str
    kind: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class BundleSource:
    """An image that a disk can be made of."""

    bootstrap: Path
    blobs: BlobProvider
    inputs: tuple[Input, ...]


# Folders


def open_folder(folder: Path) -> BundleSource:
    """Return the image of a folder: a bootstrap, and blobs beside it or in `blobs`.

    Raises:
        BuildError: there is none, or a file cannot be read.
    """
    found = [folder / name for name in _BOOTSTRAP_NAMES if (folder / name).is_file()]
    if not found:
        expected = f"{', '.join(_BOOTSTRAP_NAMES)}, or an OCI layout"
        raise BuildError("no image is in the folder", path=folder, expected=expected)
    directory = folder / "blobs" if (folder / "blobs").is_dir() else folder
    blobs = [path for path in sorted(directory.iterdir()) if _is_blob(path)]
    inputs = [_input_of(found[0], "bootstrap"), *(_input_of(path, "blob") for path in blobs)]
    return BundleSource(found[0], blob_directory(directory), tuple(inputs))


def _is_blob(path: Path) -> bool:
    name = path.name
    return path.is_file() and len(name) == 64 and not set(name) - set("0123456789abcdef")


def _input_of(path: Path, kind: str) -> Input:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Input(path.name, kind, digest, file.tell())
    except OSError as error:
        raise BuildError(f"cannot be read ({error.strerror})", path=path) from error


# Images in layouts


def open_image(source: Source, wanted: Platform, work: Path) -> BundleSource:
    """Return an image of a layout or registry; all that gets onto a disk is verified.

    Args:
        source: of the image; stays the caller's.
        wanted: what to choose in an index.
        work: an empty directory, for what has to be built.

    Raises:
        FormatError: the image is broken, or of a kind that has no disk.
        IntegrityError: content has another digest.
        NydusError: the image is not there, or a layer cannot be read or built.
    """
    inputs: list[Input] = []
    manifest = _choose(source, wanted, inputs)
    inputs.append(_listed(manifest.config, "config"))
    inputs += [_listed(layer, "layer") for layer in manifest.layers]
    source.document(manifest.config)
    if manifest.bootstrap is not None:
        target = work / "image.boot"
        extract_bootstrap(source.pieces(manifest.bootstrap), manifest.bootstrap, target)
        # Chunks are verified by the bootstrap.
        return BundleSource(target, source, tuple(inputs))
    return BundleSource(*_build(source, manifest, work), tuple(inputs))


def _listed(descriptor: Descriptor, kind: str) -> Input:
    return Input(descriptor.digest, kind, descriptor.hex, descriptor.size)


def _choose(source: Source, wanted: Platform, inputs: list[Input]) -> Manifest:
    """Return the manifest of a platform, through indexes; of several the first."""
    entry = source.resolve()
    for _ in range(_MAX_DEPTH):
        content = source.document(entry)
        if not media.is_index(entry.media_type):
            inputs.append(_listed(entry, "manifest"))
            return Manifest.parse(content, entry.media_type)
        inputs.append(_listed(entry, "index"))
        found = [
            item
            for item in Index.parse(content, entry.media_type).manifests
            if matches(wanted, item.platform)
        ]
        if not found:
            raise BuildError("the index has no image for", got=str(wanted))
        entry = found[0]
    raise BuildError("index in an index", expected=f"at most {_MAX_DEPTH}")


def _build(source: Source, manifest: Manifest, work: Path) -> tuple[Path, BlobProvider]:
    """Build every layer and merge them; a disk is uncompressed, so nothing is compressed."""
    blobs = work / "blobs"
    blobs.mkdir()
    bootstraps = []
    for number, layer in enumerate(manifest.layers):
        if layer.media_type not in media.LAYER_TYPES:
            raise UnsupportedFeature("media type of a layer", got=layer.media_type)
        bootstraps.append(work / f"layer{number}.boot")
        options = BuildOptions(
            source_type=SourceType.TAR,
            bootstrap=bootstraps[-1],
            blob_dir=blobs,
            compressor=Compressor.NONE,
        )
        # It is read to its end, where its digest is looked at.
        stream = io.BufferedReader(PieceReader(source.pieces(layer), layer.digest), _COPY_BYTES)
        build(stream, options)
    target = work / "image.boot"
    merge(bootstraps, MergeOptions(bootstrap=target, keep_ids=True))
    return target, blob_directory(blobs)
