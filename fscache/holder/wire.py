"""Messages between worker and holder: JSON objects with descriptors, over a stream socket.

Both ends are programs of this package and the same user, so a broken message is a bug or a
killed peer, and ends the connection.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from array import array
from collections.abc import Sequence

__all__ = ["Message", "WireError", "receive", "send"]

Message = dict[str, object]

_HEADER = struct.Struct("<I")
_MAX_BYTES = 16 << 20
_MAX_DESCRIPTORS = 8


class WireError(Exception):
    """What came is no message."""


def send(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send one message; the descriptors stay the caller's. Raises `OSError`."""
    body = json.dumps(message).encode()
    # The descriptors travel with the first byte; a stream socket takes four bytes whole.
    socket.send_fds(connection, [_HEADER.pack(len(body))], descriptors)
    connection.sendall(body)


def receive(connection: socket.socket) -> tuple[Message, list[int]] | None:
    """Return one message and its descriptors, now the caller's; None when the peer has gone.

    Raises `WireError`, `OSError`; then no descriptor is left open.
    """
    descriptors: list[int] = []
    try:
        header, descriptors, flags = _first(connection)
        if not header:
            return None
        header += _rest(connection, _HEADER.size - len(header))
        (length,) = _HEADER.unpack(header)
        if length > _MAX_BYTES or flags & socket.MSG_CTRUNC:
            raise WireError(f"message of {length} bytes refused")
        message = json.loads(_rest(connection, length))
        if not isinstance(message, dict):
            raise WireError("message is no object")
    except ValueError as error:
        _close(descriptors)
        raise WireError("message is no JSON") from error
    except BaseException:
        _close(descriptors)
        raise
    return message, descriptors


def _first(connection: socket.socket) -> tuple[bytes, list[int], int]:
    # Not socket.recv_fds, which drops the flags: each descriptor has to be close-on-exec.
    room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array("i").itemsize)
    data, ancillary, flags, _ = connection.recvmsg(_HEADER.size, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return data, list(descriptors), flags


def _rest(connection: socket.socket, length: int) -> bytes:
    parts = []
    while length > 0:
        part = connection.recv(length)
        if not part:
            raise WireError("the peer ended within a message")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)
