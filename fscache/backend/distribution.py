"""Requests to one repository of a registry: token flow, and http where there is no TLS.

The daemon reads blobs by it, `builder.oci` pulls and pushes whole images. Redirects and what
an answer means are the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fscache.backend.auth import Authorizer
from fscache.backend.base import BackendError
from fscache.backend.sender import Body, Sender, TlsFailure, split_address
from fscache.backend.settings import Credentials, RegistryConfig

if TYPE_CHECKING:
    from fscache.backend.answer import Answer

__all__ = ["RegistryClient"]

logger = logging.getLogger(__name__)

# Headers that are for the registry only, should somebody add them to every request.
_FOR_REGISTRY_ONLY = ("authorization", "cookie", "proxy-authorization")


class RegistryClient:
    """Asks a registry about one repository; safe to use from many threads.

    Args:
        config: of the registry.
        sender: makes the requests; it stays the caller's.
        actions: what to ask a token service for when the registry does not say.
        more_scopes: further scopes, in the words of token services.

    Raises:
        BackendError: a host or repository that is none.
    """

    def __init__(
        self,
        config: RegistryConfig,
        sender: Sender,
        actions: str = "pull",
        more_scopes: Sequence[str] = (),
    ) -> None:
        host = split_address(f"https://{config.host}", "host of the registry")
        if host.netloc != config.host or host.username is not None:
            raise BackendError("host of the registry is not host[:port]")
        if not config.repo.strip("/") or ".." in config.repo.split("/"):
            raise BackendError("registry backend needs a repository", got=ascii(config.repo))
        self._config = config
        self._sender = sender
        self.foreign_headers = {
            name: value
            for name, value in config.headers.items()
            if name.lower() not in _FOR_REGISTRY_ONLY
        }
        self._auth = Authorizer(
            sender.for_secrets(),
            config.repo,
            config.credentials,
            config.registry_token,
            self.foreign_headers,
            actions=actions,
            more_scopes=more_scopes,
        )
        self.scheme = config.scheme or "https"
        # Whether a host that speaks no TLS may be asked by http.
        self._may_go_plain = self.scheme == "https" and (not config.scheme or config.skip_verify)

    def set_credentials(self, credentials: Credentials | None) -> None:
        """Use other credentials for all requests made afterwards."""
        self._auth.set_credentials(credentials)

    def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        deadline: float,
        body: Body | None = None,
    ) -> tuple[Answer, str | None]:
        """Ask the registry, with another token when it wants one.

        Args:
            method: of HTTP.
            path: with its query, quoted; an address of the registry's own origin is taken, too.
            headers: beside the configured ones.
            deadline: of `time.monotonic`.
            body: of the request; it must give the same bytes each time it is iterated over.

        Returns:
            The answer, of any status, and the Authorization header that was used.

        Raises:
            BackendError: no answer, or no token.
        """
        used = self._auth.current(deadline)
        answer = self._send(method, path, headers, deadline, used, body)
        # Another thread's token may have ended meanwhile, too; one of our own has not.
        while answer.status == 401:
            with answer:
                other = self._auth.refused(used, answer, deadline)
            if other is None:
                break
            used, new = other
            answer = self._send(method, path, headers, deadline, used, body)
            if new:
                break
        return answer, used

    def _send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        deadline: float,
        authorization: str | None,
        body: Body | None,
    ) -> Answer:
        """Send to the registry, by http when it turns out to speak no TLS and that is allowed."""
        headers = {**self._config.headers, **headers}
        if authorization is not None:
            headers["Authorization"] = authorization
        host = self._config.host
        scheme = self.scheme
        try:
            answer = self._sender.send(method, f"{scheme}://{host}{path}", headers, deadline, body)
        except TlsFailure:
            # Another thread may have found out meanwhile.
            if not self._may_go_plain and self.scheme == scheme:
                raise
            answer = self._sender.send(method, f"http://{host}{path}", headers, deadline, body)
            # A server with TLS answers plain text so: its handshake failed by chance.
            if answer.status == 400:
                answer.close()
                raise
            if self.scheme != "http":
                logger.warning("registry %s speaks no TLS, http is used from now on", host)
            self.scheme = "http"
        self._may_go_plain = False
        return answer
