"""Images in OCI layout folders: `oci-layout`, `index.json`, `blobs/sha256/…`."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from builder.oci import media
from builder.oci.errors import ImageError
from builder.oci.place import Source, Verifier, read_document, uploading
from builder.oci.records import DOCUMENT_LIMIT, Descriptor, Index
from builder.output import write_file
from erofs.errors import error_context
from fscache.backend import BlobReader, LocalFsConfig, open_backend

__all__ = ["BlobFolder", "FileUpload", "LayoutSource", "LayoutTarget", "choose",
           "is_layout", "remove_tree"]  # fmt: skip

BLOBS = "blobs/sha256"
INDEX = "index.json"
MARK = "oci-layout"
MARK_TEXT = b'{"imageLayoutVersion":"1.0.0"}'
PIECE_BYTES = 1 << 20
_MODE = 0o644


def choose(index: Index, name: str, path: Path) -> Descriptor:
    """Return the image of a name in an `index.json`, without one the only image; raise.

    What refers to an image, such as root hashes of its disk, is none.
    """
    found: Sequence[Descriptor] = [
        one for one in index.manifests if not one.artifact_type or one.is_nydus_manifest
    ]
    if name:
        keys = (media.REF_NAME, media.IMAGE_NAME)
        found = [item for item in found if name in map(item.annotations.get, keys)]
    if len(found) != 1:
        what = f"image {name}" if name else "exactly one image"
        raise ImageError(f"{what} is not in the layout", path=path, got=f"{len(found)} images")
    return found[0]


def is_layout(path: Path) -> bool:
    """Tell whether a folder says that it is a layout."""
    return (path / MARK).is_file()


def _read_small(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(DOCUMENT_LIMIT + 1)
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})", path=path) from error


class LayoutSource:
    """An image of a layout folder.

    Args:
        directory: the folder.
        name: which of its images; empty for the only one.
        shown: what to call the image.
    """

    def __init__(self, directory: Path, name: str = "", shown: str = "") -> None:
        self.directory = directory
        self._wanted = name
        self.name = shown or str(directory)
        self._blobs = open_backend(LocalFsConfig(dir=directory / BLOBS))

    def resolve(self) -> Descriptor:
        """Return the image's descriptor of `index.json`; raise `ImageError`."""
        path = self.directory / INDEX
        with error_context(path=path):
            index = Index.parse(_read_small(path))
        return choose(index, self._wanted, path)

    def document(self, descriptor: Descriptor) -> bytes:
        """Return a document, verified; raise `NydusError`."""
        return read_document(self, descriptor)

    def pieces(self, descriptor: Descriptor) -> Generator[bytes]:
        """Yield a blob, verified at its end; raise `NydusError`."""
        path = self.directory / BLOBS / descriptor.hex
        verifier = Verifier(descriptor)
        try:
            with path.open("rb", buffering=0) as file:
                while piece := file.read(PIECE_BYTES):
                    verifier.update(piece)
                    yield piece
        except OSError as error:
            raise ImageError(f"cannot be read ({error.strerror})", path=path) from error
        with error_context(path=path):
            verifier.finish()

    def open(self, blob_id: str) -> BlobReader:
        """Return a reader of ranges; raise `BackendError`."""
        return self._blobs.open(blob_id)

    def close(self) -> None:
        """Close files."""
        self._blobs.close()


