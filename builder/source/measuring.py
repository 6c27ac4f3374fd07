"""A source whose place is known while it is read, and whose bytes somebody else gets, too."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import NamedTuple, TypeVar

from builder.behind import WriteBehind, joined
from builder.tarstream import ByteStream

__all__ = ["Layer", "MeasuredStream", "measured_layer"]

_DRAIN_BYTES = 1 << 20
_Result = TypeVar("_Result")


class Layer(NamedTuple):
    """A layer as others know it: its SHA-256 in hex, and its length in bytes."""

    blob_id: str
    size: int


class MeasuredStream:
    """Passes a stream through and knows its position.

    Args:
        stream: what is read.
        take: gets all bytes in order, for instance to digest them.
    """

    def __init__(self, stream: ByteStream, take: Callable[[bytes], object] | None = None) -> None:
        self._stream = stream
        self._take = take
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
        if self._take is not None:
            # Of what is no buffer of the caller's, this is no copy.
            self._take(bytes(data))

    def drain(self) -> None:
        """Read on to the end: what lies behind the end marker belongs to the tar.

        A writer into a FIFO would otherwise meet a closed pipe.
        """
        while self.read(_DRAIN_BYTES):
            pass


def measured_layer(
    raw: ByteStream, read: Callable[[MeasuredStream], _Result], *, digested: bool
) -> tuple[_Result, Layer]:
    """Let somebody read a layer, then read the rest; return the result and what layer it is.

    Args:
        raw: the layer.
        read: reads as much as it wants.
        digested: False leaves the SHA-256 out, which is empty then.
    """
    state = sha256()
    with WriteBehind(joined(state.update)) as behind:
        measured = MeasuredStream(raw, behind.write if digested else None)
        result = read(measured)
        measured.drain()
    return result, Layer(state.hexdigest() if digested else "", measured.position)
