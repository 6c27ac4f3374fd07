"""The command line of `nydus-image`: words in, calls of the Python API, messages out."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from builder.cli import check, chunkdict, create, export, inspect, merge, stat, unpack
from erofs.console import LOG_LEVELS, CommandParser, print_version, set_up_logging
from erofs.errors import NydusError

__all__ = ["main"]

_COMMANDS = (create, chunkdict, merge, check, export, inspect, stat, unpack)
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


def _parser() -> CommandParser:
    logging_options = CommandParser(add_help=False)
    logging_options.add_argument(
        "-L",
        "--log-file",
        metavar="<log-file>",
        type=Path,
        default=argparse.SUPPRESS,
        help="Log file path",
    )
    logging_options.add_argument(
        "-l",
        "--log-level",
        metavar="<log-level>",
        default=argparse.SUPPRESS,
        choices=LOG_LEVELS,
        help="Log level: [default: info] [possible values: trace, debug, info, warn, error]",
    )
    parser = CommandParser(
        prog="nydus-image",
        description="Build, analyze, inspect or validate RAFS filesystems/Nydus accelerated"
        " container images",
        parents=[logging_options],
    )
    parser.add_argument("-V", "--version", action="store_true", help="Print version")
    commands = parser.add_subparsers(title="Commands", metavar="[COMMAND]", dest="command")
    for module in _COMMANDS:
        module.add_parser(commands, logging_options)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.version:
        print_version("")
        return 0
    if arguments.command is None:
        print("Usage: nydus-image [OPTIONS] [COMMAND]")
        return 0
    try:
        set_up_logging(
            getattr(arguments, "log_level", "info"), getattr(arguments, "log_file", None)
        )
        status: int = arguments.run(arguments)
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
    except KeyboardInterrupt:
        print("Error: interrupted, nothing was left behind", file=sys.stderr)
        return EXIT_INTERRUPTED
