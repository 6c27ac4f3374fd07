"""Requests by `urllib3`: through proxies of all kinds, and below the library `requests`.

Its answers and errors become those of `fscache.backend.answer`.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from typing import Any

import urllib3
from urllib3 import PoolManager, Timeout
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InsecureRequestWarning,
    MaxRetryError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.response import BaseHTTPResponse

from fscache.backend.answer import Answer, failure
from fscache.backend.base import BackendError
from fscache.backend.sender import Body, host_of
from fscache.backend.settings import NetworkConfig
from fscache.backend.transport import (
    POOL_CONNECTIONS,
    POOL_HOSTS,
    request_headers,
    time_left,
    tls_context,
)

__all__ = ["PooledAnswer", "PooledTransport", "pool_failure", "pool_options", "silence_warnings"]

# The library's own log quotes addresses whole; what concerns a backend is logged by the backend.
logging.getLogger("urllib3").setLevel(logging.ERROR)


def silence_warnings(config: NetworkConfig) -> None:
    """Keep the library from warning about what the configuration asks for."""
    if config.skip_verify:
        urllib3.disable_warnings(InsecureRequestWarning)


def pool_options(config: NetworkConfig) -> dict[str, Any]:
    """Return the options of a pool manager; raise `BackendError` for bad certificate files."""
    options: dict[str, Any] = {"num_pools": POOL_HOSTS, "maxsize": POOL_CONNECTIONS}
    options["ssl_context"] = tls_context(config)
    silence_warnings(config)
    if config.skip_verify:
        options.update(cert_reqs="CERT_NONE", assert_hostname=False)
    return options


class PooledTransport:
    """Sends by a pool manager, which is closed with this.

    Args:
        config: time limits.
        manager: knows the way, and what connections with TLS trust.
    """

    def __init__(self, config: NetworkConfig, manager: PoolManager) -> None:
        self._config = config
        self._manager = manager

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        deadline: float,
        body: Body | None = None,
    ) -> Answer:
        """Send one request; see `Sender.send`."""
        left = time_left(deadline, url)
        try:
            response = self._manager.urlopen(
                method,
                url,
                headers=request_headers(headers),
                body=body,
                timeout=Timeout(
                    connect=min(self._config.connect_timeout, left),
                    read=min(self._config.timeout, left),
                ),
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
        except (HTTPError, OSError) as error:
            raise pool_failure(error, host_of(url)) from error
        return PooledAnswer(url, response)

    def close(self) -> None:
        """Close idle connections; one in use is closed by its reader."""
        self._manager.clear()


class PooledAnswer(Answer):
    """An answer of the library."""

    def __init__(self, url: str, raw: BaseHTTPResponse) -> None:
        super().__init__(url, raw.status, raw.headers)
        self._raw = raw

    def _read(self, size: int) -> bytes:
        try:
            return self._raw.read1(size)
        except (HTTPError, OSError) as error:
            raise pool_failure(error, host_of(self.url)) from error

    def _missing(self) -> int | None:
        return self._raw.length_remaining

    def _release(self, *, whole: bool) -> None:
        if not whole:
            self._raw.close()
        self._raw.release_conn()


def pool_failure(error: Exception, host: str) -> BackendError:
    """Return our error for one of the library's; its own text may quote addresses."""
    if isinstance(error, MaxRetryError) and error.reason is not None:
        error = error.reason
    if isinstance(error, ProxyError):
        return failure(_inner(error.original_error), f"{host} through the proxy")
    return failure(_inner(error), host)


def _inner(error: Exception) -> Exception:
    """Return the standard library's error inside of one of this one's."""
    if isinstance(error, SSLError):
        inner = error.args[0] if error.args else None
        return inner if isinstance(inner, ssl.SSLError) else ssl.SSLError()
    # With some versions of the library this is a kind of time-out.
    if isinstance(error, NewConnectionError):
        inner = error.__cause__
    elif isinstance(error, (ConnectTimeoutError, ReadTimeoutError)):
        return TimeoutError()
    else:
        inner = error.args[1] if isinstance(error, HTTPError) and len(error.args) > 1 else None
    return inner if isinstance(inner, Exception) else error
