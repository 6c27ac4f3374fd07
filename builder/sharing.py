"""Hand out one sequence of items to several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["share_out"]

_Item = TypeVar("_Item")


class _Shared(Generic[_Item]):
    """An iterator that threads share; when one of them fails it ends for all."""

    def __init__(self, items: Iterable[_Item]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()
        self._stopped = False

    def __iter__(self) -> Iterator[_Item]:
        return self

    def __next__(self) -> _Item:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._items)

    def stop(self) -> None:
        """Hand out no more."""
        self._stopped = True


def share_out(items: Iterable[_Item], workers: Sequence[Callable[[Iterator[_Item]], None]]) -> None:
    """Run each worker in a thread of its own; they take the items from one iterator.

    Raises what the first worker raised that failed; the others get no more items then.
    """
    shared = _Shared(items)

    def run(worker: Callable[[Iterator[_Item]], None]) -> None:
        try:
            worker(shared)
        except BaseException:
            shared.stop()
            raise

    with ThreadPoolExecutor(len(workers), "share") as threads:
        jobs = [threads.submit(run, worker) for worker in workers]
        try:
            for job in jobs:
                job.result()
        finally:
            shared.stop()
