"""Requests through an HTTP proxy, and past it when it does not work (tools 4.4.1, 5.4)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from urllib.parse import unquote

from urllib3 import ProxyManager, make_headers

from fscache.backend.answer import Answer
from fscache.backend.base import AuthError, BackendError, Unavailable
from fscache.backend.health import Health, pinger
from fscache.backend.pooled import PooledTransport, pool_options
from fscache.backend.sender import Body, Sender, host_of, split_address
from fscache.backend.settings import NetworkConfig, ProxyConfig

__all__ = ["ProxySender", "RateLimit", "proxy_address"]

logger = logging.getLogger(__name__)

FAILURE_LIMIT = 3
# What a peer-to-peer proxy is told about reads that somebody waits for.
_P2P_HEADERS = {
    "X-Dragonfly-Use-P2P": "true",
    "X-Dragonfly-Priority": "6",
    "X-Dragonfly-Prefetch": "false",
}


class RateLimit:
    """Gives out turns, `interval` seconds apart; safe for many threads."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._lock = threading.Lock()
        self._next = 0.0

    def take(self, now: float, longest: float) -> float:
        """Return how long to wait for a turn; raise `Unavailable` when it is longer than that."""
        with self._lock:
            turn = max(now, self._next)
            if turn - now > longest:
                raise Unavailable(
                    "proxy is overloaded, and so is the way past it",
                    temporary=True,
                    retry_after=turn - now,
                )
            self._next = turn + self._interval
            return turn - now


# Requests past a proxy that says it is overloaded share one turn a second in the process.
_PAST_OVERLOADED = RateLimit(1.0)
_LONGEST_TURN = 5.0


def proxy_address(text: str) -> str:
    """Return the address of a proxy; one without scheme is http. Raises `BackendError`."""
    address = text if "://" in text else f"http://{text}"
    split_address(address, "address of the proxy")
    return address


class ProxySender:
    """Sends through a proxy; goes direct when that fails and `fallback` permits it.

    Args:
        config: of the backend.
        proxy: of the proxy.
        direct: the way past it; closed with this.
    """

    def __init__(self, config: NetworkConfig, proxy: ProxyConfig, direct: Sender) -> None:
        address = proxy_address(proxy.url)
        parts = split_address(address, "address of the proxy")
        auth = (
            f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
        )
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        manager = ProxyManager(
            bare,
            proxy_headers=make_headers(proxy_basic_auth=auth) if auth else None,
            **pool_options(config),
        )
        self._through = PooledTransport(config, manager)
        self._direct = direct
        self._fallback = proxy.fallback
        self._use_http = proxy.use_http
        ping = pinger(direct, proxy_address(proxy.ping_url)) if proxy.ping_url else None
        self._health = Health(
            f"proxy {host_of(address)}",
            ping,
            interval=proxy.check_interval,
            pause_elapsed=proxy.check_pause_elapsed,
            failure_limit=FAILURE_LIMIT,
        )

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        deadline: float,
        body: Body | None = None,
    ) -> Answer:
        """Send one request; see `Sender.send`.

        Raises `AuthError` when the proxy itself forbids it, `Unavailable` when there is no
        answer on any way.
        """
        return self._send(method, url, headers, deadline, body, use_http=self._use_http)

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        deadline: float,
        body: Body | None,
        *,
        use_http: bool,
    ) -> Answer:
        if not self._health.ok() and self._fallback:
            return self._direct.send(method, url, headers, deadline, body)
        target = f"http{url[5:]}" if use_http and url.startswith("https:") else url
        try:
            answer = self._through.send(method, target, {**_P2P_HEADERS, **headers}, deadline, body)
        except BackendError as error:
            self._health.note(False)
            if not self._fallback:
                raise
            logger.info("%s; going past the proxy", error)
            return self._direct.send(method, url, headers, deadline, body)
        if not self._passes(answer):
            return self._direct.send(method, url, headers, deadline, body)
        answer.on_end = self._health.note
        answer.url = url
        return answer

    def _passes(self, answer: Answer) -> bool:
        """Tell whether an answer is the one to use, or the direct one; raise `AuthError`."""
        if answer.headers.get("X-Dragonfly-Error-Type") == "proxy":
            if answer.status == 403:
                answer.close()
                raise AuthError("the proxy forbids the request", got="status 403")
            if answer.status == 429:
                answer.close()
                time.sleep(_PAST_OVERLOADED.take(time.monotonic(), _LONGEST_TURN))
                return False
        if answer.status >= 500 and self._fallback:
            answer.close()
            return False
        return True

    def prepare(self, url: str) -> None:
        """Do nothing: the library is loaded."""

    def for_secrets(self) -> Sender:
        """Return a sender that never asks for an https address by http."""
        return _Tunnel(self)

    def close(self) -> None:
        """Drop idle connections and end the checks."""
        self._health.close()
        self._through.close()
        self._direct.close()


class _Tunnel:
    """A proxy as it is, but https stays https; closed with the proxy."""

    def __init__(self, proxy: ProxySender) -> None:
        self._proxy = proxy

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        deadline: float,
        body: Body | None = None,
    ) -> Answer:
        """Send one request; see `Sender.send`."""
        return self._proxy._send(method, url, headers, deadline, body, use_http=False)

    def prepare(self, url: str) -> None:
        """Do nothing: the library is loaded."""

    def for_secrets(self) -> Sender:
        """Return this sender."""
        return self

    def close(self) -> None:
        """Do nothing: the proxy is closed by its owner."""
