"""The HTTP API on a unix socket, as far as one served image needs it (spec tools section 7).

GET /api/v1/daemon            version, state, mounted image
PUT /api/v1/daemon/exit       stop
GET /api/v1/metrics/backend   requests and bytes of the backend
GET /api/v1/metrics/blobcache chunks and hits of the cache
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

from erofs.console import package_version
from erofs.errors import NydusError
from fscache.daemon import Daemon

__all__ = ["ApiError", "ApiServer"]

logger = logging.getLogger(__name__)

BODY_LIMIT = 51_200
DISCARD_LIMIT = 1 << 20


class ApiError(NydusError):
    """The socket cannot be served."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    body: object = None


def _failure(status: HTTPStatus, message: str) -> _Answer:
    return _Answer(status, {"code": "UNDEFINED", "message": message})


def _daemon_info(daemon: Daemon) -> dict[str, object]:
    mounted = {}
    if daemon.image is not None:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(daemon.image.mounted_at))
        mounted["/"] = {
            "backend_type": "Rafs",
            "mountpoint": str(daemon.mountpoint),
            "mounted_time": f"{moment} +00:00:00",
        }
    return {
        "version": {
            "package_ver": package_version(),
            "git_commit": "unknown",
            "build_time": "unknown",
            "profile": "release",
            "rustc": f"python {platform.python_version()}",
        },
        "id": daemon.config.id or None,
        "supervisor": None,
        "state": daemon.state.value,
        "backend_collection": mounted,
    }


def _exit(daemon: Daemon) -> _Answer:
    daemon.request_stop()
    return _Answer(HTTPStatus.NO_CONTENT)


def _backend_metrics(daemon: Daemon) -> _Answer:
    if daemon.image is None:
        return _failure(HTTPStatus.NOT_FOUND, "Stats(NoCounter)")
    return _Answer(HTTPStatus.OK, daemon.image.backend.metrics.as_dict())


def _cache_metrics(daemon: Daemon) -> _Answer:
    if daemon.image is None:
        return _failure(HTTPStatus.NOT_FOUND, "Stats(NoCounter)")
    return _Answer(HTTPStatus.OK, daemon.image.cache_metrics.as_dict())


_ROUTES: dict[tuple[str, str], Callable[[Daemon], _Answer]] = {
    ("GET", "/api/v1/daemon"): lambda daemon: _Answer(HTTPStatus.OK, _daemon_info(daemon)),
    ("PUT", "/api/v1/daemon/exit"): _exit,
    ("GET", "/api/v1/metrics/backend"): _backend_metrics,
    ("GET", "/api/v1/metrics/blobcache"): _cache_metrics,
}
_PATHS = {path for _, path in _ROUTES}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: _Server

    def _serve(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) > BODY_LIMIT:
            self.close_connection = True
            # Taken in all the same, so that a client which still sends gets to the answer.
            if length.isdecimal():
                self.rfile.read(min(int(length), DISCARD_LIMIT))
            self._send(_failure(HTTPStatus.BAD_REQUEST, "body is too large or of unknown length"))
            return
        self.rfile.read(int(length))
        path = urlsplit(self.path).path
        route = _ROUTES.get((self.command, path))
        if route is not None:
            self._send(route(self.server.daemon))
        elif path in _PATHS:
            self._send(_failure(HTTPStatus.BAD_REQUEST, "method is not served here"))
        else:
            self._send(_failure(HTTPStatus.NOT_FOUND, "no such path"))

    do_GET = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815 -- names of http.server

    def _send(self, answer: _Answer) -> None:
        lines = [
            f"HTTP/1.1 {answer.status.value} ",
            "Server: Nydus API",
            f"Connection: {'close' if self.close_connection else 'keep-alive'}",
        ]
        body = b""
        if answer.body is not None:
            body = json.dumps(answer.body, separators=(",", ":")).encode()
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def address_string(self) -> str:
        """Return who asks: a unix socket has no address."""
        return "api"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- of http.server
        """Log to our own log."""
        logger.debug("api: " + format, *args)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    daemon: Daemon


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


class ApiServer:
    """Serves the API of one daemon until it is closed; the socket file goes with it.

    Raises:
        ApiError: the socket cannot be made, or another process serves it.
    """

    def __init__(self, path: Path, daemon: Daemon) -> None:
        self._path = path
        try:
            if path.is_socket():
                if _is_served(path):
                    raise ApiError("another process serves this socket", path=path)
                path.unlink()
            self._server = _Server(str(path), _Handler)
            os.chmod(path, 0o600)  # noqa: PTH101 -- not a link that we made ourselves
        except OSError as error:
            reason = error.strerror or str(error)
            raise ApiError(f"API socket cannot be made ({reason})", path=path) from error
        self._server.daemon = daemon
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="api", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and remove the socket file."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._path.unlink(missing_ok=True)
