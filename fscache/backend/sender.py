"""What sends requests, as backends see it; nothing here loads the HTTP library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol
from urllib.parse import SplitResult, urlsplit

from fscache.backend.base import BackendError, Unavailable

if TYPE_CHECKING:
    from fscache.backend.answer import Answer

__all__ = ["Body", "Sender", "TlsFailure", "host_of", "split_address"]

# Bytes, or something with a length that can be iterated over more than once.
Body = bytes | Iterable[bytes]


class TlsFailure(Unavailable):
    """A TLS handshake that fails for another reason than the certificate."""


class Sender(Protocol):
    """Something that sends a request and gives the answer with its body unread."""

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        deadline: float,
        body: Body | None = None,
    ) -> Answer:
        """Send one request.

        Args:
            method: of HTTP.
            url: absolute; on a unix socket a path.
            headers: beside the client's own.
            deadline: of `time.monotonic`.
            body: of the request.

        Raises:
            Unavailable: no answer; an answer of any status is returned.
        """

    def prepare(self, url: str) -> None:
        """Be ready to send to an address; raise `BackendError`."""

    def for_secrets(self) -> Sender:
        """Return the sender for requests whose body or answer is secret."""

    def close(self) -> None:
        """Drop idle connections and stop checks."""


def split_address(text: str, what: str) -> SplitResult:
    """Split an http(s) address; raise `BackendError` without quoting it."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not text.isascii() or not text.isprintable() or " " in text:
        raise BackendError(f"{what} is not an http(s) address")
    return parts


def host_of(url: str) -> str:
    """Return host and port of an address, for texts."""
    netloc = re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0]
    return netloc.rpartition("@")[2] or "unix socket"
