"""Whether an image is what it says: manifest, bootstrap, whole tree (spec tools 15.2)."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from builder.bootstrap import blob_ids, open_any_bootstrap
from builder.convert.bootlayer import extract_bootstrap
from builder.listing import blob_lines
from builder.oci import media
from builder.oci.config import ImageConfig
from builder.oci.errors import ImageError
from builder.oci.names import host_platform, matches, parse_platforms
from builder.oci.place import Source
from builder.oci.records import Index, Manifest
from builder.proof.compare import require_equal
from builder.proof.entry import Entry
from builder.proof.prover import SourceReader
from builder.proof.target import TargetTree, load_target
from erofs.check import ERROR, check_image
from erofs.digest import digest
from erofs.errors import error_context
from erofs.layout import encode_device_number
from erofs.rafs import Digester
from fscache.backend import Backend

__all__ = [
    "CheckedImage",
    "check_bootstrap",
    "check_configs",
    "check_manifest",
    "check_tree",
    "load_image",
    "read_mounted",
]

logger = logging.getLogger(__name__)

_LAYERS_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """One image of a reference, with its documents as they are stored."""

    source: Source
    manifest: Manifest
    config: ImageConfig
    documents: dict[str, bytes]

    @property
    def is_nydus(self) -> bool:
        """Whether it has a bootstrap."""
        return self.manifest.bootstrap is not None

    @property
    def kind(self) -> str:
        """The word for logs and names of files."""
        return "nydus" if self.is_nydus else "oci"

    def dump(self, directory: Path) -> None:
        """Write the documents to a folder, indented as they are."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self.documents.items():
            (directory / f"{self.kind}_{name}.json").write_bytes(data)


def load_image(source: Source, platforms: str = "", *, nydus: bool) -> CheckedImage:
    """Read the documents of an image, of an index the one for the platform and of that kind.

    Raises:
        ImageError: the index has no such image.
        NydusError: something cannot be read, or is not what its digest promises.
    """
    top = source.resolve()
    documents = {}
    chosen = top
    if media.is_index(top.media_type):
        documents["index"] = source.document(top)
        index = Index.parse(documents["index"], top.media_type)
        wanted = parse_platforms(platforms)[0] if platforms else host_platform()
        found = [one for one in index.manifests if matches(wanted, one.platform)]
        if not found:
            raise ImageError(f"image {source.name} has nothing for platform {wanted}")
        chosen = next((one for one in found if one.is_nydus_manifest == nydus), found[0])
    documents["manifest"] = source.document(chosen)
    manifest = Manifest.parse(documents["manifest"], chosen.media_type)
    documents["config"] = source.document(manifest.config)
    # A model has a configuration of its own kind.
    is_model = manifest.artifact_type == media.MODEL_ARTIFACT
    config = ImageConfig({}) if is_model else ImageConfig.parse(documents["config"])
    return CheckedImage(source, manifest, config, documents)


def check_manifest(image: CheckedImage) -> None:
    """Raise `ImageError` unless layers, their marks and the configuration fit together."""
    manifest = image.manifest
    if not image.is_nydus:
        for layer in manifest.layers:
            if layer.media_type not in media.LAYER_TYPES:
                raise ImageError("layer of an unknown type", blob=layer.digest)
    else:
        *blobs, last = manifest.layers
        if not last.is_bootstrap:
            raise ImageError("bootstrap is not the last layer", blob=last.digest)
        if manifest.artifact_type == media.MODEL_ARTIFACT:
            return
        for layer in blobs:
            if layer.media_type != media.NYDUS_BLOB or media.BLOB not in layer.annotations:
                raise ImageError("layer is not marked as a blob", blob=layer.digest)
    if len(image.config.diff_ids) != len(manifest.layers):
        raise ImageError(
            "number of diff ids in the configuration", expected=len(manifest.layers),
            got=len(image.config.diff_ids),
        )  # fmt: skip


def check_configs(source: CheckedImage, target: CheckedImage) -> None:
    """Raise `ImageError` unless what runs in both images is the same."""
    one, other = (image.config.without_layers().get("config") for image in (source, target))
    if one != other:
        raise ImageError(
            "validate image config: source image config should be equal with target image config"
        )


