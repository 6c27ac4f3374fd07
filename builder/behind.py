"""Write behind whoever makes the bytes, in another thread.

Each call of the C library gives the interpreter's lock up and waits for it again, so what is
small is handed over together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

__all__ = ["WriteBehind", "joined"]

_JOB_BYTES = 1 << 20
_JOB_PIECES = 512
_JOBS_AHEAD = 4
_Data = bytes | bytearray | memoryview


def joined(take: Callable[[_Data], None]) -> Callable[[list[_Data]], None]:
    """Return a function for `WriteBehind` that takes the pieces as one."""

    def take_all(pieces: list[_Data]) -> None:
        take(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    return take_all


class WriteBehind:
    """Hands pieces to a function in order, many at once; all when the block ends without an error.

    A context manager. Whoever adds a piece must not change it any more.

    Args:
        take_all: gets at most 512 pieces; only called by the thread. It must not wait for
            anybody, since nothing interrupts it.

    Raises:
        What `take_all` raises, from `write` or from the end of the block.
    """

    def __init__(self, take_all: Callable[[list[_Data]], None]) -> None:
        self._take_all = take_all
        self._thread = ThreadPoolExecutor(1, "behind")
        self._jobs: deque[Future[None]] = deque()
        self._pieces: list[_Data] = []
        self._size = 0

    def write(self, data: _Data) -> None:
        """Add a piece; wait when the thread has enough to do."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= _JOB_BYTES or len(self._pieces) >= _JOB_PIECES:
            self._hand_over()

    def write_all(self, pieces: Sequence[_Data], release: Callable[[], None]) -> None:
        """Add pieces that are not joined; wait when the thread has enough to do.

        The thread calls `release` when it has done with them, also after an error.
        """
        self._hand_over()
        self._submit(lambda: self._take_each(pieces, release))

    def _take_each(self, pieces: Sequence[_Data], release: Callable[[], None]) -> None:
        try:
            for piece in pieces:
                self._take_all([piece])
        finally:
            release()

    def _hand_over(self) -> None:
        if self._pieces:
            pieces, self._pieces, self._size = self._pieces, [], 0
            self._submit(lambda: self._take_all(pieces))

    def _submit(self, job: Callable[[], None]) -> None:
        while len(self._jobs) >= _JOBS_AHEAD:
            self._jobs.popleft().result()
        self._jobs.append(self._thread.submit(job))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._hand_over()
                while self._jobs:
                    self._jobs.popleft().result()
        finally:
            self._thread.shutdown(cancel_futures=True)
