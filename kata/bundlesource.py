"""From what a bundle is made of to one bootstrap: an OCI layout, or a folder of an image.

Layers of a plain OCI image are built and merged here; what a Nydus image has is used as it is.
Source: spec vm-runtimes 3.6 (annotations of Nydus images).
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from builder import BuildError, BuildOptions, MergeOptions, SourceType, build, merge
from builder.backends import blob_directory
from builder.blobfiles import BlobProvider
from builder.ocilayout import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    Descriptor,
    Layout,
    as_list,
)
from erofs.errors import CorruptStructure, UnsupportedFeature, error_context
from erofs.rafs import Compressor

__all__ = ["BundleSource", "Input", "open_folder", "open_layout"]

_BOOTSTRAP = "containerd.io/snapshot/nydus-bootstrap"
_BLOB = "containerd.io/snapshot/nydus-blob"
_BOOTSTRAP_NAMES = ("image/image.boot", "image.boot", "bootstrap")
# Where a bootstrap layer has it, newest first.
_MEMBERS = ("image/image.boot", "image.boot")
_MAX_BOOTSTRAP_BYTES = 4 << 30
_TAR_TYPES = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
)
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


# Layouts


def open_layout(
    path: Path, reference: str | None, platform: tuple[str, str], work: Path
) -> BundleSource:
    """Return the image of a layout, every byte of it verified.

    Args:
        path: of the layout.
        reference: name or digest; None when there is one image.
        platform: operating system and architecture, to choose in an index.
        work: an empty directory, for what has to be built.

    Raises:
        FormatError: layout or image are broken, or of a kind that has no disk.
        IntegrityError: content has another digest.
        BuildError: the image is not there, or a layer cannot be built.
    """
    layout = Layout(path)
    inputs: list[Input] = []
    manifest = _choose(layout, layout.find(reference), platform, inputs)
    config = Descriptor.from_json(manifest.get("config"))
    listed = as_list(manifest.get("layers"), "layers of the manifest")
    layers = [Descriptor.from_json(layer) for layer in listed]
    if not layers:
        raise CorruptStructure("manifest without layers", path=path)
    for descriptor, kind in ((config, "config"), *((layer, "layer") for layer in layers)):
        layout.check(descriptor)
        inputs.append(_listed(descriptor, kind))
    is_nydus = any(_BOOTSTRAP in layer.annotations for layer in layers)
    make: Callable[[Layout, list[Descriptor], Path], tuple[Path, Path]]
    make = _nydus_image if is_nydus else _plain_image
    bootstrap, blobs = make(layout, layers, work)
    return BundleSource(bootstrap, blob_directory(blobs), tuple(inputs))


def _listed(descriptor: Descriptor, kind: str) -> Input:
    return Input(descriptor.digest, kind, descriptor.hex, descriptor.size)


def _choose(
    layout: Layout, entry: Descriptor, platform: tuple[str, str], inputs: list[Input]
) -> dict[str, object]:
    """Return the manifest that an entry leads to, through indexes."""
    for _ in range(_MAX_DEPTH):
        content = layout.read(entry)
        if entry.media_type in MANIFEST_TYPES:
            inputs.append(_listed(entry, "manifest"))
            return content
        if entry.media_type not in INDEX_TYPES:
            raise UnsupportedFeature("media type of an image", got=entry.media_type)
        inputs.append(_listed(entry, "index"))
        listed = as_list(content.get("manifests"), "manifests of the index")
        entries = [Descriptor.from_json(item) for item in listed]
        wanted = [
            item for item in entries
            if (item.platform.get("os"), item.platform.get("architecture")) == platform
        ]  # fmt: skip
        if not wanted:
            raise BuildError("the index has no image for", got="/".join(platform))
        entry = wanted[0]
    raise CorruptStructure("index in an index", expected=f"at most {_MAX_DEPTH}")


def _nydus_image(layout: Layout, layers: list[Descriptor], work: Path) -> tuple[Path, Path]:
    """Take the bootstrap out of its layer; the blobs are those of the layout."""
    (*_, layer) = (layer for layer in layers if _BOOTSTRAP in layer.annotations)
    target = work / "image.boot"
    source = layout.blob(layer)
    with error_context(path=source):
        try:
            with tarfile.open(source, "r:*") as archive:
                _extract(archive, target)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise BuildError(f"bootstrap layer cannot be read ({error})") from error
    return target, layout.path / "blobs/sha256"


def _extract(archive: tarfile.TarFile, target: Path) -> None:
    for member in archive:
        name = member.name.removeprefix("./").lstrip("/")
        if name not in _MEMBERS or not member.isreg():
            continue
        if member.size > _MAX_BOOTSTRAP_BYTES:
            raise CorruptStructure("size of the bootstrap", got=member.size)
        content = archive.extractfile(member)
        if content is not None:
            with target.open("wb") as file:
                while data := content.read(_COPY_BYTES):
                    file.write(data)
            return
    raise BuildError("bootstrap layer has no bootstrap", expected=" or ".join(_MEMBERS))


def _plain_image(layout: Layout, layers: list[Descriptor], work: Path) -> tuple[Path, Path]:
    """Build every layer and merge them; a disk is uncompressed, so nothing is compressed."""
    blobs = work / "blobs"
    blobs.mkdir()
    bootstraps = []
    for number, layer in enumerate(layers):
        if layer.media_type not in _TAR_TYPES or _BLOB in layer.annotations:
            raise UnsupportedFeature("media type of a layer", got=layer.media_type)
        bootstrap = work / f"layer{number}.boot"
        options = BuildOptions(
            source_type=SourceType.TAR,
            bootstrap=bootstrap,
            blob_dir=blobs,
            compressor=Compressor.NONE,
        )
        build(layout.blob(layer), options)
        bootstraps.append(bootstrap)
    target = work / "image.boot"
    merge(bootstraps, MergeOptions(bootstrap=target, keep_ids=True))
    return target, blobs
