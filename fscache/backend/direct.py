"""Direct connections that are made, with the HTTP library, when somebody needs them.

Loading the library takes as long as the rest of a start; a mount does not have to wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fscache.backend.sender import Body, Sender
from fscache.backend.settings import NetworkConfig

if TYPE_CHECKING:
    from fscache.backend.answer import Answer
    from fscache.backend.transport import Transport

__all__ = ["DirectSender"]


class DirectSender:
    """A `Sender` of its own connections, to any host or to one unix socket.

    Args:
        config: certificates and time limits.
        unix: path of a unix socket.

    Raises:
        BackendError: certificate files cannot be loaded.
    """

    def __init__(self, config: NetworkConfig, *, unix: str = "") -> None:
        self._config = config
        self._unix = unix
        self._lock = threading.Lock()
        self._transport: Transport | None = None
        if config.ca_cert_files:
            self._open()

    def prepare(self, url: str) -> None:
        """Load the library; see `Sender.prepare`."""
        self._open().prepare(url)

    def _open(self) -> Transport:
        with self._lock:
            if self._transport is None:
                from fscache.backend.transport import Transport

                self._transport = Transport(self._config, unix=self._unix)
            return self._transport

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        deadline: float,
        body: Body | None = None,
    ) -> Answer:
        """Send one request; see `Sender.send`."""
        return (self._transport or self._open()).send(method, url, headers, deadline, body)

    def for_secrets(self) -> Sender:
        """Return this sender."""
        return self

    def close(self) -> None:
        """Close idle connections; one in use is closed by its reader."""
        if self._transport is not None:
            self._transport.close()
