"""What every place of images can do: registries, layout folders, archives."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from builder.oci.errors import ImageError
from builder.oci.records import DOCUMENT_LIMIT, Descriptor
from erofs.errors import IntegrityError
from fscache.backend.base import BlobReader

__all__ = [
    "BlobStore",
    "LayerSource",
    "PieceReader",
    "Source",
    "Target",
    "Upload",
    "Verifier",
    "read_document",
    "uploading",
    "verified_pieces",
]


class LayerSource(Protocol):
    """A place that blobs are read from as wholes; safe to use from many threads."""

    def pieces(self, descriptor: Descriptor) -> Generator[bytes]:
        """Yield a blob piece by piece; raise `NydusError`, also at its end when it is another."""


class Source(LayerSource, Protocol):
    """A place that an image is read from; safe to use from many threads."""

    @property
    def name(self) -> str:
        """What the image is called, for messages and annotations."""

    def resolve(self) -> Descriptor:
        """Return what the name stands for: an index or a manifest; raise `NydusError`."""

    def document(self, descriptor: Descriptor) -> bytes:
        """Return an index, manifest or configuration, verified; raise `NydusError`."""

    def open(self, blob_id: str) -> BlobReader:
        """Return a reader of ranges of a blob; raise `NydusError` for an id that is refused."""

    def close(self) -> None:
        """Drop connections and files."""


class Upload(Protocol):
    """A blob on its way to a place; its digest is known at the end."""

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """Append bytes; raise `NydusError`."""

    def finish(self, media_type: str) -> Descriptor:
        """End the blob and return what it is; raise `NydusError`."""

    def abort(self) -> None:
        """Forget the blob; nothing is raised."""


class BlobStore(Protocol):
    """A place that blobs are written to; safe to use from many threads."""

    def has(self, descriptor: Descriptor) -> bool:
        """Tell whether a blob is there; raise `NydusError`."""

    def begin(self) -> Upload:
        """Begin a blob whose digest is not known; raise `NydusError`."""

    def put(self, descriptor: Descriptor, data: Iterable[bytes]) -> None:
        """Store a blob of known digest unless it is there; raise `NydusError`."""

    def mount(self, descriptor: Descriptor, source: Source) -> bool:
        """Take a blob over without its bytes, where that is possible; raise `NydusError`."""

    def open(self, blob_id: str) -> BlobReader:
        """Return a reader of ranges of a blob that was stored; raise `NydusError`."""

    def close(self) -> None:
        """Drop connections; what is not finished disappears."""


@contextmanager
def uploading(target: BlobStore) -> Iterator[Upload]:
    """Begin a blob, which the block finishes; on an error it is forgotten."""
    upload = target.begin()
    try:
        yield upload
    except BaseException:
        upload.abort()
        raise


class Target(BlobStore, Protocol):
    """A place that an image is written to; safe to use from many threads."""

    @property
    def name(self) -> str:
        """What the image is called, for messages."""

    @property
    def attaches_first(self) -> bool:
        """Whether `attach` has to come before the image is named."""

    def publish(self, data: bytes, descriptor: Descriptor, *, named: bool = True) -> None:
        """Store a manifest or index, whose parts are there; `named` makes it the image.

        Raises:
            NydusError: it is refused.
        """

    def attach(self, manifest: bytes, descriptor: Descriptor, subject: Descriptor) -> None:
        """Store a manifest that refers to another one; raise `NydusError`."""


class Verifier:
    """Checks bytes against a descriptor while they pass."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._descriptor = descriptor
        self._sum = hashlib.sha256()
        self.size = 0

    def update(self, piece: bytes) -> None:
        """Count bytes; raise `IntegrityError` when there are too many."""
        self.size += len(piece)
        if self.size > self._descriptor.size:
            raise IntegrityError(
                "content is longer than promised",
                blob=self._descriptor.digest,
                expected=self._descriptor.size,
                got=f"{self.size} or more",
            )
        self._sum.update(piece)

    def finish(self) -> None:
        """Raise `IntegrityError` unless length and digest are right."""
        descriptor = self._descriptor
        if self.size != descriptor.size:
            raise IntegrityError(
                "content has another length", blob=descriptor.digest, expected=descriptor.size,
                got=self.size,
            )  # fmt: skip
        found = f"sha256:{self._sum.hexdigest()}"
        if found != descriptor.digest:
            raise IntegrityError(
                "content has another digest", expected=descriptor.digest, got=found
            )


def read_document(source: Source, descriptor: Descriptor) -> bytes:
    """Return a small blob whole; raise `NydusError`."""
    if descriptor.size > DOCUMENT_LIMIT:
        raise ImageError(
            "document is too long", blob=descriptor.digest, expected=f"at most {DOCUMENT_LIMIT}",
            got=descriptor.size,
        )  # fmt: skip
    return b"".join(source.pieces(descriptor))


def verified_pieces(place: BlobStore, descriptor: Descriptor) -> Generator[bytes]:
    """Yield a blob that was stored, and raise at its end when it is another."""
    verifier = Verifier(descriptor)
    with place.open(descriptor.hex).stream(0) as pieces:
        for piece in pieces:
            verifier.update(piece)
            yield piece
    verifier.finish()


class PieceReader(io.RawIOBase):
    """Pieces as a stream to read forward."""

    def __init__(self, pieces: Iterator[bytes], name: str) -> None:
        super().__init__()
        self._pieces = pieces
        self._rest = memoryview(b"")
        self.name = name

    def readable(self) -> bool:
        """Tell that this can be read."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer; raise what the pieces raise."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
