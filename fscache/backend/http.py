"""Backend `http-proxy`: blobs as `<path>/<blob id>` of an HTTP server, TCP, TLS or unix socket."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote

from fscache.backend.base import BackendError, BackendMetrics, check_blob_id
from fscache.backend.breaker import Breaker
from fscache.backend.direct import DirectSender
from fscache.backend.ranges import RangeReader
from fscache.backend.sender import Sender, split_address
from fscache.backend.senders import open_sender
from fscache.backend.settings import HttpProxyConfig

if TYPE_CHECKING:
    from fscache.backend.answer import Answer

__all__ = ["HttpProxyBackend"]


def _open(config: HttpProxyConfig) -> tuple[Sender, str]:
    """Return the sender, and the part of the address before `path`."""
    if config.addr.startswith("/"):
        if config.proxy is not None or config.mirrors:
            raise BackendError("a unix socket has no proxy and no mirrors")
        return DirectSender(config, unix=config.addr), ""
    url = split_address(config.addr, "address of the http-proxy backend")
    if url.query or url.fragment:
        raise BackendError("address of the http-proxy backend has a query or fragment")
    if url.username is not None:
        raise BackendError("address of the http-proxy backend with credentials is not supported")
    base = f"{url.scheme}://{url.netloc}"
    return open_sender(config, url.netloc), base + url.path.rstrip("/")


class HttpProxyBackend:
    """Blobs of an HTTP server (tools 4.4, type `http-proxy`)."""

    def __init__(self, config: HttpProxyConfig) -> None:
        self.metrics = BackendMetrics("http-proxy")
        self._breaker = Breaker()
        self._headers = config.headers
        self._transfer_timeout = config.transfer_timeout
        self._sender, prefix = _open(config)
        path = config.path.strip("/")
        self._prefix = f"{prefix}/{quote(path)}" if path else prefix

    def open(self, blob_id: str) -> RangeReader:
        """Return a reader; raise `BackendError` for an id that is refused."""
        check_blob_id(blob_id)
        request = partial(self._request, f"{self._prefix}/{quote(blob_id, safe='')}")
        return RangeReader(blob_id, request, self.metrics, self._breaker, self._transfer_timeout)

    def _request(
        self, url: str, method: str, headers: Mapping[str, str], deadline: float
    ) -> Answer:
        return self._sender.send(method, url, {**self._headers, **headers}, deadline)

    def prepare(self) -> None:
        """Be ready for a first read; see `Prepares`."""
        self._sender.prepare(self._prefix)

    def close(self) -> None:
        """Close idle connections; one in use is closed by its reader."""
        self._sender.close()
