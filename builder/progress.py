"""How far something has come, told on a terminal; command lines make it, the library calls it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

from erofs.console import ProgressLine

__all__ = ["Progress", "counted", "progress_during"]


class Progress:
    """Counts for the progress line of a command; silent where nobody watches.

    Args:
        what: what is being done.
        unit: what is counted; of "MB", bytes.
    """

    def __init__(self, what: str, unit: str = "MB") -> None:
        self._line = ProgressLine(what, unit)
        self._done = 0
        self._lock = threading.Lock()

    def callback(self) -> Callable[[int], None] | None:
        """Return the function to hand to the library, None when nobody watches."""
        return self._advance if self._line.enabled else None

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._line.show(self._done)

    def end(self) -> None:
        """Take the line away again."""
        self._line.end()


def progress_during(stack: ExitStack, what: str) -> Callable[[int], None] | None:
    """Return the function that tells bytes on a terminal; the line is gone with the stack."""
    progress = Progress(what)
    stack.callback(progress.end)
    return progress.callback()


def counted(pieces: Iterable[bytes], progress: Callable[[int], None] | None) -> Iterator[bytes]:
    """Give pieces on, and tell their lengths."""
    for piece in pieces:
        if progress is not None:
            progress(len(piece))
        yield piece
