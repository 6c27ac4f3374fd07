"""Pieces of bytes on their way from one thread to another: made ahead, or seen by two."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from contextlib import closing

from builder.oci.errors import ImageError

__all__ = ["PieceQueue", "read_ahead", "until"]


def until(stop: threading.Event, pieces: Generator[bytes]) -> Generator[bytes]:
    """Yield pieces as long as somebody wants them; raise `ImageError` when nobody does."""
    with closing(pieces):
        for piece in pieces:
            if stop.is_set():
                raise ImageError("stopped, since something else failed")
            yield piece


class PieceQueue:
    """Pieces that one thread puts in and another one takes out, at most `count` between them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pieces: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None

    def put(self, piece: bytes) -> bool:
        """Append a piece, when there is room; tell whether somebody may still take it."""
        with self._changed:
            while len(self._pieces) >= self._count and not self._closed:
                self._changed.wait()
            if not self._closed:
                self._pieces.append(piece)
                self._changed.notify()
            return not self._closed

    def end(self, error: BaseException | None = None) -> None:
        """Say that no more will come, or what went wrong, which whoever takes them will raise."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
                self._changed.notify()

    def close(self) -> None:
        """Take no more: whoever puts pieces in does not wait again."""
        with self._changed:
            self._closed = True
            self._pieces.clear()
            self._changed.notify()

    def pieces(self) -> Generator[bytes]:
        """Yield what is put in, to the end; raise the error that it ended with."""
        try:
            while (piece := self._take()) is not None:
                yield piece
        finally:
            self.close()
        if self._error is not None:
            raise self._error

    def _take(self) -> bytes | None:
        with self._changed:
            while not self._pieces and not self._ended:
                self._changed.wait()
            if not self._pieces:
                return None
            piece = self._pieces.popleft()
            self._changed.notify()
            return piece


def read_ahead(pieces: Generator[bytes], count: int) -> Generator[bytes]:
    """Yield pieces that a thread makes ahead, at most `count` of them; raise what it raises.

    Closing the generator closes `pieces`, in the thread that runs them, and waits for that.
    """
    made = PieceQueue(count)

    def run() -> None:
        try:
            for piece in pieces:
                if not made.put(piece):
                    break
            pieces.close()
        except BaseException as error:  # noqa: BLE001 -- raised where the pieces are used
            made.end(error)
        else:
            made.end()

    thread = threading.Thread(target=run, name="ahead")
    thread.start()
    try:
        yield from made.pieces()
    finally:
        made.close()
        thread.join()
