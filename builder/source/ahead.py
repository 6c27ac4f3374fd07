"""Unpack ahead of who reads, in another thread: the library needs no interpreter."""

from __future__ import annotations

import io
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

from builder.tarstream import ByteStream
from erofs.errors import NydusError

__all__ = ["AheadStream"]

_PIECE_BYTES = 1 << 20


class _Piece(NamedTuple):
    """What came next, and what went wrong behind it."""

    data: memoryview
    error: NydusError | OSError | None


class AheadStream(io.RawIOBase):
    """A stream that is read one piece ahead; a context manager, which waits for that piece.

    Args:
        source: only read by the other thread from now on; not closed.

    Raises:
        NydusError, OSError: from reading, what the source raised, behind the bytes before it.
    """

    def __init__(self, source: ByteStream) -> None:
        self._source = source
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._current = _Piece(memoryview(b""), None)
        self._next: Future[_Piece] = self._thread.submit(self._take)

    def readable(self) -> bool:  # noqa: D102 -- as in io.RawIOBase
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer as far as the piece lasts, nothing only at the end."""
        if not self._current.data and self._current.error is None:
            self._current = self._next.result()
            if self._current.data and self._current.error is None:
                self._next = self._thread.submit(self._take)
        data, error = self._current
        if not data and error is not None:
            raise error
        target = memoryview(buffer)
        count = min(len(target), len(data))
        target[:count] = data[:count]
        self._current = _Piece(data[count:], error)
        return count

    def _take(self) -> _Piece:
        piece = memoryview(bytearray(_PIECE_BYTES))
        filled = 0
        try:
            while filled < _PIECE_BYTES:
                count = self._source.readinto(piece[filled:])
                if not count:
                    break
                filled += count
        except (NydusError, OSError) as error:
            return _Piece(piece[:filled], error)
        return _Piece(piece[:filled], None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self.close()
