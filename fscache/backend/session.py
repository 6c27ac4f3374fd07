"""Requests of `nydusify` by the library `requests`: proxies and authorities of the environment.

The daemon's reads go by `fscache.backend.transport`, without that library's import of 0.1 s;
answers, time limits and errors are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from fscache.backend.answer import Answer
from fscache.backend.base import BackendError
from fscache.backend.pooled import PooledAnswer, pool_failure, silence_warnings
from fscache.backend.sender import Body, Sender, host_of
from fscache.backend.settings import NetworkConfig
from fscache.backend.transport import POOL_CONNECTIONS, POOL_HOSTS, time_left, tls_context

__all__ = ["SessionSender"]

_USER_AGENT = "nydusify/1.0.0"


class _Adapter(HTTPAdapter):
    """Connections that trust what the configuration says."""

    def __init__(self, config: NetworkConfig) -> None:
        self._tls: dict[str, Any] = {"ssl_context": tls_context(config)}
        if config.skip_verify:
            self._tls["assert_hostname"] = False
        super().__init__(POOL_HOSTS, POOL_CONNECTIONS, max_retries=0)

    def init_poolmanager(self, *words: Any, **options: Any) -> None:
        super().init_poolmanager(*words, **{**options, **self._tls})

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        return super().proxy_manager_for(proxy, **{**options, **self._tls})


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keep the library from putting what a .netrc has in the place of our header."""
    return request


class SessionSender:
    """A `Sender` on `requests`; safe to use from many threads.

    Args:
        config: certificates and time limits; proxies are those of the environment.
    """

    def __init__(self, config: NetworkConfig) -> None:
        self._connect_timeout = config.connect_timeout
        self._timeout = config.timeout
        self._verify = not config.skip_verify
        silence_warnings(config)
        self._session = requests.Session()
        self._session.auth = _unchanged
        self._session.headers.clear()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _Adapter(config))

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
            settings = self._session.merge_environment_settings(
                url, {}, True, self._verify or None, None
            )
            # Cookies would be one session's state shared by all threads; no registry needs them.
            request = requests.Request(
                method,
                url,
                headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", **headers},
                data=body,
                auth=_unchanged,
            ).prepare()
        except ValueError as error:
            # Its text has the address, and all that is in it.
            raise BackendError(f"address of {host_of(url)} is none") from error
        if not self._verify:
            settings["verify"] = False
        try:
            response = self._session.send(
                request,
                timeout=(min(self._connect_timeout, left), min(self._timeout, left)),
                allow_redirects=False,
                **settings,
            )
        except (requests.RequestException, HTTPError, OSError) as error:
            raise _translated(error, host_of(url)) from error
        return PooledAnswer(url, response.raw)

    def prepare(self, url: str) -> None:
        """Do nothing: the library is loaded."""

    def for_secrets(self) -> Sender:
        """Return this sender: it goes the environment's ways only."""
        return self

    def close(self) -> None:
        """Drop idle connections."""
        self._session.close()


def _translated(error: Exception, host: str) -> BackendError:
    """Return our error for the one inside of the library's."""
    inner = error.args[0] if error.args else error
    if isinstance(inner, HTTPError):
        return pool_failure(inner, host)
    if isinstance(error, requests.exceptions.InvalidURL):
        return BackendError(f"address of {host} is none")
    return pool_failure(error, host)
