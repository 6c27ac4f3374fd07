"""A unix socket where clients of their own attach: QEMU, nbd-client, nbdcopy."""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import suppress
from pathlib import Path

from erofs.errors import NydusError
from fscache.nbd.protocol import ProtocolError
from fscache.nbd.server import DiskServer
from fscache.unixsocket import listen

__all__ = ["ListenerError", "SocketListener"]

logger = logging.getLogger(__name__)

_MAX_CLIENTS = 256
_RETRY_SECONDS = 0.1


class ListenerError(NydusError):
    """The socket cannot be made, or another process serves it."""


class SocketListener:
    """Serves a disk at a socket until it is closed; the socket file goes with it.

    Only the user of this process can connect.

    Args:
        server: what is served; not owned.
        path: a stale socket there is replaced.

    Raises:
        ListenerError: another process serves this socket, or it cannot be made.
    """

    def __init__(self, server: DiskServer, path: Path) -> None:
        self.path = path
        self._server = server
        try:
            self._listener = listen(path)
        except OSError as error:
            raise ListenerError(
                f"socket cannot be made ({error.strerror or error})", path=path
            ) from error
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="nbd-listener", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                # Out of descriptors, or closed.
                logger.debug("no client taken: %s", error)
                self._closed.wait(_RETRY_SECONDS)
                continue
            if self._server.connections >= _MAX_CLIENTS:
                logger.warning("%s: too many clients, one is refused", self.path)
                client.close()
                continue
            try:
                self._server.start(client, handshake=True)
            except ProtocolError as error:
                logger.debug("no client taken: %s", error)

    def close(self) -> None:
        """Take no more clients and remove the socket file; raises nothing."""
        self._closed.set()
        with suppress(OSError):
            # Wakes the thread that accepts.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        with suppress(OSError):
            self.path.unlink()
