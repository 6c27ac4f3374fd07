"""A bounded thread pool that is fair between keys: one slow blob cannot take every thread."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable

__all__ = ["WorkerPool"]

Task = Callable[[], None]


class WorkerPool:
    """Runs tasks in `workers` daemon threads, at most `per_key` at once for one key.

    Keys take turns; tasks of one key start in order. Tasks must not raise.
    """

    def __init__(self, workers: int, per_key: int, name: str) -> None:
        self._condition = threading.Condition()
        self._per_key = per_key
        self._queues: dict[Hashable, deque[Task]] = {}
        self._turns: deque[Hashable] = deque()
        self._running: Counter[Hashable] = Counter()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: Hashable, task: Task) -> bool:
        """Queue a task; return False, and drop it, after `close`."""
        with self._condition:
            if self._closed:
                return False
            queue = self._queues.get(key)
            if queue is None:
                queue = self._queues[key] = deque()
                self._turns.append(key)
            queue.append(task)
            self._condition.notify()
            return True

    def close(self, timeout: float) -> None:
        """Drop queued tasks and wait at most `timeout` seconds for the running ones."""
        with self._condition:
            self._closed = True
            self._queues.clear()
            self._turns.clear()
            self._condition.notify_all()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _take(self) -> tuple[Hashable, Task] | None:
        """Return the next task that may run; the lock is held."""
        for _ in range(len(self._turns)):
            key = self._turns.popleft()
            if self._running[key] >= self._per_key:
                self._turns.append(key)
                continue
            queue = self._queues[key]
            task = queue.popleft()
            if queue:
                self._turns.append(key)
            else:
                del self._queues[key]
            self._running[key] += 1
            return key, task
        return None

    def _done(self, key: Hashable) -> None:
        """Free the key's place; the lock is held."""
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        self._condition.notify()

    def _work(self) -> None:
        while True:
            with self._condition:
                found = self._take()
                while found is None:
                    if self._closed:
                        return
                    self._condition.wait()
                    found = self._take()
            key, task = found
            try:
                task()
            finally:
                # Nothing of a finished task is kept while this thread waits.
                del found, task
                with self._condition:
                    self._done(key)
