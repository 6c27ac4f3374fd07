"""The last errors of the daemon, for `GET /api/v1/daemon/events` (tools 8.4)."""

from __future__ import annotations

import logging
import time
from collections import deque

__all__ = ["MAX_ERRORS", "MAX_SIZE", "ErrorRing"]

MAX_ERRORS = 500
MAX_SIZE = 51_200


class ErrorRing(logging.Handler):
    """Keeps the messages of ERROR records, the latest `MAX_ERRORS` in at most `MAX_SIZE` bytes.

    Messages only: no tracebacks. Attach it to the logger of the package; safe for threads.
    `count` goes on counting when old messages are dropped.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._texts: deque[bytes] = deque()
        self._size = 0
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message, and drop the oldest ones that no longer fit."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            self.handleError(record)
            return
        moment = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(record.created))
        text = f"{moment} - {message}".encode("utf-8", "backslashreplace")[:MAX_SIZE]
        self.count += 1
        self._texts.append(text)
        self._size += len(text)
        while self._size > MAX_SIZE or len(self._texts) > MAX_ERRORS:
            self._size -= len(self._texts.popleft())

    def as_dict(self) -> dict[str, object]:
        """Return a consistent copy under the names of the API.

        The totals are of what is kept, as in the original (`utils/src/logger.rs`).
        """
        self.acquire()
        try:
            texts, size = list(self._texts), self._size
        finally:
            self.release()
        return {
            "max_errors": MAX_ERRORS,
            "total_errors": len(texts),
            "max_size": MAX_SIZE,
            "total_size": size,
            "errors": [text.decode("utf-8", "ignore") for text in texts],
        }
