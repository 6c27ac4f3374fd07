"""What the command lines share: log lines, parser and progress; standard library only."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

__all__ = [
    "LOG_LEVELS",
    "CommandParser",
    "ConsoleHandler",
    "ProgressLine",
    "log_path",
    "log_place",
    "log_to",
    "set_up_logging",
]

LOG_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}
_NAMES = {"WARNING": "WARN"}
_PROGRESS_SECONDS = 0.2
_WIDTH = 80


def _columns() -> int:
    """Return how wide the terminal is, as `shutil` finds it, which takes 3 ms to load."""
    with suppress(KeyError, ValueError):
        if (columns := int(os.environ["COLUMNS"])) > 0:
            return columns
    with suppress(OSError):
        return os.get_terminal_size(1).columns or _WIDTH
    return _WIDTH


class _Help(argparse.HelpFormatter):
    """Made for each option that is added, too, as a check of it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


class CommandParser(argparse.ArgumentParser):
    """A parser that speaks of wrong usage as the real tools do: exit status 2, no guessing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **{"formatter_class": _Help, **options})

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, the usage, and leave with status 2."""
        usage = " ".join(self.format_usage().split())
        usage = usage[:1].upper() + usage[1:]
        self.exit(2, f"error: {message}\n\n{usage}\n\nFor more information, try '--help'.\n")


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Standard error; on a terminal a line takes the place of the progress that stands there."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._clear = "\r\033[K" if sys.stderr.isatty() else ""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, behind what clears the terminal's."""
        return self._clear + super().format(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.created))
        micros = int(record.created % 1 * 1_000_000)
        level = _NAMES.get(record.levelname, record.levelname)
        text = f"[{moment}.{micros:06d} +00:00] {level} {record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def log_path(path: Path) -> Path:
    """Return where the log goes for `--log-file`: a name without extension gets `.log`.

    What is there already and is a link or no file (`/dev/stdout`) keeps its name.
    """
    special = path.is_symlink() or (path.exists() and not path.is_file())
    if path.suffix or not path.name or special:
        return path
    return path.with_name(path.name + ".log")


def log_place(path: Path) -> Path:
    """Return `log_path`, in a directory that is made if need be: the real tools make it, too.

    Raises `OSError`.
    """
    # What is no directory is told of by who opens the file.
    with suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
    return log_path(path)


def log_to(handler: logging.Handler, level: str) -> None:
    """Make a handler the only one of the log, with our form of lines."""
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LOG_LEVELS[level])


def set_up_logging(level: str, path: Path | None) -> None:
    """Send the log to standard error, or to a file (see `log_path`); raise `OSError`."""
    handler: logging.Handler = ConsoleHandler()
    if path is not None:
        handler = logging.FileHandler(log_place(path))
    log_to(handler, level)


class ProgressLine:
    """One line on a terminal that is written over; silent everywhere else.

    Args:
        what: what is being done.
        unit: what is counted; of "MB", bytes.
    """

    def __init__(self, what: str, unit: str = "MB") -> None:
        self._what = what
        self._unit = unit
        self._scale = 1e6 if unit == "MB" else 1
        self._shown = 0.0
        self.enabled = sys.stderr.isatty()

    def show(self, done: int, total: int | None = None) -> None:
        """Show how many are done, at most some times a second."""
        now = time.monotonic()
        if not self.enabled or now - self._shown < _PROGRESS_SECONDS:
            return
        self._shown = now
        of = "" if total is None else f" of {total / self._scale:.0f}"
        sys.stderr.write(f"\r{self._what}: {done / self._scale:.0f}{of} {self._unit}\033[K")
        sys.stderr.flush()

    def end(self) -> None:
        """Take the line away again."""
        if self.enabled and self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
