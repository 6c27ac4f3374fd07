"""What is said to a request, and the errors of the way to it, whichever library sent it.

Texts of errors name host and port only, never a path, a query or a header: those may hold secrets.
"""

from __future__ import annotations

import email.utils
import re
import socket
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from http.client import IncompleteRead
from typing import Protocol, Self, overload

from fscache.backend.base import BackendError, ShortRead, Unavailable
from fscache.backend.sender import TlsFailure

__all__ = ["Answer", "Headers", "failure"]

# The deadline of a transfer is looked at between pieces of at most this many bytes.
PIECE_BYTES = 1 << 18
# A rest of an unwanted body up to this size is read, so that its connection can be kept.
DRAIN_BYTES = 1 << 16

_NUMBER = re.compile(r"\d{1,19}")
_MAX_RETRY_AFTER = 3600.0


class Headers(Protocol):
    """Header fields, without regard to case."""

    @overload
    def get(self, name: str, /) -> str | None: ...
    @overload
    def get(self, name: str, default: str, /) -> str: ...

    def get_all(self, name: str, /) -> list[str] | None:
        """Return all fields of a name."""


class Answer(ABC):
    """Head of an answer, and its body when asked for; a context manager that frees the connection.

    Args:
        url: the address that was asked.
        status: the status code.
        headers: the header fields.
    """

    def __init__(self, url: str, status: int, headers: Headers) -> None:
        self._done = False
        self.url = url
        self.status = status
        self.headers = headers
        # Told once whether all of the answer came: its sender may be a proxy or mirror.
        self.on_end: Callable[[bool], None] | None = None

    # Of an HTTP library

    @abstractmethod
    def _read(self, size: int) -> bytes:
        """Return bytes of the body as they come, none at its end; raise `BackendError`."""

    @abstractmethod
    def _missing(self) -> int | None:
        """Return how many bytes of the body are missing, None when nobody knows."""

    @abstractmethod
    def _release(self, *, whole: bool) -> None:
        """Let go of the connection, which can serve again when the whole body was read."""

    # Of all

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(keep=kind is None)

    def close(self, *, keep: bool = True) -> None:
        """Give the connection back; it is kept when the rest of the body is short."""
        whole = self._done
        if not whole:
            self._done = True
            if keep:
                self._end(True)
                whole = self._drain()
        self._release(whole=whole)

    def _drain(self) -> bool:
        rest = self._missing()
        if rest is None or rest > DRAIN_BYTES:
            return False
        try:
            while self._read(DRAIN_BYTES):
                pass
        except BackendError:
            return False
        return True

    def length(self) -> int | None:
        """Return Content-Length, None when there is none; raise `BackendError` for nonsense."""
        texts = self.headers.get_all("Content-Length")
        if not texts:
            return None
        if not _NUMBER.fullmatch(texts[0]) or len(set(texts)) > 1:
            raise BackendError("wrong Content-Length", got=ascii(", ".join(texts)[:40]))
        return int(texts[0])

    def retry_after(self) -> float | None:
        """Return the seconds of Retry-After, None when there is none to understand."""
        text = self.headers.get("Retry-After", "")
        if _NUMBER.fullmatch(text):
            seconds = float(text)
        else:
            try:
                moment = email.utils.parsedate_to_datetime(text)
            except (ValueError, OverflowError):
                return None
            seconds = moment.timestamp() - time.time()
        return min(max(seconds, 0.0), _MAX_RETRY_AFTER)

    def read_exactly(self, length: int, deadline: float) -> bytes:
        """Return a body of exactly `length` bytes; raise `BackendError`."""
        pieces: list[bytes] = []
        missing = length
        while missing:
            piece = self._piece(min(missing, PIECE_BYTES))
            if not piece:
                self._end(False)
                raise ShortRead(
                    "body ends too early",
                    temporary=True,
                    expected=f"{length} bytes",
                    got=length - missing,
                )
            pieces.append(piece)
            missing -= len(piece)
            if missing and time.monotonic() > deadline:
                self._end(False)
                raise Unavailable(
                    "transfer too slow",
                    temporary=True,
                    expected=f"{length} bytes in time",
                    got=length - missing,
                )
        # Only a body without Content-Length can go on here; the other kind was checked before.
        if self._piece(1):
            raise BackendError("body longer than the range", expected=f"{length} bytes")
        self._done = True
        self._end(True)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pieces(self) -> Iterator[bytes]:
        """Yield the body, however long it is and takes; raise `BackendError`.

        The wait for each piece is bounded by the time limit of the request.
        """
        size, length = 0, self.length()
        while piece := self._piece(PIECE_BYTES):
            size += len(piece)
            yield piece
        if length is not None and size < length:
            self._end(False)
            raise ShortRead(
                "body ends too early", temporary=True, expected=f"{length} bytes", got=size
            )
        self._done = True
        self._end(True)

    def read_all(self, limit: int, deadline: float) -> bytes:
        """Return a body of at most `limit` bytes; raise `BackendError`."""
        pieces: list[bytes] = []
        size = 0
        while piece := self._piece(PIECE_BYTES):
            size += len(piece)
            if size > limit:
                raise BackendError("answer too long", expected=f"at most {limit} bytes")
            if time.monotonic() > deadline:
                raise Unavailable("transfer too slow", temporary=True)
            pieces.append(piece)
        self._done = True
        self._end(True)
        return b"".join(pieces)

    def _piece(self, size: int) -> bytes:
        try:
            return self._read(size)
        except BackendError:
            self._end(False)
            raise

    def _end(self, complete: bool) -> None:
        tell, self.on_end = self.on_end, None
        if tell is not None:
            tell(complete)


def failure(error: Exception, host: str) -> BackendError:
    """Return our error for one of the library's; its own text may quote addresses."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Unavailable(f"certificate of {host} is not valid ({error.verify_message})")
    if isinstance(error, ssl.SSLError):
        reason = getattr(error, "reason", None) or type(error).__name__
        return TlsFailure(f"TLS failure with {host} ({reason})", temporary=True)
    if isinstance(error, IncompleteRead):
        return ShortRead(f"{host} closed the connection within the body", temporary=True)
    return Unavailable(f"no answer from {host} ({_reason(error)})", temporary=True)


def _reason(error: Exception) -> str:
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "name does not resolve"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__
