"""A source whose place and digest are known while it is read."""

from __future__ import annotations

import hashlib

from builder.tarstream import ByteStream

__all__ = ["MeasuredStream"]

_DRAIN_BYTES = 1 << 20


class MeasuredStream:
    """Passes a stream through and knows its position and, where wanted, its SHA-256."""

    def __init__(self, stream: ByteStream, *, digest: bool = True) -> None:
        self._stream = stream
        self._state = hashlib.sha256() if digest else None
        self.position = 0

    def read(self, size: int, /) -> bytes:  # noqa: D102 -- as in io.BufferedIOBase
        data = self._stream.read(size)
        self._count(data)
        return data

    def readinto(self, buffer: memoryview, /) -> int:  # noqa: D102
        count = self._stream.readinto(buffer)
        self._count(buffer[:count])
        return count

    def _count(self, data: bytes | memoryview) -> None:
        self.position += len(data)
        if self._state is not None:
            self._state.update(data)

    def drain(self) -> None:
        """Read on to the end: what lies behind the end marker belongs to the tar.

        A writer into a FIFO would otherwise meet a closed pipe.
        """
        while self.read(_DRAIN_BYTES):
            pass

    def hexdigest(self) -> str:
        """Return the SHA-256 of what was read, an empty text when it is not wanted."""
        return "" if self._state is None else self._state.hexdigest()
