"""The command line of `nydusd`: words to options, signals to an orderly end, errors to one line."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from erofs.console import LOG_LEVELS, CommandParser, ProgressLine
from erofs.errors import NydusError
from erofs.memory import bound_arenas
from erofs.version import print_version
from fscache.api.server import ApiServer
from fscache.cli.image import (
    add_filesystem,
    add_ignored,
    add_transport,
    check_filesystem,
    check_source,
    daemon_config,
    filesystem_options,
    tell_ignored,
)
from fscache.cli.words import (
    add_names,
    address,
    conflict,
    failover_policy,
    files,
    megabytes,
    missing,
    takes_value,
    threads,
)
from fscache.config import ConfigError
from fscache.daemonlog import set_up_daemon_log
from fscache.entry import NodeOptions
from fscache.systemd import Notifier, Watchdog
from fscache.transport import Transport

if TYPE_CHECKING:
    from fscache.nbd.daemon import NbdDaemon
    from fscache.node import NodeDaemon
    from fscache.singleton import SingletonDaemon

__all__ = ["main"]

logger = logging.getLogger(__name__)

_AddWords = Callable[[CommandParser], None]

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
DEFAULT_OPEN_FILES = 1_000_000


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
        "--rlimit-nofile", type=files, default=DEFAULT_OPEN_FILES, metavar="<rlimit-nofile>",
        help="Limit of open files, 0 leaves it as it is [default: 1000000]",
    )  # fmt: skip
    common.add_argument(
        "-C", "--config", type=Path, metavar="<config>",
        help="Configuration file: JSON of version 1, JSON or TOML of version 2",
    )  # fmt: skip
    return common


def _serving() -> CommandParser:
    """Options of daemons that mount something."""
    common = CommandParser(add_help=False, parents=[_process()])
    common.add_argument(
        "--prometheus", type=address, metavar="<prometheus>",
        help="Serve metrics to Prometheus at [ADDRESS:]PORT, without an address on loopback only",
    )  # fmt: skip
    common.add_argument(
        "-D", "--localfs-dir", type=Path, metavar="<localfs-dir>",
        help="Directory with the blobs, which also holds the cache",
    )  # fmt: skip
    return common


def _common() -> CommandParser:
    """Options of daemons that mount something where they are told to."""
    common = CommandParser(add_help=False, parents=[_serving()])
    common.add_argument(
        "-M", "--mountpoint", type=Path, required=True, metavar="<mountpoint>",
        help="Existing directory to mount at",
    )  # fmt: skip
    return common


def _parser(chosen: str | None) -> CommandParser:
    """Know the chosen sub-command, or the names of all: what is not needed takes time to make."""
    parser = CommandParser(
        prog="nydusd",
        description="Serve container images to the kernel's EROFS, fetching what is read",
        epilog="Without a command it is fuse: nydusd --mountpoint <mountpoint> ...",
    )
    parser.add_argument("-V", "--version", action="store_true", help="Print version")
    commands = parser.add_subparsers(title="Commands", dest="command", metavar="<COMMAND>")
    if chosen is None:
        for name, (summary, *_) in _COMMANDS.items():
            commands.add_parser(name, help=summary)
        return parser
    summary, description, shared, add = _COMMANDS[chosen]
    parents = [shared()] if shared is not None else []
    add(commands.add_parser(chosen, parents=parents, help=summary, description=description))
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
    from fscache.doctor.report import doctor

    return doctor(arguments.work_dir, as_json=arguments.json)


def _add_erofs(parser: CommandParser) -> None:
    parser.set_defaults(parser=parser, check=_check_one, options=_erofs_options)
    parser.add_argument(
        "-B", "--bootstrap", type=Path, metavar="<bootstrap>",
        help="File path of RAFS filesystem metadata",
    )  # fmt: skip
    parser.add_argument(
        "--image", metavar="<reference>",
        help="Image of a registry to mount, in place of bootstrap and configuration",
    )  # fmt: skip
    add_transport(parser)
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
    parser.set_defaults(parser=parser, check=check_filesystem, options=_fuse_options)
    add_filesystem(parser)
    parser.add_argument(
        "--writable", action="store_true",
        help="Write to the directory, or over the image as its configuration's overlay says",
    )  # fmt: skip
    add_transport(parser)
    add_names(parser)
    parser.add_argument(
        "--upgrade", action="store_true",
        help="Wait until the API says to take over from the daemon that serves this mount point",
    )  # fmt: skip
    policy, count, database = _WITHOUT_EFFECT.items()
    add_ignored(parser, *policy, check=failover_policy)
    add_ignored(parser, *count, "--thread-num", check=threads)
    add_ignored(parser, *database)


def _check_one(arguments: argparse.Namespace) -> None:
    check_source(arguments)
    if arguments.image is None and arguments.bootstrap is None:
        missing(arguments.parser, "--bootstrap <bootstrap> or --image <reference>")
    for name in ("bootstrap", "config", "localfs_dir") if arguments.image is not None else ():
        if getattr(arguments, name) is not None:
            conflict(arguments.parser, "image", name.replace("_", "-"))


def _mount_image(arguments: argparse.Namespace) -> NoReturn:
    """Become the program that knows images; it starts this one again (docs/nydusify.md)."""
    work = os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108 - where the cache may be large
    words = ["mount", "--target", arguments.image, "--mount-path", str(arguments.mountpoint)]
    words += ["--work-dir", work]
    # Images are the builder's, on which the daemon does not stand.
    program = [sys.executable, "-m", "builder.nydusify", *words]
    sys.stdout.flush()
    os.execv(program[0], program)  # noqa: S606 - our own program


def _erofs_options(arguments: argparse.Namespace) -> NodeOptions:
    config = daemon_config(arguments)
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
    tell_ignored(arguments, _WITHOUT_EFFECT)
    options = filesystem_options(arguments, arguments.mountpoint)
    config = options.config
    if arguments.writable and options.bootstrap and config and config.overlay is None:
        raise ConfigError("overlay: missing, --writable needs its upper_dir and work_dir")
    return options._replace(writable=arguments.writable, holder=True, exit_leaves=True)


def _set_open_files(wanted: int) -> None:
    """Set the limit of open files: each waiting read holds one."""
    if not wanted:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
    except (ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        logger.warning(
            "the limit of open files is %d, not %d: more takes CAP_SYS_RESOURCE"
            " (--rlimit-nofile 0 leaves it as it is)",
            hard,
            wanted,
        )


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
    with ExitStack() as stack:
        # A start makes objects that stay: to look for garbage among them is a tenth of its time.
        gc.disable()
        stack.callback(gc.enable)
        if arguments.command == "singleton":
            # Imported here, as `nbd`: few daemons are this one.
            from fscache.cli.singleton import singleton_options, waits_for_take_over
            from fscache.singleton import SingletonDaemon

            # Looked at before the API server replaces the socket.
            waits = waits_for_take_over(arguments)
            singleton = SingletonDaemon(singleton_options(arguments))
            return _run(singleton, manager, _listen(arguments, stack), waits=waits)
        if arguments.command == "nbd":
            from fscache.cli.nbd import nbd_options
            from fscache.nbd.daemon import NbdDaemon

            nbd = NbdDaemon(nbd_options(arguments))
            return _run(nbd, manager, _listen(arguments, stack))
        return _serve_node(arguments, manager, stack)


def _serve_node(arguments: argparse.Namespace, manager: Notifier, stack: ExitStack) -> int:
    progress = ProgressLine("fetched")
    options: NodeOptions = arguments.options(arguments)
    if manager.present:
        # It restarts what was killed: the holder does not have to.
        options = options._replace(restart=())
    options = options._replace(progress=progress.show)
    # Looked at before the API server replaces the socket.
    waits = options.exit_leaves and (arguments.upgrade or _predecessor_crashed(arguments))
    # Before all else is loaded, which takes longer than a client waits before its second look.
    api = _listen(arguments, stack)
    daemon = _node(options, arguments)
    if arguments.prometheus is not None:
        from fscache.api.metricsserver import MetricsServer

        stack.callback(MetricsServer(arguments.prometheus, daemon).close)
    return _run(daemon, manager, api, waits=waits, progress=progress)


def _listen(arguments: argparse.Namespace, stack: ExitStack) -> ApiServer | None:
    if arguments.apisock is None:
        return None
    api = ApiServer(arguments.apisock)
    stack.callback(api.close)
    return api


def _node(options: NodeOptions, arguments: argparse.Namespace) -> NodeDaemon:
    if arguments.command != "virtiofs":
        from fscache.node import NodeDaemon

        return NodeDaemon(options)
    # Imported here: few daemons are this one.
    from fscache.virtiofs import VirtiofsDaemon, enter_private_tree

    enter_private_tree(options.mountpoint)
    return VirtiofsDaemon(options, arguments.sock)


def _run(
    daemon: NodeDaemon | SingletonDaemon | NbdDaemon,
    manager: Notifier,
    api: ApiServer | None,
    *,
    waits: bool = False,
    progress: ProgressLine | None = None,
) -> int:
    """Serve until the end; the API is the caller's, who closes it last."""
    _end_on_signals(daemon)
    logging.getLogger("fscache").addHandler(daemon.events)
    with ExitStack() as stack:
        # Until the very end: the users of mounts are waited for.
        stack.enter_context(Watchdog(manager, lambda: daemon.trouble, lambda: daemon.summary))
        if api is not None:
            api.serve(daemon, starts=not waits)
        stack.callback(daemon.stop)
        if waits:
            logger.info("waiting for a client to say that the mounts are to be taken over")
        else:
            try:
                daemon.start()
            finally:
                if progress is not None:
                    progress.end()
        if api is not None:
            api.started()
        gc.freeze()
        gc.enable()
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
    from fscache.mounts.place import mounted_at
    from fscache.unixsocket import is_stale

    return is_stale(arguments.apisock) and mounted_at(arguments.mountpoint) is not None


