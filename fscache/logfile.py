"""A log file that is rotated by size, and opened anew on request."""

from __future__ import annotations

import logging
import os
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

__all__ = ["LogFile"]

logger = logging.getLogger(__name__)

# As many as the original keeps.
KEPT_FILES = 10


class LogFile(RotatingFileHandler):
    """A log file that becomes `<name>.1` when it is full, and is opened anew when asked to be.

    What cannot be renamed is written on: no line is lost for that.

    Args:
        path: of the file, which is appended to.
        rotate_bytes: its largest size, 0 for no limit.

    Raises `OSError`.
    """

    def __init__(self, path: Path, rotate_bytes: int) -> None:
        # The number of this descriptor never changes, whichever file it means: a handler in C
        # that knows it never writes into what has taken the number of a closed file.
        self.dump_fd = -1
        self._reopen = False
        super().__init__(
            path,
            maxBytes=rotate_bytes,
            backupCount=KEPT_FILES,
            encoding="utf-8",
            errors="backslashreplace",
        )

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        if self.dump_fd < 0:
            self.dump_fd = os.dup(stream.fileno())
        else:
            os.dup2(stream.fileno(), self.dump_fd, inheritable=False)
        return stream

    def want_reopen(self) -> None:
        """Open the file anew with the next line; safe in signal handlers."""
        self._reopen = True

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, before that open or rotate the file where it has to be."""
        if self._reopen:
            self._reopen = False
            try:
                stream = self._open()
            except OSError as error:
                logger.error("the log file cannot be opened anew, the old one is used: %s", error)
            else:
                old = self.setStream(stream)
                if old is not None:
                    old.close()
        super().emit(record)

    def doRollover(self) -> None:  # noqa: N802 -- of logging.handlers
        """Rename the full file and begin a new one, where the directory permits it."""
        try:
            super().doRollover()
        except OSError:
            # Opened again by the next `emit`, which is a part of this one.
            self.stream = None
