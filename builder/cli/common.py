"""What the sub-commands share: parser style, logging, numbers, progress."""

from __future__ import annotations

import argparse
import logging
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from builder.report import package_version

__all__ = [
    "CommandParser",
    "Progress",
    "feature_names",
    "number",
    "print_version",
    "read_patterns",
    "set_up_logging",
]

_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}
_NAMES = {"WARNING": "WARN"}
_PROGRESS_SECONDS = 0.2


class CommandParser(argparse.ArgumentParser):
    """A parser that speaks of wrong usage as the real tool does: exit status 2, no guessing."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, the usage, and leave with status 2."""
        usage = " ".join(self.format_usage().split())
        self.exit(
            2,
            f"error: {message}\n\n{usage}\n\nFor more information, try '--help'.\n",
        )


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.created))
        fraction = f"{record.created % 1:.6f}"[1:]
        level = _NAMES.get(record.levelname, record.levelname)
        text = f"[{moment}{fraction} +00:00] {level} {record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def set_up_logging(level: str, path: str | None) -> None:
    """Send the log to standard error, or to a file; raise `OSError`."""
    handler: logging.Handler
    handler = logging.FileHandler(path) if path else logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[level])


def print_version() -> None:
    """Print what callers parse: the version behind ` Version:` and a tab."""
    print(f" Version: \t{package_version()}")
    print("Git Commit: \tunknown")
    print("Build Time: \tunknown")
    print("Profile: \trelease")
    print(f"Python: \t{platform.python_version()}")
    print()


def number(text: str) -> int:
    """Read a decimal or `0x` number, as an argparse type."""
    try:
        value = int(text, 16) if text.lower().startswith("0x") else int(text, 10)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid number '{text}'") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"negative number '{text}'")
    return value


def read_patterns() -> list[bytes]:
    """Read prefetch patterns, one a line, from standard input."""
    return sys.stdin.buffer.read().splitlines()


def feature_names(flags: object) -> str:
    """Return set flags as the real tool prints them."""
    return " | ".join(flag.name for flag in flags)  # type: ignore[attr-defined]


class Progress:
    """Shows on a terminal how many bytes are done; silent everywhere else."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._shown = 0.0
        self._enabled = sys.stderr.isatty()

    def callback(self) -> Callable[[int], None] | None:
        """Return the function to hand to the library, None when nobody watches."""
        return self._advance if self._enabled else None

    def _advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown < _PROGRESS_SECONDS:
            return
        self._shown = now
        of = f" of {self._total / 1e6:.0f}" if self._total else ""
        sys.stderr.write(f"\r{self._what}: {self._done / 1e6:.0f}{of} MB\033[K")
        sys.stderr.flush()

    def end(self) -> None:
        """Take the line away again."""
        if self._enabled and self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def existing_path(text: str) -> Path:
    """Take a path as an argparse type; what is wrong with it is told when it is used."""
    return Path(text)
