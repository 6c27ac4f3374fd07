"""Whether a proxy or a mirror is in use: told by failures of requests, and by pings."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from fscache.backend.base import BackendError
from fscache.backend.sender import Sender

__all__ = ["Health", "pinger"]

logger = logging.getLogger(__name__)

PING_SECONDS = 10.0


def pinger(transport: Sender, url: str) -> Callable[[], bool]:
    """Return a function that tells whether the address answers with less than 500."""

    def ping() -> bool:
        try:
            with transport.send("GET", url, {}, time.monotonic() + PING_SECONDS) as answer:
                return answer.status < 500
        except BackendError:
            return False

    return ping


class Health:
    """State of one proxy or mirror; safe for many threads.

    Args:
        name: for the log, without secrets.
        ping: asked every `interval` seconds by a thread; None for no checks.
        interval: pause between checks; without checks, after which one request tries again.
        pause_elapsed: seconds without use after which checks pause.
        failure_limit: failures in a row after which it is left out.
    """

    def __init__(
        self,
        name: str,
        ping: Callable[[], bool] | None,
        *,
        interval: float,
        pause_elapsed: float,
        failure_limit: int,
    ) -> None:
        self._name = name
        self._ping = ping
        self._interval = interval
        self._pause_elapsed = pause_elapsed
        self._failure_limit = max(1, failure_limit)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._used = 0.0
        self._failures = 0
        self._alive = True
        self._try_again = 0.0

    def ok(self) -> bool:
        """Tell whether the next request may go there."""
        with self._lock:
            self._used = now = time.monotonic()
            if self._ping is not None and self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(
                    target=self._check_loop, args=(self._ping,), name="health", daemon=True
                )
                self._thread.start()
            if self._alive:
                return True
            if self._ping is None and now >= self._try_again:
                self._try_again = now + self._interval
                return True
            return False

    def note(self, worked: bool) -> None:
        """Take note of a request and whether all of its answer came."""
        with self._lock:
            self._failures = 0 if worked else self._failures + 1
            given_up = self._failures >= self._failure_limit
            if not worked:
                self._try_again = time.monotonic() + self._interval
        if given_up:
            self._set_alive(False)
        elif worked and self._ping is None:
            self._set_alive(True)

    def close(self) -> None:
        """End the checks."""
        self._stop.set()

    def _set_alive(self, alive: bool) -> None:
        with self._lock:
            changed, self._alive = alive is not self._alive, alive
            if alive:
                self._failures = 0
        if changed:
            logger.warning("%s is %s", self._name, "in use again" if alive else "left out")

    def _check_loop(self, ping: Callable[[], bool]) -> None:
        while not self._stop.is_set():
            if time.monotonic() - self._used <= self._pause_elapsed:
                self._set_alive(ping())
            self._stop.wait(self._interval)
