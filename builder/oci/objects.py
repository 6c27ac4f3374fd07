"""A bucket of S3 or OSS as a place that blobs are written to: `BlobStore` on `ObjectStore`.

An object has its name from the start, and a blob's name is the digest of its bytes: a blob that
is being built lies in a file until its end.
"""

from __future__ import annotations

import hashlib
import html
import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from xml.sax.saxutils import escape

from builder.oci.errors import ImageError
from builder.oci.place import Source, Verifier
from builder.oci.records import Descriptor
from erofs.errors import error_context
from fscache.backend import BackendError, NotFound, ObjectStoreConfig, Unavailable
from fscache.backend.answer import Answer
from fscache.backend.base import BlobReader
from fscache.backend.objectstore import ObjectStoreBackend
from fscache.backend.ranges import status_error
from fscache.backend.retry import RetryPolicy
from fscache.backend.session import SessionSender
from fscache.backend.signing import Query

__all__ = ["ObjectBlobs", "object_backend"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_REQUEST_SECONDS = 3600.0
_ANSWER_BYTES = 1 << 20
_COPY_BYTES = 1 << 20
# Both stores take 10 000 parts, each but the last of at least 5 MiB (OSS: 100 KiB).
_PART_BYTES = 8 << 20
_MAX_PARTS = 10_000
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,80})</Code>")
_UPLOAD_ID = re.compile(rb"<UploadId>([^<]{1,2048})</UploadId>")


def object_backend(config: ObjectStoreConfig) -> ObjectStoreBackend:
    """Return a backend that goes the environment's ways, unless the configuration names one."""
    if config.proxy is not None or config.mirrors:
        return ObjectStoreBackend(config)
    return ObjectStoreBackend(config, SessionSender(config))


class ObjectBlobs:
    """Blobs of a bucket, named by their digests behind its prefix; for many threads.

    Args:
        config: of the bucket.
        work: a scratch directory for blobs that are being built.
        retry: how failed requests are repeated.
        force: store what is there once more.
    """

    def __init__(
        self, config: ObjectStoreConfig, work: Path, retry: RetryPolicy, *, force: bool = False
    ) -> None:
        self._backend = object_backend(config)
        self._work = work
        self._retry = retry
        self._force = force
        self._stop = threading.Event()

    def has(self, descriptor: Descriptor) -> bool:
        """Tell whether a blob of that length is there; raise `NydusError`."""
        return not self._force and self._stored(descriptor.hex) == descriptor.size

    def _stored(self, name: str) -> int | None:
        """Return the length of an object, None when there is none."""
        reader = self._backend.open(name)
        try:
            return self._again(reader.size)
        except NotFound:
            return None

    def begin(self) -> _Spool:
        """Begin a blob whose digest is not known."""
        return _Spool(self, self._work)

    def put(self, descriptor: Descriptor, data: Iterable[bytes]) -> None:
        """Store a blob unless it is there; raise `NydusError` for another one."""
        if self.has(descriptor):
            logger.info("skip upload because blob exists: %s", descriptor.hex)
            return
        self.store(descriptor.hex, _verified(descriptor, data), descriptor.size)
        logger.info("uploaded blob %s", descriptor.hex)

    def store(self, name: str, data: Iterable[bytes], size: int) -> None:
        """Store an object, whatever is there; it is there whole or not at all.

        Args:
            name: behind the prefix.
            data: that many bytes; if it raises, nothing is stored.
            size: decides on one request or many.

        Raises:
            NydusError: it cannot be stored.
        """
        key = self._backend.store.key(name)
        with error_context(blob=name):
            if size <= _PART_BYTES:
                body = b"".join(data)
                self._again(lambda: self._ask("PUT", key, body=body))
                return
            part_bytes = max(_PART_BYTES, -(-size // _MAX_PARTS))
            answer, _ = self._again(lambda: self._ask("POST", key, [("uploads", "")]))
            match = _UPLOAD_ID.search(answer)
            if match is None:
                raise BackendError("store begins no upload")
            upload = html.unescape(match[1].decode("utf-8", "replace"))
            try:
                tags = self._send_parts(key, upload, _parts(data, part_bytes))
                self._complete(key, name, upload, tags, size)
            except BaseException:
                self._abort(key, upload)
                raise

    def _send_parts(self, key: str, upload: str, parts: Iterable[bytes]) -> list[str]:
        tags = []
        for number, part in enumerate(parts, 1):
            query = [("partNumber", str(number)), ("uploadId", upload)]
            _, tag = self._again(lambda q=query, p=part: self._ask("PUT", key, q, p))  # type: ignore[misc]
            tags.append(tag)
        return tags

    def _complete(self, key: str, name: str, upload: str, tags: list[str], size: int) -> None:
        """Make one object of the parts; the answer to a try before may have been lost."""
        rows = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(tag)}</ETag></Part>"
            for number, tag in enumerate(tags, 1)
        )
        body = f"<CompleteMultipartUpload>{rows}</CompleteMultipartUpload>".encode()
        try:
            self._again(lambda: self._ask("POST", key, [("uploadId", upload)], body))
        except NotFound:
            if self._stored(name) != size:
                raise

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._ask("DELETE", key, [("uploadId", upload)])
        except BackendError as error:
            logger.warning("parts of an upload are left in the bucket: %s", error)

    def _again(self, operation: Callable[[], _T]) -> _T:
        return self._retry.run(operation, self._stop)

    def _ask(
        self, method: str, key: str, query: Query = (), body: bytes = b""
    ) -> tuple[bytes, str]:
        """Send one request; return the body of the answer and its ETag; raise `BackendError`."""
        deadline = time.monotonic() + _REQUEST_SECONDS
        with self._backend.store.ask(method, key, {}, deadline, query=query, body=body) as answer:
            text = answer.read_all(_ANSWER_BYTES, deadline)
            if answer.status not in (200, 204):
                raise _refusal(answer, text)
            # S3 begins to answer before it has put an object together.
            if b"<Error>" in text:
                raise Unavailable(f"store fails ({_code(text)})", temporary=True)
            return text, answer.headers.get("ETag", "")

    def mount(self, descriptor: Descriptor, source: Source) -> bool:
        """Tell that nothing is taken over: the bytes are copied."""
        return False

    def open(self, blob_id: str) -> BlobReader:
        """Return a reader of ranges; raise `BackendError`."""
        return self._backend.open(blob_id)

    def close(self) -> None:
        """Drop idle connections and end pauses."""
        self._stop.set()
        self._backend.close()


