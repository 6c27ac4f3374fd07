"""Make a bundle: everything that a microVM platform needs of one image, in one folder.

Offline and reproducible: the same image and place give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from builder import BuildError, ExportOptions, ExportResult, VerityOptions, export_block
from builder.oci.layout import LayoutSource, is_layout
from builder.oci.place import Source
from builder.oci.records import Platform
from builder.output import write_file
from erofs.errors import NydusError
from erofs.version import VERSION
from kata.bundlefiles import DISK_NAME, BundledDisk, bundle_files
from kata.bundlesource import BundleSource, open_folder, open_image
from kata.verity import DmVerity

__all__ = ["BundleOptions", "make_bundle"]

DEFAULT_PLATFORM = Platform("amd64", "linux")
_MODE = 0o644
_FOLDER_MODE = 0o755


@dataclass(frozen=True, slots=True)
class BundleOptions:
    """How a bundle is made.

    Args:
        reference: name of the image in a layout; empty when there is one.
        platform: what to choose in an index.
        place: directory where the bundle will be on the hosts that use it; None for
            `/var/lib/kata/bundles/<root hash>`.
    """

    reference: str = ""
    platform: Platform = DEFAULT_PLATFORM
    place: PurePosixPath | None = None


def make_bundle(
    source: Path | Source, output: Path, options: BundleOptions | None = None
) -> BundledDisk:
    """Make a bundle; it appears whole or not at all.

    Args:
        source: an OCI layout, a folder with bootstrap and blobs, or an image of a registry,
            which stays the caller's.
        output: a path where nothing is yet.
        options: see there.

    Raises:
        NydusError: as `open_image`, `open_folder` and `export_block`.
        BuildError: the output is there already, or cannot be written.
    """
    options = options or BundleOptions()
    if os.path.lexists(output):
        raise BuildError("is there already", path=output)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as name:
            work, folder = Path(name, "work"), Path(name, "bundle")
            work.mkdir()
            folder.mkdir(mode=_FOLDER_MODE)
            folder.chmod(_FOLDER_MODE)
            with ExitStack() as stack:
                disk = _fill(folder, _open(source, options, work, stack), options)
            shutil.rmtree(work)
            folder.rename(output)
            _sync(output.parent)
    except OSError as error:
        raise BuildError(f"cannot be written ({error.strerror})", path=output) from error
    return disk


def _open(
    source: Path | Source, options: BundleOptions, work: Path, stack: ExitStack
) -> BundleSource:
    """Open what the bundle is made of; the stack closes it."""
    if not isinstance(source, Path):
        return open_image(source, options.platform, work)
    if is_layout(source):
        layout = LayoutSource(source, options.reference)
        stack.callback(layout.close)
        return open_image(layout, options.platform, work)
    if options.reference:
        raise BuildError("a reference needs an OCI layout", path=source)
    if not source.is_dir():
        raise BuildError("is no folder", path=source)
    return open_folder(source)


def _fill(folder: Path, source: BundleSource, options: BundleOptions) -> BundledDisk:
    result = export_block(
        source.bootstrap, folder / DISK_NAME, source.blobs, ExportOptions(VerityOptions())
    )
    disk, verity = _describe(result, options.place)
    for name, text in bundle_files(disk, verity, source.inputs, VERSION).items():
        write_file(folder / name, text.encode(), _MODE)
    _sync(folder)
    return disk


def _describe(
    result: ExportResult, place: PurePosixPath | None
) -> tuple[BundledDisk, dict[str, object]]:
    tree = result.tree
    if tree is None:
        raise NydusError("a disk without a hash tree")
    root = tree.root.hex()
    folder = place or PurePosixPath("/var/lib/kata/bundles", root)
    with result.disk.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
    return BundledDisk(DmVerity.from_tree(tree), digest, size, folder / DISK_NAME), tree.as_json()


def _sync(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
