"""State and descriptor to and from a client's supervisor socket (spec tools section 9).

The client keeps both for a successor and understands neither. What a successor truly needs
is with the holder; this only says where that is.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from erofs.errors import NydusError

__all__ = ["SupervisorError", "receive_state", "send_state"]

_SECONDS = 5.0
_MAX_BYTES = 1 << 20
_VERSION = 1


class SupervisorError(NydusError):
    """The supervisor cannot be reached, or did not give what a daemon of ours gave it."""


@contextmanager
def _connected(path: Path | None) -> Iterator[socket.socket]:
    if path is None:
        raise SupervisorError("the daemon was started without --supervisor")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_SECONDS)
        try:
            connection.connect(str(path))
            yield connection
        except OSError as error:
            reason = error.strerror or str(error)
            raise SupervisorError(f"supervisor cannot be reached ({reason})", path=path) from error


def send_state(path: Path | None, directory: Path) -> None:
    """Tell the supervisor where the holder is, with a descriptor of that directory.

    Raises:
        SupervisorError: there is none, or it does not listen.
    """
    state = json.dumps({"nydusd": _VERSION, "holder": str(directory)}).encode()
    with _connected(path) as connection:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            socket.send_fds(connection, [state], [fd])
        finally:
            os.close(fd)


def receive_state(path: Path | None) -> Path:
    """Return where the holder is, as a predecessor has told the supervisor.

    Raises:
        SupervisorError: there is none, it has nothing, or another program's state.
    """
    with _connected(path) as connection:
        data, descriptors, _, _ = socket.recv_fds(connection, _MAX_BYTES, 1)
        for fd in descriptors:
            os.close(fd)
        while len(data) < _MAX_BYTES and (part := connection.recv(_MAX_BYTES)):
            data += part
    try:
        state = json.loads(data)
        if state["nydusd"] != _VERSION:
            raise SupervisorError("state of another version", path=path, got=state["nydusd"])
        return Path(state["holder"])
    except (ValueError, KeyError, TypeError) as error:
        raise SupervisorError("state of another program", path=path) from error
