"""Ask an HTTP server at a unix socket: nydusd's API, the snapshotter's system controller."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path

__all__ = ["ask"]

SECONDS = 60.0


def ask(path: Path, method: str, target: str, body: object = None) -> tuple[int, str]:
    """Return status and text of the answer; raise `OSError` when nobody answers."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(SECONDS)
    try:
        connection.sock.connect(str(path))
        connection.request(method, target, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{method} {target}: {error!r}") from error
    finally:
        connection.close()
