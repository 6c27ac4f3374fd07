"""Where a registry sends its readers: addresses of storage, remembered while they are good.

Addresses carry signatures, so they are secrets: nothing here is logged.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import parse_qsl, urljoin, urlsplit

from fscache.backend.base import BackendError
from fscache.backend.sender import split_address

__all__ = ["Targets", "redirect_target", "same_origin", "seconds_left"]

# An address is forgotten this long before it expires: a request takes its time.
MARGIN_SECONDS = 10.0
_STAMP = "%Y%m%dT%H%M%SZ"


def same_origin(one: str, other: str) -> bool:
    """Tell whether scheme, host and port of two addresses are the same."""
    return one.split("/", 3)[:3] == other.split("/", 3)[:3]


def redirect_target(location: str | None, asked: str, scheme: str, host: str) -> str:
    """Return the address that an answer points to.

    Args:
        location: the header, as the server sent it.
        asked: the address that gave the answer.
        scheme: replaces the target's, when there is one (`blob_url_scheme`).
        host: replaces the target's, when there is one (`blob_redirected_host`); the port,
            too, when it names one.

    Raises:
        BackendError: not an http(s) address; it is not quoted.
    """
    if not location:
        raise BackendError("redirect without a Location")
    try:
        target = urljoin(asked, location)
    except ValueError as error:
        raise BackendError("redirect to something that is not an address") from error
    parts = split_address(target, "target of the redirect")
    if parts.username is not None:
        raise BackendError("target of the redirect has credentials")
    if host:
        keep_port = parts.port is not None and ":" not in host
        parts = parts._replace(netloc=f"{host}:{parts.port}" if keep_port else host)
    return parts._replace(fragment="", scheme=scheme or parts.scheme).geturl()


def seconds_left(url: str, now: float) -> float | None:
    """Return how long a signed address is good, None when it does not say.

    Knows the queries of S3 and Google (`X-Amz-Date` with `X-Amz-Expires`), of older S3, OSS
    and CloudFront (`Expires`), and of Azure (`se`). `now` is wall-clock time in seconds.
    """
    query = {name.lower(): value for name, value in parse_qsl(urlsplit(url).query)}
    try:
        for brand in ("amz", "goog"):
            if f"x-{brand}-expires" in query:
                signed = datetime.strptime(query[f"x-{brand}-date"], _STAMP).replace(tzinfo=UTC)
                return signed.timestamp() + int(query[f"x-{brand}-expires"]) - now
        if "expires" in query:
            return int(query["expires"]) - now
        if "se" in query:
            end = datetime.fromisoformat(query["se"])
            return (end if end.tzinfo else end.replace(tzinfo=UTC)).timestamp() - now
    except (KeyError, ValueError, OverflowError):
        return 0.0
    return None


class Targets:
    """The redirected addresses of blobs; safe for many threads."""

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._known: dict[str, tuple[str, float | None]] = {}

    def get(self, blob_id: str) -> str | None:
        """Return the address of a blob, None when there is none that is good."""
        with self._lock:
            url, end = self._known.get(blob_id, (None, None))
            if url is not None and end is not None and self._wall_clock() >= end:
                del self._known[blob_id]
                return None
            return url

    def remember(self, blob_id: str, url: str) -> None:
        """Keep an address while it is good."""
        now = self._wall_clock()
        left = seconds_left(url, now)
        if left is not None and left <= MARGIN_SECONDS:
            return
        with self._lock:
            end = None if left is None else now + left - MARGIN_SECONDS
            self._known[blob_id] = (url, end)

    def forget(self, blob_id: str, url: str) -> None:
        """Drop an address, unless another one has taken its place."""
        with self._lock:
            if self._known.get(blob_id, ("", None))[0] == url:
                del self._known[blob_id]
