"""Requests to mirrors of a backend's host, before the host itself is asked (tools 4.4.2)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fscache.backend.base import Unavailable
from fscache.backend.health import Health, pinger
from fscache.backend.sender import Body, Sender, host_of, split_address
from fscache.backend.settings import MirrorConfig

if TYPE_CHECKING:
    from fscache.backend.transport import Answer

__all__ = ["MirrorSender"]

logger = logging.getLogger(__name__)

# A mirror that lacks a blob, is not permitted to have it, or is busy harms nobody.
_NEXT_PLEASE = (403, 404, 410, 429)


@dataclass(frozen=True, slots=True)
class _Mirror:
    base: str
    headers: Mapping[str, str]
    health: Health


def _mirror(config: MirrorConfig, transport: Sender) -> _Mirror:
    parts = split_address(config.host, "host of the mirror")
    base = f"{parts.scheme}://{parts.netloc}"
    ping = config.ping_url or f"{base}/v2"
    split_address(ping, "ping_url of the mirror")
    health = Health(
        f"mirror {host_of(base)}",
        pinger(transport, ping),
        interval=config.health_check_interval,
        pause_elapsed=config.health_check_pause_elapsed,
        failure_limit=config.failure_limit,
    )
    return _Mirror(base, config.headers, health)


class MirrorSender:
    """Sends requests for one host to its mirrors, and to itself when none of them answers.

    Args:
        mirrors: in order of preference.
        host: `host[:port]` they stand for; requests for others go there directly.
        direct: sends to everybody; closed with this.
    """

    def __init__(self, mirrors: tuple[MirrorConfig, ...], host: str, direct: Sender) -> None:
        self._direct = direct
        self._host = host
        self._mirrors = [_mirror(config, direct) for config in mirrors]

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
                if not mirror.health.ok():
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
        url = mirror.base + path
        try:
            answer = self._direct.send(method, url, {**headers, **mirror.headers}, deadline, body)
        except Unavailable as error:
            mirror.health.note(False)
            logger.info("%s; going past the mirror", error)
            return None
        if answer.status >= 500:
            mirror.health.note(False)
        elif answer.status not in _NEXT_PLEASE:
            answer.on_end = mirror.health.note
            return answer
        answer.close()
        return None

    def prepare(self) -> None:
        """Be ready to send; see `Sender.prepare`."""
        self._direct.prepare()

    def for_secrets(self) -> Sender:
        """Return the direct sender: a mirror is not asked for tokens."""
        return self._direct

    def close(self) -> None:
        """Drop idle connections and end the checks."""
        for mirror in self._mirrors:
            mirror.health.close()
        self._direct.close()
