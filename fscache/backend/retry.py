"""How often and how long a failed backend operation is repeated, as a value."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from erofs.values import Value
from fscache.backend.base import BackendError
from fscache.backend.settings import BackendConfig, NetworkConfig

__all__ = ["RetryPolicy", "retry_policy"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


class RetryPolicy(Value):
    """Repetition of temporary failures; times in seconds.

    The defaults give nydusd's four tries (tools 5.4) with pauses of its own, and leave, with
    the longest transfer of a backend, distance to the hung-task limit of 120 s (ondemand 5.14).

    Args:
        attempts: tries altogether.
        first_delay: pause after the first failure.
        factor: growth of the pause.
        max_delay: longest pause.
        deadline: no try begins later than this after the first.
        jitter: part of a pause that is random, 0 to 1, so that readers do not move in step.
    """

    attempts: int = 4
    first_delay: float = 0.1
    factor: float = 4.0
    max_delay: float = 5.0
    deadline: float = 50.0
    jitter: float = 0.25

    def run(self, operation: Callable[[], T], stop: threading.Event) -> T:
        """Return what `operation` returns, repeating it while it fails temporarily.

        Raises the last `BackendError`, at once when it is permanent, when `stop` is set
        (also during a pause), or when the next try would begin after the deadline. A pause
        that the server asks for is kept.
        """
        end = time.monotonic() + self.deadline
        delay = self.first_delay
        for attempt in range(1, self.attempts + 1):
            try:
                return operation()
            except BackendError as error:
                pause = delay * (1 - self.jitter * random.random())  # noqa: S311 - no secret
                pause = max(pause, error.retry_after or 0)
                if (
                    not error.temporary
                    or attempt == self.attempts
                    or time.monotonic() + pause > end
                    or stop.wait(pause)
                ):
                    raise
                logger.info("try %d of %d failed: %s", attempt, self.attempts, error)
            delay = min(delay * self.factor, self.max_delay)
        raise AssertionError("a policy has at least one attempt")


def retry_policy(config: BackendConfig) -> RetryPolicy:
    """Return how reads of a backend are repeated: `retry_limit` times, by default three."""
    if isinstance(config, NetworkConfig) and config.retry_limit > 0:
        return RetryPolicy(attempts=config.retry_limit + 1)
    return RetryPolicy()