class FileUpload:
    """A blob that becomes a file named by its digest."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sum = hashlib.sha256()
        self._size = 0
        descriptor, name = tempfile.mkstemp(prefix=".part-", dir=directory)
        self._path = Path(name)
        self._file = os.fdopen(descriptor, "wb", buffering=PIECE_BYTES)

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """Append bytes; raise `ImageError`."""
        self._sum.update(data)
        self._size += len(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise ImageError(f"writing failed ({error.strerror})", path=self._path) from error

    def finish(self, media_type: str) -> Descriptor:
        """Make the file durable under its digest; raise `ImageError`."""
        digest = self._sum.hexdigest()
        try:
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            self._path.chmod(_MODE)
            self._path.replace(self._directory / digest)
        except OSError as error:
            raise ImageError(f"writing failed ({error.strerror})", path=self._path) from error
        return Descriptor(media_type, f"sha256:{digest}", self._size)

    def abort(self) -> None:
        """Remove what was written; nothing is raised."""
        # On a full disk there still is something in the buffer, which cannot be written now either.
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


class BlobFolder:
    """A folder of blobs named by their digests: of a layout, or a backend for data by itself.

    Args:
        directory: made when it is not there.
        force: store what is there once more.
    """

    def __init__(self, directory: Path, *, force: bool = False) -> None:
        self._directory = directory
        self._force = force
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ImageError(f"cannot be made ({error.strerror})", path=directory) from error
        self._blobs = open_backend(LocalFsConfig(dir=directory))

    def has(self, descriptor: Descriptor) -> bool:
        """Tell whether a blob of that length is there."""
        path = self._directory / descriptor.hex
        return not self._force and path.is_file() and path.stat().st_size == descriptor.size

    def begin(self) -> FileUpload:
        """Begin a blob whose digest is not known."""
        return FileUpload(self._directory)

    def put(self, descriptor: Descriptor, data: Iterable[bytes]) -> None:
        """Store a blob unless it is there; raise `ImageError` for another one."""
        if self.has(descriptor):
            return
        verifier = Verifier(descriptor)
        with uploading(self) as upload:
            for piece in data:
                verifier.update(piece)
                upload.write(piece)
            verifier.finish()
            upload.finish(descriptor.media_type)

    def mount(self, descriptor: Descriptor, source: Source) -> bool:
        """Tell that nothing is taken over: the bytes are copied."""
        return False

    def open(self, blob_id: str) -> BlobReader:
        """Return a reader of ranges; raise `BackendError`."""
        return self._blobs.open(blob_id)

    def close(self) -> None:
        """Close files."""
        self._blobs.close()


class LayoutTarget:
    """A layout folder that takes an image; it is made when it is not there.

    Args:
        directory: the folder.
        name: of the image, for `org.opencontainers.image.ref.name`; may be empty.
        image_name: the whole reference, for containerd; may be empty.
        shown: what to call the image.
    """

    # An archive made of the folder is written when the image gets its name.
    attaches_first = True

    def __init__(
        self, directory: Path, name: str = "", image_name: str = "", shown: str = ""
    ) -> None:
        self._directory = directory
        self._ref_name = name
        self._image_name = image_name
        self.name = shown or str(directory)
        self._lock = threading.Lock()
        self._folder = BlobFolder(directory / BLOBS)

    def has(self, descriptor: Descriptor) -> bool:
        """Tell whether a blob of that length is there."""
        return self._folder.has(descriptor)

    def begin(self) -> FileUpload:
        """Begin a blob whose digest is not known."""
        return self._folder.begin()

    def put(self, descriptor: Descriptor, data: Iterable[bytes]) -> None:
        """Store a blob unless it is there; raise `ImageError` for another one."""
        self._folder.put(descriptor, data)

    def mount(self, descriptor: Descriptor, source: Source) -> bool:
        """Tell that nothing is taken over: the bytes are copied."""
        return False

    def publish(self, data: bytes, descriptor: Descriptor, *, named: bool = True) -> None:
        """Store a manifest or index; `named` puts it into `index.json` in the place of an older."""
        self.put(descriptor, [data])
        if named:
            self._enter(self._named(descriptor))

    def _named(self, descriptor: Descriptor) -> Descriptor:
        names = {}
        if self._image_name:
            names[media.IMAGE_NAME] = self._image_name
        if self._ref_name:
            names[media.REF_NAME] = self._ref_name
        return replace(descriptor, annotations={**descriptor.annotations, **names})

    def _enter(self, descriptor: Descriptor) -> None:
        path = self._directory / INDEX
        with self._lock:
            old = Index.parse(_read_small(path)).manifests if path.exists() else ()
            name = descriptor.annotations.get(media.REF_NAME)
            kept = [
                item
                for item in old
                if item.digest != descriptor.digest
                and (name is None or item.annotations.get(media.REF_NAME) != name)
            ]
            write_file(self._directory / MARK, MARK_TEXT, _MODE)
            write_file(path, Index(media.OCI_INDEX, (*kept, descriptor)).pack(), _MODE)

    def attach(self, manifest: bytes, descriptor: Descriptor, subject: Descriptor) -> None:
        """Store a manifest that refers to another one, found in `index.json`."""
        self.put(descriptor, [manifest])
        self._enter(descriptor)

    def open(self, blob_id: str) -> BlobReader:
        """Return a reader of ranges; raise `BackendError`."""
        return self._folder.open(blob_id)

    def close(self) -> None:
        """Close files."""
        self._folder.close()


def remove_tree(directory: Path) -> None:
    """Remove a scratch folder, as far as it can be."""
    shutil.rmtree(directory, ignore_errors=True)