def _add_virtiofs(parser: CommandParser) -> None:
    from fscache.cli.virtiofs import add_virtiofs

    add_virtiofs(parser)


def _add_singleton(parser: CommandParser) -> None:
    from fscache.cli.singleton import add_singleton

    add_singleton(parser)


def _add_nbd(parser: CommandParser) -> None:
    from fscache.cli.nbd import add_nbd

    add_nbd(parser)


# Of each sub-command what it does, in short and at length, the options that it shares with
# others, and what adds its own.
_COMMANDS: dict[str, tuple[str, str, Callable[[], CommandParser] | None, _AddWords]] = {
    "erofs": (
        "mount one image through the kernel's EROFS",
        "Mount one image through the kernel's EROFS and serve it until told to"
        " stop (SIGINT, SIGTERM, or PUT /api/v1/daemon/exit)",
        _common,
        _add_erofs,
    ),
    "fuse": (
        "serve images below one mount point, as clients ask",
        "Serve images below one mount point. The name is the original's: what is"
        " mounted is the kernel's EROFS",
        _common,
        _add_fuse,
    ),
    "virtiofs": (
        "serve images to one virtual machine",
        "Serve images and directories to a virtual machine, which mounts them by"
        " virtio-fs: one private tree, exported by the system's virtiofsd",
        _serving,
        _add_virtiofs,
    ),
    "singleton": (
        "serve the kernel's cachefiles, mount nothing",
        "Serve the API, and to the kernel's cachefiles what clients register",
        _process,
        _add_singleton,
    ),
    "nbd": (
        "serve one image as a block device, no mount",
        "Serve one image as a raw disk, that of `nydus-image export --block`: as a"
        " block device of the kernel's NBD, or at a socket",
        _process,
        _add_nbd,
    ),
    "doctor": (
        "tell what this machine can do, and what would enable more",
        "Try what this kernel, privilege and file system allow, and print a table."
        " Exit status 0: images can be read lazily; 1: they cannot",
        None,
        _add_doctor,
    ),
}


def _with_command(words: list[str]) -> list[str]:
    """Put the sub-command first: without one the program is `fuse`, as the original."""
    if words[:1] == ["help"]:
        return [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help", "-V", "--version") or not words[0].startswith("-"):
        return words
    for number, word in enumerate(words):
        if word in _COMMANDS and not takes_value(words[number - 1]):
            return [word, *words[:number], *words[number + 1 :]]
    return ["fuse", *words]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    words = _with_command(list(sys.argv[1:] if argv is None else argv))
    parser = _parser(words[0] if words and words[0] in _COMMANDS else None)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        getattr(arguments, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
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
        if getattr(arguments, "image", None) is not None:
            _mount_image(arguments)
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
