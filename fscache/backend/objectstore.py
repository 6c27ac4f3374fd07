"""Backends `oss` and `s3`: blobs as objects of one bucket (tools 5.2, 5.3).

`ObjectStore` signs requests of any kind; the daemon reads by it, `builder` writes, too.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote

from fscache.backend.base import BackendError, BackendMetrics, check_blob_id
from fscache.backend.breaker import Breaker
from fscache.backend.ranges import RangeReader
from fscache.backend.sender import Sender, split_address
from fscache.backend.senders import open_sender
from fscache.backend.settings import ObjectStoreConfig
from fscache.backend.signing import EMPTY_DIGEST, Query, query_text, sign_oss, sign_s3

if TYPE_CHECKING:
    from fscache.backend.answer import Answer

__all__ = ["ObjectStore", "ObjectStoreBackend"]


class ObjectStore:
    """Asks for objects of one bucket; safe to use from many threads.

    Args:
        config: of the bucket; without a key requests are not signed.
        sender: makes the requests; it stays the caller's.

    Raises:
        BackendError: an endpoint that is none.
    """

    def __init__(self, config: ObjectStoreConfig, sender: Sender) -> None:
        endpoint = split_address(f"{config.scheme}://{config.endpoint}", "endpoint of the bucket")
        if endpoint.netloc != config.endpoint or endpoint.username is not None:
            raise BackendError("endpoint of the bucket is not host[:port]")
        self._config = config
        self._sender = sender
        bucket = quote(config.bucket_name, safe="")
        # There is no name below an address of numbers: the bucket goes into the path, as with S3.
        if config.kind == "s3" or _is_number(endpoint.hostname or ""):
            self._host, self._path = config.endpoint, f"/{bucket}/"
        else:
            self._host, self._path = f"{bucket}.{config.endpoint}", "/"

    def key(self, blob_id: str) -> str:
        """Return the name of a blob's object; raise `BackendError` for an id that is refused."""
        return self._config.object_prefix + check_blob_id(blob_id)

    def ask(
        self,
        method: str,
        key: str,
        headers: Mapping[str, str],
        deadline: float,
        *,
        query: Query = (),
        body: bytes | None = None,
    ) -> Answer:
        """Send one signed request; see `Sender.send`."""
        path = self._path + quote(key, safe="/~")
        signed = self._signed(method, path, key, query, body)
        mark = f"?{query_text(query)}" if query else ""
        url = f"{self._config.scheme}://{self._host}{path}{mark}"
        return self._sender.send(
            method, url, {**self._config.headers, **headers, **signed}, deadline, body
        )

    def _signed(
        self, method: str, path: str, key: str, query: Query, body: bytes | None
    ) -> dict[str, str]:
        config = self._config
        if config.keys is None:
            return {}
        now = datetime.now(UTC)
        if config.kind == "oss":
            return sign_oss(config.keys, method, f"/{config.bucket_name}/{key}", query, {}, now)
        payload = hashlib.sha256(body).hexdigest() if body else EMPTY_DIGEST
        return sign_s3(
            config.keys, config.region, method, path, query, {"host": self._host}, payload, now
        )


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class ObjectStoreBackend:
    """Blobs of one bucket; safe to use from many threads.

    Args:
        config: of the bucket; nothing is connected yet.
        sender: makes the requests, if not that of the configuration; closed with this.

    Raises:
        BackendError: an endpoint that is none, unreadable certificates.
    """

    def __init__(self, config: ObjectStoreConfig, sender: Sender | None = None) -> None:
        self.metrics = BackendMetrics(config.kind)
        self._sender = sender or open_sender(config, config.endpoint)
        self._breaker = Breaker()
        self._transfer_timeout = config.transfer_timeout
        self._address = f"{config.scheme}://{config.endpoint}"
        self.store = ObjectStore(config, self._sender)

    def open(self, blob_id: str) -> RangeReader:
        """Return a reader; raise `BackendError` for an id that is refused."""
        request = partial(self._request, self.store.key(blob_id))
        return RangeReader(blob_id, request, self.metrics, self._breaker, self._transfer_timeout)

    def _request(
        self, key: str, method: str, headers: Mapping[str, str], deadline: float
    ) -> Answer:
        return self.store.ask(method, key, headers, deadline)

    def prepare(self) -> None:
        """Be ready for a first read; see `Prepares`."""
        self._sender.prepare(self._address)

    def close(self) -> None:
        """Close idle connections; one in use is closed by its reader."""
        self._sender.close()
