"""Why reads fail, told once in a while: a full disk or a dead backend fails all of them alike."""

from __future__ import annotations

import logging
import threading
import time

__all__ = ["Complaints"]

logger = logging.getLogger(__name__)

_TELL_SECONDS = 10.0
_TOLD_MAX = 1000


class Complaints:
    """Logs why reads fail, the same reason of the same subject once in a while only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[tuple[object, str], float] = {}

    def is_new(self, subject: object, reason: str) -> bool:
        """Return whether this was not told a moment ago; now it was. Safe for many threads."""
        now = time.monotonic()
        key = (subject, reason)
        with self._lock:
            if now - self._told.get(key, -_TELL_SECONDS) < _TELL_SECONDS:
                return False
            if len(self._told) >= _TOLD_MAX:
                self._told.clear()
            self._told[key] = now
        return True

    def tell(self, subject: object, text: str, reason: str = "") -> None:
        """Log a text, unless one with its reason, without one itself, was a moment ago."""
        if self.is_new(subject, reason or text):
            logger.warning("reads fail: %s", text)
