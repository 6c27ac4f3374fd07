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
from typing import TYPE_CHECKING

from erofs.console import LOG_LEVELS, CommandParser, ProgressLine, print_version
from erofs.errors import NydusError
from fscache.backend import LocalFsConfig
from fscache.cli_words import (
    add_names,
    address,
    check_names,
    conflict,
    megabytes,
    missing,
    virtual_path,
)
from fscache.config import ConfigError, DaemonConfig, load_config
from fscache.daemonlog import set_up_daemon_log
from fscache.environment import with_environment
from fscache.image import ROOT
from fscache.memory import bound_arenas
from fscache.nbd_cli import add_nbd, nbd_options
from fscache.node import NodeDaemon, NodeOptions
from fscache.place import mounted_at
from fscache.prefetchlist import read_prefetch_file
from fscache.singleton import SingletonDaemon
from fscache.singleton_cli import add_singleton, singleton_options, waits_for_take_over
from fscache.systemd import Notifier, Watchdog
from fscache.transport import Transport

if TYPE_CHECKING:
    from fscache.nbd.daemon import NbdDaemon

__all__ = ["main"]

logger = logging.getLogger(__name__)

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
DEFAULT_OPEN_FILES = 1_000_000
_COMMANDS = ("erofs", "fuse", "singleton", "nbd", "doctor")


def _process() -> CommandParser:
    """Options of every daemon."""
    common = CommandParser(add_help=False)
    common.add_argument(
        "-l", "--log-level", choices=LOG_LEVELS, default="info", metavar="<log-level>",
        help="Log level: [default: info] [possible values: trace, debug, info, warn, error]",
    )  # fmt: skip
    common.add_argument(
        "-L", "--log-file", type=Path, metavar="<log-file>",
        help="Log messages to the file; '.log' is appended to a name without extension",
    )  # fmt: skip
    common.add_argument(
        "--log-rotation-size", type=megabytes, default=0, metavar="<log-rotation-size>",
        help="Size in MB from which on the log file is rotated, 0 for never [default: 0]",
    )  # fmt: skip
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
    return common


def _common(process: CommandParser) -> CommandParser:
    """Options of daemons that mount something."""
    common = CommandParser(add_help=False, parents=[process])
    common.add_argument(
        "--prometheus", type=address, metavar="<prometheus>",
        help="Serve metrics to Prometheus at [ADDRESS:]PORT, without an address on loopback only",
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


def _add_transport(parser: CommandParser) -> None:
    """Add how images get to the kernel."""
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--transport", choices=[str(way) for way in Transport], default=Transport.AUTO,
        metavar="<transport>",
        help="How images get to the kernel: fanotify (EROFS, lazily; root, Linux 6.14), nbd"
        " (EROFS, lazily, from a block device; root, Linux 6.4), fuse (lazily, for every user),"
        " eager (EROFS, complete files first), auto (the first of fanotify, nbd, fuse that works)"
        " [default: auto]",
    )  # fmt: skip
    ways.add_argument(
        "--eager", dest="transport", action="store_const", const=Transport.EAGER,
        default=Transport.AUTO, help="Short for --transport eager",
    )  # fmt: skip


def _parser() -> CommandParser:
    process = _process()
    common = _common(process)
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
    singleton = commands.add_parser(
        "singleton", parents=[process], help="serve the kernel's cachefiles, mount nothing",
        description="Serve the API, and to the kernel's cachefiles what clients register",
    )  # fmt: skip
    add_singleton(singleton)
    nbd = commands.add_parser(
        "nbd", parents=[process], help="serve one image as a block device, no mount",
        description="Serve one image as a raw disk, that of `nydus-image export --block`: as a"
        " block device of the kernel's NBD, or at a socket",
    )  # fmt: skip
    add_nbd(nbd)
    doctor = commands.add_parser(
        "doctor", help="tell what this machine can do, and what would enable more",
        description="Try what this kernel, privilege and file system allow, and print a table."
        " Exit status 0: images can be read lazily; 1: they cannot",
    )  # fmt: skip
    _add_doctor(doctor)
    return parser


def _add_doctor(parser: CommandParser) -> None:
    parser.set_defaults(check=lambda arguments: None)
    parser.add_argument(
        "--work-dir", type=Path, default=Path(), metavar="<work-dir>",
        help="Cache directory to be; its file system matters [default: the current directory]",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="Print JSON")


def _doctor(arguments: argparse.Namespace) -> int:
    # Imported here: a daemon that starts needs nothing of it.
    from fscache.doctor import doctor

    return doctor(arguments.work_dir, as_json=arguments.json)


def _add_erofs(parser: CommandParser) -> None:
    parser.set_defaults(parser=parser, check=_check_erofs, options=_erofs_options)
    parser.add_argument(
        "-B", "--bootstrap", type=Path, required=True, metavar="<bootstrap>",
        help="File path of RAFS filesystem metadata",
    )  # fmt: skip
    _add_transport(parser)
    parser.add_argument(
        "--directio", action="store_true", help="Read cached data past the page cache"
    )


# Flags of the original that are taken, with the reason why they change nothing here.
_WITHOUT_EFFECT = {
    "--failover-policy": "the kernel has no requests to resend",
    "--fuse-threads": "threads are not counted by mount",
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
    parser.add_argument(
        "--prefetch-files", type=Path, metavar="<prefetch-files>",
        help="List of files and directories to prefetch, one a line, in place of the bootstrap's",
    )  # fmt: skip
    parser.add_argument(
        "-m", "--virtual-mountpoint", type=virtual_path, default=ROOT,
        metavar="<virtual-mountpoint>",
        help="Path below the mount point for the bootstrap or the directory [default: /]",
    )  # fmt: skip
    parser.add_argument(
        "--writable", action="store_true",
        help="Write to the directory, or over the image as its configuration's overlay says",
    )  # fmt: skip
    _add_transport(parser)
    add_names(parser)
    parser.add_argument(
        "--upgrade", action="store_true",
        help="Wait until the API says to take over from the daemon that serves this mount point",
    )  # fmt: skip
    for name, reason in _WITHOUT_EFFECT.items():
        aliases = (name, "--thread-num") if name == "--fuse-threads" else (name,)
        parser.add_argument(
            *aliases, dest="ignored" + name, metavar="<value>", help=f"No effect: {reason}"
        )


def _check_erofs(arguments: argparse.Namespace) -> None:
    """Refuse words that do not go together, with status 2, before anything is done."""
    parser: CommandParser = arguments.parser
    if arguments.config is not None and arguments.localfs_dir is not None:
        conflict(parser, "config", "localfs-dir")
    if arguments.bootstrap is not None and not (arguments.config or arguments.localfs_dir):
        missing(parser, "--config <config> or --localfs-dir <localfs-dir>")


def _check_fuse(arguments: argparse.Namespace) -> None:
    _check_erofs(arguments)
    check_names(arguments)
    if arguments.bootstrap is not None and arguments.shared_dir is not None:
        conflict(arguments.parser, "bootstrap", "shared-dir")
    if arguments.prefetch_files is not None and arguments.bootstrap is None:
        missing(arguments.parser, "--bootstrap <bootstrap>")


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
        environment=os.environ,
        transport=Transport(arguments.transport),
        directio=arguments.directio,
        holder=True,
        # Nobody else looks after it.
        restart=(sys.executable, "-I", "-m", "fscache", *arguments.words),
    )


def _fuse_options(arguments: argparse.Namespace) -> NodeOptions:
    config = _config(arguments)
    for name, reason in _WITHOUT_EFFECT.items():
        if getattr(arguments, "ignored" + name) is not None:
            logger.info("%s has no effect: %s", name, reason)
    if config is not None and arguments.prefetch_files is not None:
        config = replace(config, prefetch_files=read_prefetch_file(arguments.prefetch_files))
    if arguments.writable and arguments.bootstrap and config and config.overlay is None:
        raise ConfigError("overlay: missing, --writable needs its upper_dir and work_dir")
    return NodeOptions(
        arguments.mountpoint,
        bootstrap=arguments.bootstrap,
        config=config,
        shared_dir=arguments.shared_dir,
        virtual=arguments.virtual_mountpoint,
        writable=arguments.writable,
        id=arguments.id,
        supervisor=_supervisor(arguments),
        environment=os.environ,
        transport=Transport(arguments.transport),
        holder=True,
        exit_leaves=True,
    )


def _supervisor(arguments: argparse.Namespace) -> str | None:
    return str(arguments.supervisor) if arguments.supervisor is not None else None


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


def _end_on_signals(daemon: NodeDaemon | SingletonDaemon | NbdDaemon) -> None:
    """Ask for an orderly end on SIGINT and SIGTERM, also when one comes again.

    On SIGHUP too, the end of a terminal, unless it is ignored or opens the log file anew.
    Only a fetch before the mount is broken off: an exception between a mount and its
    entry in the list of what has to be closed would leave readers alone.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if daemon.interruptible:
            raise KeyboardInterrupt
        daemon.request_stop()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, end)


def _serve(arguments: argparse.Namespace) -> int:
    manager = Notifier.from_environment(os.environ)
    if arguments.command == "singleton":
        # Looked at before the API server replaces the socket.
        waits = waits_for_take_over(arguments)
        singleton = SingletonDaemon(singleton_options(arguments))
        return _run(singleton, arguments, manager, waits=waits)
    if arguments.command == "nbd":
        # Imported here: few daemons are this one.
        from fscache.nbd.daemon import NbdDaemon

        return _run(NbdDaemon(nbd_options(arguments)), arguments, manager)
    progress = ProgressLine("fetched")
    options: NodeOptions = arguments.options(arguments)
    if manager.present:
        # It restarts what was killed: the holder does not have to.
        options = replace(options, restart=())
    daemon = NodeDaemon(replace(options, progress=progress.show))
    # Looked at before the API server replaces the socket.
    waits = options.exit_leaves and (arguments.upgrade or _predecessor_crashed(arguments))
    with ExitStack() as stack:
        if arguments.prometheus is not None:
            from fscache.metricsserver import MetricsServer

            stack.callback(MetricsServer(arguments.prometheus, daemon).close)
        return _run(daemon, arguments, manager, waits=waits, progress=progress)


def _run(
    daemon: NodeDaemon | SingletonDaemon | NbdDaemon,
    arguments: argparse.Namespace,
    manager: Notifier,
    *,
    waits: bool = False,
    progress: ProgressLine | None = None,
) -> int:
    _end_on_signals(daemon)
    logging.getLogger("fscache").addHandler(daemon.events)
    with ExitStack() as stack:
        # Until the very end: the users of mounts are waited for.
        stack.enter_context(Watchdog(manager, lambda: daemon.trouble, lambda: daemon.summary))
        if arguments.apisock is not None:
            # Imported here: it takes a fifth of the time of a start.
            from fscache.api import ApiServer

            stack.callback(ApiServer(arguments.apisock, daemon).close)
        stack.callback(daemon.stop)
        if waits:
            logger.info("waiting for a client to say that the mounts are to be taken over")
        else:
            try:
                daemon.start()
            finally:
                if progress is not None:
                    progress.end()
        manager.ready(daemon.summary)
        daemon.wait()
        manager.stopping("unmounting; users of mounts are waited for")
    return 0


def _predecessor_crashed(arguments: argparse.Namespace) -> bool:
    """Whether a client that keeps state has started a successor (spec tools 9).

    It starts the same command line again: the socket refuses, and the mounts are there.
    """
    if arguments.supervisor is None or arguments.apisock is None:
        return False
    from fscache.unixsocket import is_stale

    return is_stale(arguments.apisock) and mounted_at(arguments.mountpoint) is not None


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
    words = _with_command(list(sys.argv[1:] if argv is None else argv))
    arguments = parser.parse_args(words)
    arguments.words = words
    if arguments.version:
        print_version("nydusd")
        return 0
    if arguments.command is None:
        parser.error(f"a command is required: {', '.join(_COMMANDS)}")
    arguments.check(arguments)
    try:
        if arguments.command == "doctor":
            return _doctor(arguments)
        rotate_bytes = arguments.log_rotation_size << 20
        set_up_daemon_log(arguments.log_level, arguments.log_file, rotate_bytes)
        _set_open_files(arguments.rlimit_nofile)
        bound_arenas()
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