class _Spool:
    """A blob that is being built: a file until its digest is known."""

    def __init__(self, place: ObjectBlobs, work: Path) -> None:
        self._place = place
        self._work = work
        self._sum = hashlib.sha256()
        self._size = 0
        self._file = tempfile.TemporaryFile(prefix="blob-", dir=work)  # noqa: SIM115 - closed below

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """Append bytes; raise `ImageError`."""
        self._sum.update(data)
        self._size += len(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> ImageError:
        return ImageError(f"writing failed ({error.strerror})", path=self._work)

    def finish(self, media_type: str) -> Descriptor:
        """Store the blob under its digest; raise `NydusError`."""
        descriptor = Descriptor(media_type, f"sha256:{self._sum.hexdigest()}", self._size)
        with self._file as file:
            try:
                file.seek(0)
            except OSError as error:
                raise self._failed(error) from error
            self._place.put(descriptor, iter(lambda: file.read(_COPY_BYTES), b""))
        return descriptor

    def abort(self) -> None:
        """Forget what was written; nothing is raised."""
        # On a full disk there still is something in the buffer, which cannot be written now either.
        with suppress(OSError):
            self._file.close()


def _verified(descriptor: Descriptor, data: Iterable[bytes]) -> Iterator[bytes]:
    verifier = Verifier(descriptor)
    for piece in data:
        verifier.update(piece)
        yield piece
    verifier.finish()


def _parts(data: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Cut pieces anew, into parts of one size but for the last."""
    part = bytearray()
    for piece in data:
        part += piece
        while len(part) >= size:
            yield bytes(part[:size])
            del part[:size]
    if part:
        yield bytes(part)


def _code(text: bytes) -> str:
    match = _CODE.search(text)
    return "no reason given" if match is None else match[1].decode()


def _refusal(answer: Answer, text: bytes) -> BackendError:
    """Return the error of a status, with the store's word for it; its messages may quote keys."""
    error = status_error(answer)
    error.what = f"{error.what} ({_code(text)})"
    return error
