"""Requests to mirrors of a backend's host, before the host itself is asked (tools 4.4.2)."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from erofs.values import Value
from fscache.backend.base import Unavailable
from fscache.backend.health import Health, pinger
from fscache.backend.sender import Body, Sender, host_of, split_address
from fscache.backend.settings import MirrorConfig, NetworkConfig

if TYPE_CHECKING:
    from fscache.backend.answer import Answer

__all__ = ["MirrorSender"]

logger = logging.getLogger(__name__)

# A mirror that lacks a blob, is not permitted to have it, or is busy harms nobody.
_NEXT_PLEASE = (403, 404, 410, 429)


# A tag's manifest: what it stands for changes.
_TAG = re.compile(r"/manifests/(?!sha256:)")
_SECRET = ("authorization", "cookie", "proxy-authorization")


class _Mirror(Value):
    base: str
    config: MirrorConfig
    sender: Sender
    health: Health

    def takes(self, path: str) -> bool:
        """Tell whether it is asked for this at all."""
        return (self.config.resolves or not _TAG.search(path)) and self.health.ok()

    def url(self, path: str) -> str:
        """Return the address of a path of the registry."""
        if self.config.base_path and path.startswith("/v2/"):
            path = self.config.base_path + path.removeprefix("/v2")
        return self.base + path

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return what it is shown of the headers of a request, and its own."""
        if not self.config.shares_credentials:
            headers = {key: value for key, value in headers.items() if key.lower() not in _SECRET}
        return {**headers, **self.config.headers}


def _mirror(config: MirrorConfig, sender: Sender) -> _Mirror:
    parts = split_address(config.host, "host of the mirror")
    base = f"{parts.scheme}://{parts.netloc}"
    ping = config.ping_url or f"{base}/v2"
    split_address(ping, "ping_url of the mirror")
    health = Health(
        f"mirror {host_of(base)}",
        pinger(sender, ping),
        interval=config.health_check_interval,
        pause_elapsed=config.health_check_pause_elapsed,
        failure_limit=config.failure_limit,
    )
    return _Mirror(base, config, sender, health)


class MirrorSender:
    """Sends requests for one host to its mirrors, and to itself when none of them answers.

    Args:
        mirrors: in order of preference.
        host: `host[:port]` they stand for; requests for others go there directly.
        direct: sends to everybody; closed with this.
        opener: makes senders like `direct` for mirrors that have TLS options of their own.

    Raises:
        BackendError: an address that is none, unreadable certificates.
    """

    def __init__(
        self,
        mirrors: tuple[MirrorConfig, ...],
        host: str,
        direct: Sender,
        opener: Callable[[NetworkConfig], Sender],
    ) -> None:
        self._direct = direct
        self._host = host
        self._mirrors = []
        for config in mirrors:
            sender = direct
            if config.skip_verify or config.ca_cert_files:
                sender = opener(
                    NetworkConfig(
                        skip_verify=config.skip_verify, ca_cert_files=config.ca_cert_files
                    )
                )
            self._mirrors.append(_mirror(config, sender))

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        deadline: float,
        body: Body | None = None,
    ) -> Answer:
        """Send one request; see `Sender.send`."""
        host, slash, path = url.partition("://")[2].partition("/")
        if host == self._host:
            for mirror in self._mirrors:
                if not mirror.takes(slash + path):
                    continue
                answer = self._ask(mirror, method, slash + path, headers, deadline, body)
                if answer is not None:
                    return answer
        return self._direct.send(method, url, headers, deadline, body)

    def _ask(
        self,
        mirror: _Mirror,
        method: str,
        path: str,
        headers: Mapping[str, str],
        deadline: float,
        body: Body | None,
    ) -> Answer | None:
        try:
            answer = mirror.sender.send(
                method, mirror.url(path), mirror.headers(headers), deadline, body
            )
        except Unavailable as error:
            mirror.health.note(False)
            logger.info("%s; going past the mirror", error)
            return None
        if answer.status >= 500:
            mirror.health.note(False)
        elif answer.status == 401 and not mirror.config.shares_credentials:
            logger.debug("mirror %s wants credentials", host_of(mirror.base))
        elif answer.status not in _NEXT_PLEASE:
            answer.on_end = mirror.health.note
            return answer
        answer.close()
        return None

    def prepare(self, url: str) -> None:
        """Be ready to send; see `Sender.prepare`."""
        self._direct.prepare(url)

    def for_secrets(self) -> Sender:
        """Return the direct sender: a mirror is not asked for tokens."""
        return self._direct

    def close(self) -> None:
        """Drop idle connections and end the checks."""
        for mirror in self._mirrors:
            mirror.health.close()
            if mirror.sender is not self._direct:
                mirror.sender.close()
        self._direct.close()
