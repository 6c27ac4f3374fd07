"""Blobs on their way to a registry: at once when they are small, else in pieces as they are made.

What is sent in pieces is resumable: after a failure the registry is asked how much it has.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar, cast
from urllib.parse import urlencode, urlsplit, urlunsplit

from builder.oci import media
from builder.oci.records import Descriptor
from fscache.backend.answer import Answer
from fscache.backend.base import BackendError, Unavailable
from fscache.backend.ranges import status_error
from fscache.backend.redirects import redirect_target
from fscache.backend.sender import Body

__all__ = ["BlobUpload", "Session", "UploadLost"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_RECEIVED = re.compile(r"(?:bytes=)?0-(\d{1,19})")
_CREATED, _ACCEPTED, _NO_CONTENT = 201, 202, 204


class UploadLost(Unavailable):
    """The registry has forgotten an upload, or keeps another part than was sent."""


class _Registry(Protocol):
    """What an upload needs of its repository."""

    def again(self, operation: Callable[[], _T], /) -> _T:
        """Repeat what fails for the moment."""

    def request_at(
        self, location: str, method: str, headers: Mapping[str, str], body: Body | None = None
    ) -> Answer:
        """Send a request to an address."""

    def has(self, descriptor: Descriptor) -> bool:
        """Tell whether a blob is there."""

    def open_session(self) -> Session:
        """Begin a session."""

    def put_at_once(self, descriptor: Descriptor, body: Body) -> None:
        """Send a whole blob."""


class _Part:
    """A body that is sent from where it is."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[bytes]:
        # What sends it takes every buffer.
        yield cast(bytes, self._data)


class Session:
    """An upload session of a registry; its address changes with every answer.

    Args:
        registry: where it is.
        location: its address, which may hold secrets.
    """

    def __init__(self, registry: _Registry, location: str) -> None:
        self._registry = registry
        self._location = location
        self._done = False

    def _move(self, answer: Answer) -> None:
        location = answer.headers.get("Location")
        if location:
            self._location = redirect_target(location, answer.url, "", "")

    def put(self, digest: str, body: Body = b"") -> None:
        """End the session with the last bytes, or with all; raise `BackendError`."""
        parts = urlsplit(self._location)
        query = "&".join(filter(None, (parts.query, urlencode({"digest": digest}))))
        headers = {"Content-Type": media.OCTET_STREAM}
        if not body:
            headers["Content-Length"] = "0"
        with self._registry.request_at(
            urlunsplit(parts._replace(query=query)), "PUT", headers, body
        ) as answer:
            if answer.status not in (_CREATED, _NO_CONTENT):
                raise _lost(answer)
            self._done = True

    def patch(self, offset: int, data: memoryview) -> None:
        """Append bytes that begin at `offset`; raise `BackendError`."""
        headers = {
            "Content-Type": media.OCTET_STREAM,
            "Content-Range": f"{offset}-{offset + len(data) - 1}",
        }
        with self._registry.request_at(self._location, "PATCH", headers, _Part(data)) as answer:
            if answer.status not in (_ACCEPTED, _NO_CONTENT, _CREATED):
                raise _lost(answer)
            self._move(answer)

    def received(self) -> int:
        """Return how many bytes the registry has; raise `BackendError`."""
        with self._registry.request_at(self._location, "GET", {}) as answer:
            if answer.status not in (_NO_CONTENT, _ACCEPTED):
                raise _lost(answer)
            self._move(answer)
            text = answer.headers.get("Range", "")
        match = _RECEIVED.fullmatch(text)
        if match is None:
            return 0
        # Distribution says 0-0 for nothing, too, and a single byte is never a piece.
        last = int(match[1])
        return last + 1 if last else 0

    def close(self) -> None:
        """Tell the registry to forget the session, unless it has ended well."""
        if self._done:
            return
        self._done = True
        try:
            self._registry.request_at(self._location, "DELETE", {}).close()
        except BackendError as error:
            logger.debug("upload could not be taken back: %s", error)


def _lost(answer: Answer) -> BackendError:
    if answer.status in (404, 416):
        return UploadLost("registry has lost the upload", got=f"status {answer.status}")
    return status_error(answer)


class BlobUpload:
    """A blob that is being made: `write`, then `finish`.

    One piece is under way while the next one fills, so two are in memory.

    Args:
        registry: takes the blob.
        chunk_bytes: length of a piece.
    """

    def __init__(self, registry: _Registry, chunk_bytes: int) -> None:
        self._registry = registry
        self._chunk_bytes = chunk_bytes
        self._buffer = bytearray()
        self._filled = 0
        self._spare = bytearray()
        self._sum = hashlib.sha256()
        self._size = 0
        self._sent = 0
        self._session: Session | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._flight: Future[None] | None = None

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """Append bytes; raise `BackendError`, also for earlier ones."""
        self._size += len(data)
        rest = memoryview(data)
        while rest:
            if self._filled == self._chunk_bytes:
                self._dispatch()
            part = rest[: self._chunk_bytes - self._filled]
            end = self._filled + len(part)
            # It grows to its full length once, and is used again then.
            self._buffer[self._filled : end] = part
            self._filled = end
            rest = rest[len(part) :]

    def finish(self, media_type: str, *, known_absent: bool = False) -> Descriptor:
        """End the blob and return what it is; one that is there already is not sent again."""
        if self._pool is None:
            whole = bytes(self._buffer)
            self._sum.update(whole)
            descriptor = self._descriptor(media_type)
            if known_absent or not self._registry.has(descriptor):
                self._registry.put_at_once(descriptor, whole)
            return descriptor
        try:
            self._dispatch()
            self._land()
            descriptor = self._descriptor(media_type)
            session = self._session
            if session is not None:
                self._registry.again(lambda: self._end(session, descriptor))
        finally:
            self.abort()
        return descriptor

    def _descriptor(self, media_type: str) -> Descriptor:
        return Descriptor(media_type, f"sha256:{self._sum.hexdigest()}", self._size)

    def _end(self, session: Session, descriptor: Descriptor) -> None:
        try:
            session.put(descriptor.digest)
        except BackendError:
            # The answer may have been lost, not the request.
            if not self._registry.has(descriptor):
                raise

    def abort(self) -> None:
        """Forget the blob."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._session is not None:
            self._session.close()
        self._buffer, self._spare, self._filled = bytearray(), bytearray(), 0

    def _dispatch(self) -> None:
        """Send what the buffer holds in the background, after the piece before it."""
        if not self._filled:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "upload")
        self._land()
        piece = memoryview(self._buffer)[: self._filled]
        self._flight = self._pool.submit(self._send, piece)
        self._buffer, self._spare = self._spare, self._buffer
        self._filled = 0

    def _land(self) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.result()

    def _send(self, piece: memoryview) -> None:
        self._sum.update(piece)
        if self._session is None:
            self._session = self._registry.again(self._registry.open_session)
        session, start, failed = self._session, self._sent, False

        def attempt() -> None:
            nonlocal failed
            offset = start
            if failed:
                offset = session.received()
                if not start <= offset <= start + len(piece):
                    raise UploadLost(
                        "registry has another part of the upload", expected=start, got=offset
                    )
            failed = True
            if offset < start + len(piece):
                session.patch(offset, piece[offset - start :] if offset > start else piece)

        self._registry.again(attempt)
        self._sent = start + len(piece)
