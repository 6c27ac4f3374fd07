"""`nydusify`: finds the command, and turns errors into a last line and an exit status."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol

from builder.nydusify.flags import Command, Flag, UsageError, Values, parse_flags
from builder.nydusify.logrus import LEVELS, set_up_logging
from builder.termination import exit_status, terminable
from erofs.errors import NydusError
from erofs.version import VERSION

__all__ = ["main"]

logger = logging.getLogger(__name__)

EXIT_FAILURE = 1
EXIT_NO_COMMAND = 3
_ENDED_BY_SIGNAL = 128
_GC_THRESHOLD = 500_000

_GLOBAL = (
    Flag("debug", "Enable debug log level, overwrites the 'log-level' option", False, ("D",),
         "DEBUG_LOG_LEVEL"),
    Flag("log-level", "Set log level (panic, fatal, error, warn, info, debug, trace)", "info",
         ("l",)),
    Flag("log-file", "Write logs to a file"),
    Flag("version", "print the version", False, ("v",), ""),
)  # fmt: skip
# Names, and the module below `builder.nydusify` that has the command as COMMAND and `run`.
_COMMANDS = {
    "convert": ("convert", "Generate a Nydus image from an OCI image"),
    "check": ("check", "Verify nydus image format and content"),
    "chunkdict": ("chunkdict", "Deduplicate chunk for Nydus image (experimental)"),
    "mount": ("mount", "Mount the nydus image as a filesystem"),
    "build": ("build", "Build a Nydus filesystem from a source directory"),
    "copy": ("copy", "Copy an image from source to target"),
    "optimize": ("optimize", "Optimize a source nydus image and push to the target"),
    "commit": ("commit", "Create and push a new nydus image from a container's changes"),
}
_ALIASES = {"view": "mount", "pack": "build"}


class _Module(Protocol):
    COMMAND: Command

    def run(self, values: Values, environment: Mapping[str, str]) -> int:
        """Carry out the command and return the exit status."""


def _load(name: str) -> _Module:
    return import_module(f"builder.nydusify.{_COMMANDS[name][0]}")


def _help() -> str:
    lines = []
    for name, (_, usage) in _COMMANDS.items():
        names = ", ".join((name, *(a for a, target in _ALIASES.items() if target == name)))
        lines.append(f"   {names:<12} {usage}")
    return (
        "NAME:\n   Nydusify - Nydus utility tool to build, convert, verify and view container"
        " images\n\nUSAGE:\n   Nydusify [global options] command [command options]\n\n"
        f"VERSION:\n   {VERSION}\n\nCOMMANDS:\n" + "\n".join(lines) + "\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        return _alone(words)
    return _main(words)


def _alone(words: list[str]) -> int:
    """Run the command line as a process of its own."""
    # To look for cycles in trees of many nodes, again and again, takes a tenth of the time.
    gc.set_threshold(_GC_THRESHOLD)
    status = _main(words)
    if status > _ENDED_BY_SIGNAL:
        # What may still run waits for a registry that does not answer.
        logging.shutdown()
        os._exit(status)
    return status


def _main(words: list[str]) -> int:
    environment = dict(os.environ)
    set_up_logging(logging.INFO, None)
    command: Command | None = None
    try:
        values = parse_flags(_GLOBAL, words, environment)
        level = LEVELS.get(values.text("log-level").lower())
        if level is None:
            raise UsageError(f"not a valid logrus Level: {values.text('log-level')!r}")
        path = values.text("log-file")
        set_up_logging(
            logging.DEBUG if values.flag("debug") else level, Path(path) if path else None
        )
        if values.flag("version"):
            print(f"Version     : {VERSION}")
            return 0
        if not values.rest or "help" in values.given or values.rest[0] in ("help", "h"):
            print(_help())
            return 0
        name = _ALIASES.get(values.rest[0], values.rest[0])
        if name not in _COMMANDS:
            print(f"No help topic for '{name}'", file=sys.stderr)
            return EXIT_NO_COMMAND
        module = _load(name)
        command = module.COMMAND
        given = parse_flags(command.flags, values.rest[1:], environment)
        if "help" in given.given:
            print(command.help_text())
            return 0
        with terminable():
            return module.run(given, environment)
    except UsageError as error:
        if error.shows_help:
            print(f"Incorrect Usage: {error}\n\n{command.help_text() if command else _help()}")
        logger.critical("%s", error)
        return EXIT_FAILURE
    except NydusError as error:
        logger.critical("%s", error)
        return EXIT_FAILURE
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        logger.critical("%s%s", place, error.strerror or error)
        return EXIT_FAILURE
    except KeyboardInterrupt as stop:
        logger.critical("interrupted; no image is half-published")
        return exit_status(stop)