def check_bootstrap(image: CheckedImage, path: Path, tell: Callable[[str], None]) -> None:
    """Fetch the bootstrap to a file and check it, and that manifest and blob table agree.

    Args:
        image: a Nydus image.
        path: of the file.
        tell: called with the lines of the blob table.

    Raises:
        NydusError: it is broken, or names blobs that the manifest does not.
    """
    layer = image.manifest.bootstrap
    if layer is None:
        raise ImageError("image has no bootstrap")
    extract_bootstrap(image.source.pieces(layer), layer, path)
    with error_context(path=path), open_any_bootstrap(path) as opened:
        for finding in check_image(opened):
            if finding.severity == ERROR:
                raise ImageError(str(finding))
            logger.warning("%s", finding)
        ids = blob_ids(opened, path)
        tell("RAFS filesystem metadata is valid, referenced data blobs: ")
        for line in blob_lines(opened, ids):
            tell(line)
    known = {one.hex for one in image.manifest.layers}
    known |= {one.annotations.get(media.LAYER_REF, "")[7:] for one in image.manifest.layers}
    # With a storage backend the manifest has the bootstrap alone.
    missing = [one for one in ids if one not in known]
    if len(image.manifest.layers) > 1 and missing:
        raise ImageError("bootstrap names a blob that the manifest lacks", blob=missing[0])


def check_tree(
    source: CheckedImage,
    path: Path,
    blobs: Source | Backend,
    mounted: Callable[[TargetTree], Entry] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Compare the trees of both images, and read every chunk of the target.

    Args:
        source: an OCI image.
        path: of the target's bootstrap.
        blobs: where the target's data is.
        mounted: gives the target's tree as the kernel shows it, in place of our reader.
        progress: called with numbers of content bytes of the source.

    Raises:
        TreesDiffer: they are not equal; names the first differences.
        NydusError: something cannot be read, or is not what it should be.
    """
    tree = load_target(path)
    reader = SourceReader(source.source, tree.chunk_bytes, tree.digester, _LAYERS_AT_ONCE, progress)
    try:
        reader.begin(source.manifest, source.config)
        if mounted is None:
            tree.verify_blobs(blobs)
            root = tree.root
        else:
            root = mounted(tree)
        require_equal(reader.tree(source.manifest, source.config), root)
    finally:
        reader.close()


def read_mounted(top: Path, chunk_bytes: int, digester: Digester) -> Entry:
    """Return a mounted tree as entries; raise `OSError`."""
    inodes: dict[tuple[int, int], Entry] = {}

    def read(path: bytes) -> Entry:
        status = os.lstat(path)
        key = (status.st_dev, status.st_ino)
        if key in inodes and not stat.S_ISDIR(status.st_mode):
            return inodes[key]
        entry = inodes[key] = Entry(
            status.st_mode, status.st_uid, status.st_gid, int(status.st_mtime_ns // 10**9)
        )
        entry.xattrs = {
            name.encode("utf-8", "surrogateescape"): os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
        }
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFLNK:
            entry.target = os.readlink(path)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            entry.rdev = encode_device_number(os.major(status.st_rdev), os.minor(status.st_rdev))
        elif kind == stat.S_IFREG:
            entry.size = status.st_size
            entry.digests = _file_digests(path, chunk_bytes, digester)
        return entry

    root = read(os.fsencode(top))
    root.children = {}
    stack = [(os.fsencode(top), root)]
    while stack:
        directory, entry = stack.pop()
        children = entry.children if entry.children is not None else {}
        for name in os.listdir(directory):
            path = directory + b"/" + name
            child = children[name] = read(path)
            if stat.S_ISDIR(child.mode):
                child.children = {}
                stack.append((path, child))
    return root


def _file_digests(path: bytes, chunk_bytes: int, digester: Digester) -> tuple[bytes, ...]:
    found = []
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(chunk_bytes):
            while len(piece) < chunk_bytes and (more := file.read(chunk_bytes - len(piece))):
                piece += more
            found.append(digest(digester, piece))
    return tuple(found)
