"""Frames between the host and the guest's first process: bytes and values, no I/O.

They cross a virtio-serial port, which loses the ends of messages. Used on both sides, and imported
by an emulated processor: only small modules of the standard library here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

__all__ = [
    "EXIT", "PORT_NAME", "READY", "RESIZE", "RUN", "STDERR", "STDIN", "STDOUT", "Decoder", "pack",
]  # fmt: skip

# Of the virtio-serial port.
PORT_NAME = "vmlab"

# Guest to host.
READY = 1  # {"release": text}, once
STDOUT = 2  # bytes
STDERR = 3  # bytes
EXIT = 4  # {"status": number}, negative for a signal
# Host to guest.
RUN = 16  # {"argv": [], "env": {}, "cwd": text, "tty": [rows, columns] or null}
STDIN = 17  # bytes, for a terminal only
RESIZE = 18  # [rows, columns]

_HEADER = struct.Struct("<BI")
_MAX_BYTES = 1 << 20


def pack(kind: int, payload: Any = b"") -> bytes:
    """Return a frame; a payload that is not bytes is sent as JSON."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return _HEADER.pack(kind, len(data)) + data


class Decoder:
    """Turns a stream of bytes back into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, Any]]:
        """Yield (kind, payload) of each frame that is complete now.

        Raises:
            ValueError: the other side does not speak this protocol.
        """
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            kind, size = _HEADER.unpack_from(self._buffer)
            if size > _MAX_BYTES:
                raise ValueError(f"frame of kind {kind} with {size} bytes")
            end = _HEADER.size + size
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield kind, payload if kind in (STDOUT, STDERR, STDIN) else json.loads(payload)
