"""A backend that fails is left alone for a moment: a circuit as a value, and its owner.

After some time of nothing but failures, reads fail at once for a short, growing time; then one
of them tries. Nothing is remembered longer than that: the first success closes the circuit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from erofs.values import Value
from fscache.backend.base import AuthError, BackendError, Unavailable

__all__ = ["Breaker", "Circuit"]

logger = logging.getLogger(__name__)


class Circuit(Value):
    """State of a circuit; times in seconds of one clock.

    Args:
        limit: failures in a row before it opens.
        patience: time of nothing but failures before it opens, longer than one read is
            repeated, so that a backend that restarts is never given up.
        first_pause: how long it is open at first; it doubles with every probe that fails.
        max_pause: how long it is open at most.
        failures: seen in a row.
        since: when the first of them was seen.
        pause: how long it is open now, 0 when it is closed.
        open_until: when the next probe may go.
        probing: whether one is under way.
    """

    limit: int = 8
    patience: float = 5.0
    first_pause: float = 0.25
    max_pause: float = 2.0
    failures: int = 0
    since: float = 0.0
    pause: float = 0.0
    open_until: float = 0.0
    probing: bool = False

    def wait(self, now: float) -> float:
        """Return how long a request has to wait, 0 when it may go."""
        if self.pause == 0.0:
            return 0.0
        if self.probing:
            return self.pause
        return max(0.0, self.open_until - now)

    def begun(self) -> Circuit:
        """Return the circuit after a request that `wait` let through has begun."""
        return self if self.pause == 0.0 else self._replace(probing=True)

    def succeeded(self) -> Circuit:
        """Return the circuit after a success."""
        if self.failures == 0:
            return self
        return self._replace(failures=0, since=0.0, pause=0.0, open_until=0.0, probing=False)

    def failed(self, now: float, *, probe: bool) -> Circuit:
        """Return the circuit after a failure, of a probe or of another request."""
        if self.pause != 0.0:
            if not probe:
                return self  # began before the circuit opened
            pause = min(self.pause * 2, self.max_pause)
            return self._replace(
                failures=self.failures + 1,
                pause=pause,
                open_until=now + pause,
                probing=False,
            )
        since = self.since if self.failures else now
        after = self._replace(failures=self.failures + 1, since=since)
        if after.failures >= self.limit and now - after.since >= self.patience:
            return after._replace(pause=self.first_pause, open_until=now + self.first_pause)
        return after


class Breaker:
    """The circuit of one backend; safe for many threads."""

    def __init__(
        self, circuit: Circuit | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._initial = self._circuit = circuit or Circuit()
        self._clock = clock
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Forget all failures: something about the backend was changed."""
        with self._lock:
            self._circuit = self._initial

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Watch one request to the backend.

        What is temporary, or about credentials, is a failure of the backend; what concerns
        one blob shows that it works.

        Raises:
            Unavailable: at once and not to be repeated, while the circuit is open.
        """
        probe = self._begin()
        try:
            yield
        except BackendError as error:
            self._end(probe, failed=error.temporary or isinstance(error, AuthError))
            raise
        except BaseException:
            self._end(probe, failed=True)
            raise
        self._end(probe, failed=False)

    def _begin(self) -> bool:
        with self._lock:
            now = self._clock()
            wait = self._circuit.wait(now)
            if wait > 0.0:
                raise Unavailable(
                    f"backend has failed for {now - self._circuit.since:.0f} s,"
                    f" next try in {wait:.1f} s"
                )
            self._circuit = self._circuit.begun()
            return self._circuit.probing

    def _end(self, probe: bool, *, failed: bool) -> None:
        with self._lock:
            before = self._circuit
            if failed:
                self._circuit = before.failed(self._clock(), probe=probe)
            else:
                self._circuit = before.succeeded()
            after = self._circuit
        if before.pause == 0.0 < after.pause:
            logger.warning("backend fails again and again: reads fail at once, one at a time tries")
        elif after.pause == 0.0 < before.pause:
            logger.warning("backend works again")
