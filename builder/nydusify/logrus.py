"""Log lines in the form of the real tool's: `time="…" level=info msg="…" module=converter`."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path

from erofs.console import ConsoleHandler

__all__ = ["LEVELS", "LogrusFormatter", "set_up_logging"]

LEVELS = {
    "panic": logging.CRITICAL,
    "fatal": logging.CRITICAL,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}
_NAMES = {"CRITICAL": "fatal"}
_PLAIN = re.compile(r"[A-Za-z0-9._/@^+-]+")
_MODULES = {"builder.convert": "converter"}


class LogrusFormatter(logging.Formatter):
    """Formats records as logrus' text formatter does without a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        level = _NAMES.get(record.levelname, record.levelname.lower())
        text = f"time={_quoted(moment)} level={level} msg={_quoted(record.getMessage())}"
        module = next(
            (word for name, word in _MODULES.items() if record.name.startswith(name)), None
        )
        if module is not None:
            text += f" module={module}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def set_up_logging(level: int, path: Path | None) -> None:
    """Send the log to standard error, and to a file when one is named; raise `OSError`."""
    handlers: list[logging.Handler] = [ConsoleHandler()]
    if path is not None:
        handlers.append(logging.FileHandler(path))
    root = logging.getLogger()
    for handler in handlers:
        handler.setFormatter(LogrusFormatter())
    root.handlers[:] = handlers
    root.setLevel(level)
