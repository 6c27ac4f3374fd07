"""Backend `registry`: blobs of one repository of an OCI registry (tools 5.1)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote

from fscache.backend.base import BackendError, BackendMetrics, Unavailable, check_blob_id
from fscache.backend.breaker import Breaker
from fscache.backend.distribution import RegistryClient
from fscache.backend.ranges import RangeReader
from fscache.backend.redirects import Targets, redirect_target, same_origin
from fscache.backend.sender import Sender
from fscache.backend.senders import open_sender
from fscache.backend.settings import Credentials, RegistryConfig

if TYPE_CHECKING:
    from fscache.backend.answer import Answer

__all__ = ["RegistryBackend"]

MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
# Answers of a remembered address that send the reader back to the registry: expired signatures
# are 401 or 403, with some stores 400; what was moved or removed may be elsewhere now.
_STALE = (*_REDIRECTS, 400, 401, 403, 404, 410)


class RegistryBackend:
    """Blobs of one repository; safe to use from many threads.

    Args:
        config: of the registry; nothing is connected yet.
        sender: makes the requests, if not that of the configuration; closed with this.
        client: asks the registry, if others do by the same tokens.

    Raises:
        BackendError: a host or repository that is none, unreadable certificates.
    """

    def __init__(
        self,
        config: RegistryConfig,
        sender: Sender | None = None,
        client: RegistryClient | None = None,
    ) -> None:
        self.metrics = BackendMetrics("registry")
        self._config = config
        self._sender = sender or open_sender(config, config.host)
        self._breaker = Breaker()
        self._targets = Targets()
        self._client = client or RegistryClient(config, self._sender)
        self._foreign_headers = self._client.foreign_headers

    def open(self, blob_id: str) -> RangeReader:
        """Return a reader; raise `BackendError` for an id that is refused."""
        check_blob_id(blob_id)
        request = partial(self._request, blob_id)
        return RangeReader(
            blob_id, request, self.metrics, self._breaker, self._config.transfer_timeout
        )

    def set_credentials(self, credentials: Credentials | None) -> None:
        """Use other credentials for all requests made afterwards."""
        self._client.set_credentials(credentials)
        self._breaker.reset()

    def prepare(self) -> None:
        """Be ready for a first read; see `Prepares`."""
        self._sender.prepare(f"{self._client.scheme}://{self._config.host}")

    def close(self) -> None:
        """Close idle connections; one in use is closed by its reader."""
        self._sender.close()

    def _request(
        self, blob_id: str, method: str, headers: Mapping[str, str], deadline: float
    ) -> Answer:
        """Send a request for a blob; the answer is the last one, of any status."""
        target = self._targets.get(blob_id)
        if target is not None:
            answer = self._ask_target(blob_id, target, method, headers, deadline)
            if answer is not None:
                return answer
        answer, used = self._ask_registry(blob_id, method, headers, deadline)
        if answer.status in _REDIRECTS:
            return self._follow(blob_id, answer, method, headers, deadline, used)
        return answer

    def _ask_target(
        self, blob_id: str, target: str, method: str, headers: Mapping[str, str], deadline: float
    ) -> Answer | None:
        """Ask a remembered address; return None when the registry has to be asked again."""
        try:
            answer = self._sender.send(
                method, target, {**self._foreign_headers, **headers}, deadline
            )
        except Unavailable:
            self._targets.forget(blob_id, target)
            raise
        if answer.status in _STALE:
            self._targets.forget(blob_id, target)
            answer.close()
            return None
        if answer.status >= 500:
            self._targets.forget(blob_id, target)
        return answer

    def _ask_registry(
        self, blob_id: str, method: str, headers: Mapping[str, str], deadline: float
    ) -> tuple[Answer, str | None]:
        """Ask the registry, with another token when it wants one.

        Returns the answer and the Authorization header that was used.
        """
        path = f"/v2/{quote(self._config.repo.strip('/'))}/blobs/sha256:{quote(blob_id, safe='')}"
        return self._client.ask(method, path, headers, deadline)

    def _follow(
        self,
        blob_id: str,
        answer: Answer,
        method: str,
        headers: Mapping[str, str],
        deadline: float,
        authorization: str | None,
    ) -> Answer:
        """Follow redirects; only the registry itself sees the Authorization header."""
        registry = answer.url
        config = self._config
        for _ in range(MAX_REDIRECTS):
            with answer:
                target = redirect_target(
                    answer.headers.get("Location"),
                    answer.url,
                    config.blob_url_scheme,
                    config.blob_redirected_host,
                )
            at_home = same_origin(target, registry)
            sent = {**(config.headers if at_home else self._foreign_headers), **headers}
            if at_home and authorization is not None:
                sent["Authorization"] = authorization
            answer = self._sender.send(method, target, sent, deadline)
            if answer.status not in _REDIRECTS:
                # One that needs the header again is found by asking the registry again.
                if not at_home and answer.status in (200, 206):
                    self._targets.remember(blob_id, target)
                return answer
        answer.close()
        raise BackendError("too many redirects", expected=f"at most {MAX_REDIRECTS}")
