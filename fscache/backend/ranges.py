"""Reads exact ranges of one blob by HTTP, whoever makes the requests; strict about answers.

Only what was asked for is ever accepted, and a whole blob is never read by accident.
Repetition is the caller's (`fscache.backend.retry`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fscache.backend.base import (
    AuthError,
    BackendError,
    BackendMetrics,
    NotFound,
    ShortRead,
    Unavailable,
)
from fscache.backend.breaker import Breaker

if TYPE_CHECKING:
    from fscache.backend.answer import Answer

__all__ = ["RangeReader", "Request", "check_partial", "status_error"]

# Sends a request for the reader's blob: method, headers, deadline of `time.monotonic`.
Request = Callable[[str, Mapping[str, str], float], "Answer"]

# What a peer-to-peer proxy or mirror is told of a read that nobody waits for (tools 5.4).
_STREAM_HEADERS = {"X-Dragonfly-Priority": "3", "X-Dragonfly-Prefetch": "true"}
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(?:\d{1,19}|\*)")


def status_error(answer: Answer) -> BackendError:
    """Return the error of an answer that is none of those asked for (tools 5.4)."""
    status = answer.status
    got = f"status {status}"
    if status in (404, 410):
        return NotFound("no such blob", got=got)
    if status in (401, 403):
        return AuthError("not permitted", got=got)
    if status in (408, 429) or status >= 500:
        return Unavailable(
            "server refuses", temporary=True, retry_after=answer.retry_after(), got=got
        )
    if status == 416:
        return BackendError("range outside of the stored blob", got=got)
    return BackendError("unexpected answer", got=got)


def check_partial(answer: Answer, offset: int, length: int) -> None:
    """Raise `BackendError` unless the head promises exactly the range."""
    if answer.status == 200:
        raise BackendError("server ignores ranges", expected="status 206", got="status 200")
    if answer.status != 206:
        raise status_error(answer)
    text = answer.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(text)
    wanted = f"bytes {offset}-{offset + length - 1}"
    if match is None or int(match[1]) != offset or int(match[2]) >= offset + length:
        raise BackendError("wrong Content-Range", expected=wanted, got=ascii(text[:80]))
    if int(match[2]) < offset + length - 1:
        raise ShortRead("stored blob ends too early", expected=wanted, got=text)
    promised = answer.length()
    if promised is None:
        return
    if promised > length:
        raise BackendError("wrong Content-Length", expected=length, got=promised)
    if promised < length:
        raise ShortRead(
            "body shorter than the range", temporary=True, expected=length, got=promised
        )


def check_rest(answer: Answer, offset: int) -> None:
    """Raise `BackendError` unless the head promises the blob from `offset` to its end."""
    if offset == 0:
        if answer.status != 200:
            raise status_error(answer)
        return
    if answer.status == 200:
        raise BackendError("server ignores ranges", expected="status 206", got="status 200")
    if answer.status != 206:
        raise status_error(answer)
    text = answer.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None or int(match[1]) != offset:
        raise BackendError("wrong Content-Range", expected=f"bytes {offset}-", got=ascii(text[:80]))


class RangeReader:
    """Reads ranges of one blob; safe to use from many threads.

    Args:
        blob_id: for errors.
        request: sends the requests.
        metrics: counts the reads.
        breaker: of the backend.
        transfer_timeout: seconds for one read altogether.
    """

    def __init__(
        self,
        blob_id: str,
        request: Request,
        metrics: BackendMetrics,
        breaker: Breaker,
        transfer_timeout: float,
    ) -> None:
        self.blob_id = blob_id
        self._request = request
        self._metrics = metrics
        self._breaker = breaker
        self._transfer_timeout = transfer_timeout

    def size(self) -> int:
        """Return the length of the stored blob in bytes, by HEAD; raise `BackendError`."""
        deadline = time.monotonic() + self._transfer_timeout
        try:
            with self._breaker.guard(), self._request("HEAD", {}, deadline) as answer:
                if answer.status != 200:
                    raise status_error(answer)
                length = answer.length()
                if length is None:
                    raise BackendError("answer without a length")
                return length
        except BackendError as error:
            error.add_context(blob=self.blob_id)
            raise

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`; raise `BackendError`."""
        if length == 0:
            return b""
        deadline = time.monotonic() + self._transfer_timeout
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        try:
            with (
                self._metrics.measure(length),
                self._breaker.guard(),
                self._request("GET", headers, deadline) as answer,
            ):
                check_partial(answer, offset, length)
                return answer.read_exactly(length, deadline)
        except BackendError as error:
            error.add_context(blob=self.blob_id, offset=offset)
            raise

    @contextmanager
    def stream(self, offset: int) -> Iterator[Iterator[bytes]]:
        """Ask for everything from `offset` on by one request; raise `BackendError`."""
        deadline = time.monotonic() + self._transfer_timeout
        headers = {**_STREAM_HEADERS, **({"Range": f"bytes={offset}-"} if offset else {})}
        try:
            with self._metrics.measure_pieces() as add:
                # The body takes as long as it takes: it is no probe of the backend.
                with self._breaker.guard():
                    answer = self._open_stream(headers, offset, deadline)
                with answer:
                    yield _counted(answer.pieces(), add)
        except BackendError as error:
            error.add_context(blob=self.blob_id, offset=offset)
            raise

    def _open_stream(self, headers: Mapping[str, str], offset: int, deadline: float) -> Answer:
        answer = self._request("GET", headers, deadline)
        try:
            check_rest(answer, offset)
        except BackendError:
            answer.close()
            raise
        return answer


def _counted(pieces: Iterator[bytes], add: Callable[[int], None]) -> Iterator[bytes]:
    for piece in pieces:
        add(len(piece))
        yield piece
