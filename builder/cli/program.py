"""The program behind `nydus-image`: the parser, its commands, and what becomes of errors."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from builder.cli.common import logging_words
from builder.termination import exit_status, terminable
from erofs.console import CommandParser, set_up_logging
from erofs.errors import NydusError
from erofs.memory import bound_arenas
from erofs.version import print_version

__all__ = ["run"]

_COMMANDS = {
    "create": "Create RAFS filesystems from directories, tar files or OCI images",
    "chunkdict": "Deduplicate RAFS filesystem metadata",
    "merge": "Merge multiple bootstraps into a overlaid bootstrap",
    "check": "Validate RAFS filesystem metadata",
    "optimize": "Optimize By Prefetch",
    "export": "Export RAFS filesystems as raw block disk images",
    "inspect": "Inspect RAFS filesystem metadata in interactive or request mode",
    "stat": "Generate statistics information for RAFS filesystems",
    "compact": "(experimental)Compact specific nydus image, remove unused chunks in blobs,"
    " merge small blobs",
    "unpack": "Unpack a RAFS filesystem to a tar file",
}
_HELP = "Print this message or the help of the given subcommand(s)"
EXIT_FAILURE = 1
EXIT_USAGE = 2


def _help_as_option(words: list[str]) -> list[str]:
    """Return `help COMMAND` as `COMMAND --help`, also behind `chunkdict`."""
    place = 1 if words[:1] == ["chunkdict"] else 0
    if words[place : place + 1] != ["help"]:
        return words
    return [*words[:place], *words[place + 1 :], "--help"]


def _parser(words: Sequence[str]) -> CommandParser:
    """Return the parser; commands that are not in `words` are only listed, not loaded."""
    parent = logging_words()
    parser = CommandParser(
        prog="nydus-image",
        description="Build, analyze, inspect or validate RAFS filesystems/Nydus accelerated"
        " container images",
        parents=[parent],
    )
    parser.add_argument("-V", "--version", action="store_true", help="Print version")
    commands = parser.add_subparsers(title="Commands", metavar="[COMMAND]", dest="command")
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, parents=[parent])
        if name in words:
            import_module(f"builder.cli.{name}").add_words(command)
    commands.add_parser("help", help=_HELP)
    return parser


def run(argv: Sequence[str] | None) -> int:
    """Run a command line, None for that of the process; return its exit status."""
    if argv is None:
        return _alone(sys.argv[1:])
    return _run(argv)


def _alone(words: Sequence[str]) -> NoReturn:
    """Run the command line of a process of its own, and end that."""
    # It ends soon: to look for cycles in a tree of a million nodes, again and again, would take
    # a fifth of its time.
    gc.disable()
    bound_arenas()
    status = _run(words)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            # What cannot be written was told above.
            with suppress(OSError):
                stream.flush()
    # To take a tree apart, node by node, would take a tenth of the time, for nobody.
    os._exit(status)


def _run(argv: Sequence[str]) -> int:
    words = _help_as_option(list(argv))
    arguments = _parser(words).parse_args(words)
    try:
        status = _carry_out(arguments)
        sys.stdout.flush()
        return status
    except NydusError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is left in the buffer goes nowhere.
        sys.stdout = None
        return EXIT_FAILURE
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"Error: {place}{error.strerror or error}", file=sys.stderr)
        return EXIT_FAILURE
    except MemoryError:
        print("Error: out of memory, nothing was left behind", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt as stop:
        print("Error: interrupted, nothing was left behind", file=sys.stderr)
        return exit_status(stop)


def _carry_out(arguments: argparse.Namespace) -> int:
    if arguments.version:
        print_version("")
        return 0
    if arguments.command is None:
        print("Usage: nydus-image [OPTIONS] [COMMAND]")
        return 0
    set_up_logging(getattr(arguments, "log_level", "info"), getattr(arguments, "log_file", None))
    with terminable():
        status: int = arguments.run(arguments)
    return status
