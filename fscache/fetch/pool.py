"""A bounded thread pool that is fair between keys: one slow blob cannot take every thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable

__all__ = ["WorkerPool"]

logger = logging.getLogger(__name__)

Task = Callable[[], None]

_BACKGROUND = object()


class WorkerPool:
    """Runs tasks in up to `workers` daemon threads, at most `per_key` at once for one key.

    Keys take turns; tasks of one key start in order. Tasks must not raise. Background tasks
    have no key: one starts when nothing else can. The first thread is there from the
    beginning, so that no task is without one; others start when tasks come that nobody waits for.
    """

    def __init__(self, workers: int, per_key: int, name: str) -> None:
        self._condition = threading.Condition()
        self._per_key = per_key
        self._queues: dict[Hashable, deque[Task]] = {}
        self._turns: deque[Hashable] = deque()
        self._background: deque[Task] = deque()
        self._running: Counter[Hashable] = Counter()
        self._closed = False
        # Since when each worker has been at its task; 0 for one that waits.
        self._since = [0.0] * workers
        self._name = name
        self._threads: list[threading.Thread] = []
        self._queued = 0
        self._waiting = 0
        self._start_thread()

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
            self._wake()
            return True

    def submit_background(self, task: Task) -> bool:
        """Queue a task behind all others; return False, and drop it, after `close`."""
        with self._condition:
            if self._closed:
                return False
            self._background.append(task)
            self._wake()
            return True

    def _wake(self) -> None:
        """Have somebody look for a task that has come; the lock is held."""
        self._queued += 1
        if self._queued > self._waiting and len(self._threads) < len(self._since):
            try:
                self._start_thread()
            except RuntimeError as error:
                logger.warning("no further thread %s (%s), tasks wait", self._name, error)
        self._condition.notify()

    def _start_thread(self) -> None:
        number = len(self._threads)
        thread = threading.Thread(
            target=self._work, args=(number,), name=f"{self._name}-{number}", daemon=True
        )
        thread.start()
        self._threads.append(thread)

    def is_stuck(self, seconds: float) -> bool:
        """Return whether every worker has ended, or been at one task for longer than that."""
        limit = time.monotonic() - seconds
        if len(self._threads) < len(self._since) and not self._closed:
            return False
        return all(
            not thread.is_alive() or 0 < since < limit
            for thread, since in zip(self._threads, self._since, strict=False)
        )

    def close(self, timeout: float) -> None:
        """Drop queued tasks and wait at most `timeout` seconds for the running ones."""
        with self._condition:
            self._closed = True
            self._queues.clear()
            self._turns.clear()
            self._background.clear()
            self._queued = 0
            self._condition.notify_all()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _take(self) -> tuple[Hashable, Task] | None:
        """Return the next task that may run; the lock is held."""
        if not self._queued:
            return None
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
            self._queued -= 1
            return key, task
        if self._background:
            self._running[_BACKGROUND] += 1
            self._queued -= 1
            return _BACKGROUND, self._background.popleft()
        return None

    def _done(self, key: Hashable) -> None:
        """Free the key's place; the lock is held."""
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        self._condition.notify()

    def _work(self, number: int) -> None:
        while True:
            with self._condition:
                found = self._take()
                while found is None:
                    if self._closed:
                        return
                    self._waiting += 1
                    self._condition.wait()
                    self._waiting -= 1
                    found = self._take()
            key, task = found
            self._since[number] = time.monotonic()
            try:
                task()
            finally:
                # Nothing of a finished task is kept while this thread waits.
                del found, task
                self._since[number] = 0.0
                with self._condition:
                    self._done(key)
