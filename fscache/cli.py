"""The command line of `nydusd`: words to options, signals to an orderly end, errors to one line."""

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
from typing import NoReturn

from erofs.console import LOG_LEVELS, CommandParser, ProgressLine, print_version, set_up_logging
from erofs.errors import NydusError
from fscache.api import ApiServer
from fscache.backend import LocalFsConfig
from fscache.config import ConfigError, DaemonConfig, load_config
from fscache.environment import with_environment
from fscache.node import NodeDaemon, NodeOptions

__all__ = ["main"]

logger = logging.getLogger(__name__)

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
DEFAULT_OPEN_FILES = 1_000_000
_COMMANDS = ("erofs", "fuse")


def _common() -> CommandParser:
    common = CommandParser(add_help=False)
    common.add_argument(
        "-l", "--log-level", choices=LOG_LEVELS, default="info", metavar="<log-level>",
        help="Log level: [default: info] [possible values: trace, debug, info, warn, error]",
    )  # fmt: skip
    common.add_argument(
        "-L", "--log-file", type=Path, metavar="<log-file>", help="Log messages to the file"
    )
    common.add_argument(
        "-A", "--apisock", type=Path, metavar="<apisock>", help="Path of the API socket"
    )
    common.add_argument(
        "--rlimit-nofile", type=int, default=DEFAULT_OPEN_FILES, metavar="<rlimit-nofile>",
        help="Limit of open files, 0 leaves it as it is [default: 1000000]",
    )  # fmt: skip
    common.add_argument(
        "-C", "--config", type=Path, metavar="<config>",
        help="Configuration file: JSON of version 1, JSON or TOML of version 2",
    )  # fmt: skip
    common.add_argument(
        "-D", "--localfs-dir", type=Path, metavar="<localfs-dir>",
        help="Directory with the blobs, which also holds the cache",
    )  # fmt: skip
    common.add_argument(
        "-M", "--mountpoint", type=Path, required=True, metavar="<mountpoint>",
        help="Existing directory to mount at",
    )  # fmt: skip
    return common


def _parser() -> CommandParser:
    common = _common()
    parser = CommandParser(
        prog="nydusd",
        description="Serve container images to the kernel's EROFS, fetching what is read",
    )
    parser.add_argument("-V", "--version", action="store_true", help="Print version")
    commands = parser.add_subparsers(title="Commands", dest="command", metavar="<COMMAND>")
    erofs = commands.add_parser(
        "erofs", parents=[common], help="mount one image through the kernel's EROFS",
        description="Mount one image through the kernel's EROFS and serve it until told to"
        " stop (SIGINT, SIGTERM, or PUT /api/v1/daemon/exit)",
    )  # fmt: skip
    _add_erofs(erofs)
    fuse = commands.add_parser(
        "fuse", parents=[common], help="serve images below one mount point, as clients ask",
        description="Serve images below one mount point. The name is the original's: what is"
        " mounted is the kernel's EROFS",
    )  # fmt: skip
    _add_fuse(fuse)
    return parser


def _add_erofs(parser: CommandParser) -> None:
    parser.set_defaults(parser=parser, check=_check_erofs, options=_erofs_options)
    parser.add_argument(
        "-B", "--bootstrap", type=Path, required=True, metavar="<bootstrap>",
        help="File path of RAFS filesystem metadata",
    )  # fmt: skip
    parser.add_argument(
        "--eager", action="store_true",
        help="Fetch and verify everything, then mount; needs no kernel events",
    )  # fmt: skip
    parser.add_argument(
        "--directio", action="store_true", help="Read cached data past the page cache"
    )


# Flags of the original that are taken, with the reason why they change nothing here.
_WITHOUT_EFFECT = {
    "--failover-policy": "the kernel has no requests to resend",
    "--fuse-threads": "threads are not counted by mount",
    "--log-rotation-size": "log files are not rotated in this version",
    "--prefetch-files": "files are not prefetched in this version",
    "--dedup-db": "blobs are shared by id",
}


