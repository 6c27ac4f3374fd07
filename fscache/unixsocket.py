"""Unix sockets at paths: who serves one, and serving it oneself."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

__all__ = ["is_served", "is_stale", "listen"]


def is_served(path: Path) -> bool:
    """Return whether somebody listens at a socket file."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def is_stale(path: Path) -> bool:
    """Return whether a socket file is there that nobody serves."""
    return path.is_socket() and not is_served(path)


def listen(path: Path) -> socket.socket:
    """Listen at a path, for this user alone; a stale socket is replaced.

    Raises `OSError`, `EADDRINUSE` when another process serves it.
    """
    if path.is_socket():
        if is_served(path):
            raise OSError(errno.EADDRINUSE, "another process serves this socket")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        # Nobody can connect before `listen`.
        os.chmod(path, 0o600)  # noqa: PTH101 -- not a link that we made ourselves
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener
