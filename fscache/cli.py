"""The command line of `nydusd`."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType

from erofs.console import LOG_LEVELS, CommandParser, ProgressLine, package_version, set_up_logging
from erofs.errors import NydusError
from fscache.api import ApiServer
from fscache.backend import LocalFsConfig
from fscache.config import ConfigError, DaemonConfig, load_config
from fscache.daemon import Daemon
from fscache.environment import with_environment

__all__ = ["main"]

logger = logging.getLogger(__name__)

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT


def _parser() -> CommandParser:
    common = CommandParser(add_help=False)
    common.add_argument(
        "-l", "--log-level", choices=LOG_LEVELS, default="info", metavar="<log-level>",
        help="Log level: [default: info] [possible values: trace, debug, info, warn, error]",
    )  # fmt: skip
    common.add_argument(
        "-L", "--log-file", type=Path, metavar="<log-file>", help="Log messages to the file"
    )
    parser = CommandParser(
        prog="nydusd",
        description="Serve container images to the kernel's EROFS, fetching what is read",
    )
    parser.add_argument("-V", "--version", action="store_true", help="Print version")
    commands = parser.add_subparsers(title="Commands", dest="command", metavar="<COMMAND>")
    _add_erofs(commands.add_parser(
        "erofs", parents=[common],
        help="mount one image through the kernel's EROFS",
        description="Mount one image through the kernel's EROFS and serve it until told to"
        " stop (SIGINT, SIGTERM, or PUT /api/v1/daemon/exit)",
    ))  # fmt: skip
    return parser


def _add_erofs(parser: CommandParser) -> None:
    parser.set_defaults(parser=parser)
    parser.add_argument(
        "-B", "--bootstrap", type=Path, required=True, metavar="<bootstrap>",
        help="File path of RAFS filesystem metadata",
    )  # fmt: skip
    parser.add_argument(
        "-M", "--mountpoint", type=Path, required=True, metavar="<mountpoint>",
        help="Existing directory to mount at",
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "-C", "--config", type=Path, metavar="<config>",
        help="Configuration file: JSON of version 1, JSON or TOML of version 2",
    )  # fmt: skip
    source.add_argument(
        "-D", "--localfs-dir", type=Path, metavar="<localfs-dir>",
        help="Directory with the blobs, which also holds the cache",
    )  # fmt: skip
    parser.add_argument(
        "-A", "--apisock", type=Path, metavar="<apisock>", help="Path of the API socket"
    )
    parser.add_argument(
        "--eager", action="store_true",
        help="Fetch and verify everything, then mount; needs no kernel events",
    )  # fmt: skip
    parser.add_argument(
        "--directio", action="store_true", help="Read cached data past the page cache"
    )


def _raise_open_files() -> None:
    """Allow as many open files as the hard limit does: each waiting read holds one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _end_on_signals(daemon: Daemon) -> None:
    """Ask for an orderly end on SIGINT and SIGTERM, also when one comes again.

    Only a fetch before the mount is broken off: an exception between a mount and its
    entry in the list of what has to be closed would leave readers alone.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if daemon.interruptible:
            raise KeyboardInterrupt
        daemon.request_stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def _serve_erofs(arguments: argparse.Namespace) -> int:
    if arguments.localfs_dir is not None:
        directory = arguments.localfs_dir
        if not directory.is_dir():
            raise ConfigError("not a directory", path=directory)
        config = DaemonConfig(LocalFsConfig(dir=directory), directory)
    else:
        config = load_config(arguments.config)
        config = replace(config, backend=with_environment(config.backend, os.environ))
    progress = ProgressLine("fetched")
    daemon = Daemon(
        config,
        arguments.bootstrap,
        arguments.mountpoint,
        eager=arguments.eager,
        directio=arguments.directio,
        progress=progress.show,
    )
    _end_on_signals(daemon)
    with ExitStack() as stack:
        if arguments.apisock is not None:
            stack.callback(ApiServer(arguments.apisock, daemon).close)
        stack.callback(daemon.stop)
        try:
            daemon.start()
        finally:
            progress.end()
        daemon.wait()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.version:
        print(f"nydusd Version: \t{package_version()}")
        return 0
    if arguments.command is None:
        parser.error("a command is required: erofs")
    try:
        set_up_logging(arguments.log_level, arguments.log_file)
        _raise_open_files()
        return _serve_erofs(arguments)
    except NydusError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"Error: {place}{error.strerror or error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print("Error: interrupted before the image was mounted", file=sys.stderr)
        return EXIT_INTERRUPTED