def _add_fuse(parser: CommandParser) -> None:
    parser.set_defaults(parser=parser, check=_check_fuse, options=_fuse_options)
    parser.add_argument(
        "-B", "--bootstrap", type=Path, metavar="<bootstrap>",
        help="File path of RAFS filesystem metadata, to be mounted at the mount point itself",
    )  # fmt: skip
    parser.add_argument(
        "-s", "--shared-dir", type=Path, metavar="<shared-dir>",
        help="Directory to pass through, in place of a bootstrap",
    )  # fmt: skip
    parser.add_argument("--id", metavar="<id>", help="Name of the instance")
    for name, reason in _WITHOUT_EFFECT.items():
        aliases = (name, "--thread-num") if name == "--fuse-threads" else (name,)
        parser.add_argument(
            *aliases, dest="ignored" + name, metavar="<value>", help=f"No effect: {reason}"
        )


def _conflict(parser: CommandParser, one: str, other: str) -> NoReturn:
    parser.error(f"the argument '--{one} <{one}>' cannot be used with '--{other} <{other}>'")


def _missing(parser: CommandParser, what: str) -> NoReturn:
    parser.error(f"the following required arguments were not provided:\n  {what}")


def _check_erofs(arguments: argparse.Namespace) -> None:
    """Refuse words that do not go together, with status 2, before anything is done."""
    parser: CommandParser = arguments.parser
    if arguments.config is not None and arguments.localfs_dir is not None:
        _conflict(parser, "config", "localfs-dir")
    if arguments.bootstrap is not None and not (arguments.config or arguments.localfs_dir):
        _missing(parser, "--config <config> or --localfs-dir <localfs-dir>")


def _check_fuse(arguments: argparse.Namespace) -> None:
    _check_erofs(arguments)
    if arguments.bootstrap is not None and arguments.shared_dir is not None:
        _conflict(arguments.parser, "bootstrap", "shared-dir")


def _config(arguments: argparse.Namespace) -> DaemonConfig | None:
    if arguments.localfs_dir is not None:
        directory = arguments.localfs_dir
        if not directory.is_dir():
            raise ConfigError("not a directory", path=directory)
        return DaemonConfig(LocalFsConfig(dir=directory), directory)
    if arguments.config is None:
        return None
    config = load_config(arguments.config)
    return replace(config, backend=with_environment(config.backend, os.environ))


def _erofs_options(arguments: argparse.Namespace) -> NodeOptions:
    config = _config(arguments)
    return NodeOptions(
        arguments.mountpoint,
        bootstrap=arguments.bootstrap,
        config=config,
        id=config.id or None if config is not None else None,
        eager=arguments.eager,
        directio=arguments.directio,
    )


def _fuse_options(arguments: argparse.Namespace) -> NodeOptions:
    config = _config(arguments)
    for name, reason in _WITHOUT_EFFECT.items():
        if getattr(arguments, "ignored" + name) is not None:
            logger.info("%s has no effect: %s", name, reason)
    return NodeOptions(
        arguments.mountpoint,
        bootstrap=arguments.bootstrap,
        config=config,
        shared_dir=arguments.shared_dir,
        id=arguments.id,
        environment=os.environ,
    )


def _set_open_files(wanted: int) -> None:
    """Set the limit of open files: each waiting read holds one."""
    if wanted <= 0:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
    except (ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        logger.info("the limit of open files stays at %d", hard)


def _end_on_signals(daemon: NodeDaemon) -> None:
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


def _serve(arguments: argparse.Namespace) -> int:
    progress = ProgressLine("fetched")
    options: NodeOptions = arguments.options(arguments)
    daemon = NodeDaemon(replace(options, progress=progress.show))
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


def _with_command(words: list[str]) -> list[str]:
    """Put the sub-command first: without one the program is `fuse`, as the original."""
    if not words or words[0] in ("-h", "--help", "-V", "--version") or not words[0].startswith("-"):
        return words
    for command in _COMMANDS:
        if command in words:
            rest = list(words)
            rest.remove(command)
            return [command, *rest]
    return ["fuse", *words]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    arguments = parser.parse_args(_with_command(list(sys.argv[1:] if argv is None else argv)))
    if arguments.version:
        print_version("nydusd")
        return 0
    if arguments.command is None:
        parser.error(f"a command is required: {', '.join(_COMMANDS)}")
    arguments.check(arguments)
    try:
        set_up_logging(arguments.log_level, arguments.log_file)
        _set_open_files(arguments.rlimit_nofile)
        return _serve(arguments)
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
