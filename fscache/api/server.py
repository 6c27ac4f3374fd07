"""The API of a daemon on a unix socket: clients can connect before anybody can answer them.

A client that starts a daemon looks for its socket, and then at its state, every tenth of a second
or two (spec tools 9): each look that comes too early costs it another one. So the socket is
there as soon as the configuration is understood, and who connects during the start is answered at
its end. What answers is loaded meanwhile: it takes a fifth of the time of a start.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from erofs.errors import NydusError
from fscache.unixsocket import is_served, listen

if TYPE_CHECKING:
    from fscache.api.handler import ConnectionServer
    from fscache.nbd.daemon import NbdDaemon
    from fscache.node import NodeDaemon
    from fscache.singleton import SingletonDaemon

    Daemon = NodeDaemon | SingletonDaemon | NbdDaemon

__all__ = ["ApiError", "ApiServer"]

# A start that takes longer is watched by its client, who wants to know of the state.
START_SECONDS = 0.3
_POLL_SECONDS = 0.1


class ApiError(NydusError):
    """The socket cannot be served."""


class ApiServer:
    """Listens at once, and answers after `serve`, until it is closed; the socket file goes with it.

    Raises:
        ApiError: the socket cannot be made, or another process serves it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if is_served(path):
            raise ApiError("another process serves this socket", path=path)
        try:
            self._listener = listen(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ApiError(f"API socket cannot be made ({reason})", path=path) from error
        self._lock = threading.Lock()
        self._closing = False
        self._started = threading.Event()
        self._server: ConnectionServer | None = None
        self._thread: threading.Thread | None = None

    def serve(self, daemon: Daemon, *, starts: bool = False) -> None:
        """Answer for a daemon.

        Args:
            daemon: whose API it is.
            starts: it is about to be started: clients wait until `started` is called, or for
                `START_SECONDS`.
        """
        if not starts:
            self._started.set()
        self._thread = threading.Thread(
            target=self._answer, args=(daemon,), name="api", daemon=True
        )
        self._thread.start()

    def started(self) -> None:
        """Answer who waits for the start."""
        self._started.set()

    def _answer(self, daemon: Daemon) -> None:
        from fscache.api.handler import ConnectionServer

        self._started.wait(START_SECONDS)
        with self._lock:
            if self._closing:
                return
            server = self._server = ConnectionServer(self._listener, daemon)
        server.serve_forever(_POLL_SECONDS)

    def close(self) -> None:
        """Stop serving and remove the socket file."""
        with self._lock:
            self._closing = True
        self._started.set()
        if self._server is not None:
            self._server.shutdown()
        if self._thread is not None:
            self._thread.join()
        self._listener.close()
        self._path.unlink(missing_ok=True)
