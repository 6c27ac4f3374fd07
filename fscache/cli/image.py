"""Words of the command line of `nydusd` that name an image, a directory, and how they get there."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path

from erofs.console import CommandParser
from fscache.backend import LocalFsConfig
from fscache.cli.words import check_names, conflict, missing, virtual_path
from fscache.config import ConfigError, DaemonConfig, load_config
from fscache.entry import NodeOptions
from fscache.environment import with_environment
from fscache.mounting import ROOT
from fscache.transport import Transport

__all__ = [
    "add_filesystem",
    "add_ignored",
    "add_transport",
    "check_filesystem",
    "check_source",
    "daemon_config",
    "filesystem_options",
    "tell_ignored",
]

logger = logging.getLogger(__name__)


def add_transport(parser: CommandParser) -> None:
    """Add how images get to the kernel."""
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--transport", choices=[str(way) for way in Transport], default=Transport.AUTO,
        metavar="<transport>",
        help="How images get to the kernel: fanotify (EROFS, lazily; root, Linux 6.14), cachefiles"
        " (EROFS, lazily, from the kernel's cache; root, Linux 5.19 to 7.1), nbd (EROFS, lazily,"
        " from a block device; root, Linux 6.4), fuse (lazily, for every user), eager (EROFS,"
        " complete files first), auto (the first of fanotify, cachefiles, nbd, fuse that works)"
        " [default: auto]",
    )  # fmt: skip
    ways.add_argument(
        "--eager", dest="transport", action="store_const", const=Transport.EAGER,
        default=Transport.AUTO, help="Short for --transport eager",
    )  # fmt: skip


def add_filesystem(parser: CommandParser) -> None:
    """Add what is served first, which `fuse` and `virtiofs` say alike (spec tools 3.2)."""
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


def add_ignored(
    parser: CommandParser,
    name: str,
    reason: str,
    *aliases: str,
    check: Callable[[str], object] = str,
) -> None:
    """Add an option with a value that is checked and changes nothing, for a reason."""
    parser.add_argument(
        name, *aliases, dest="ignored" + name, type=check, metavar="<value>",
        help=f"No effect: {reason}",
    )  # fmt: skip


def tell_ignored(arguments: argparse.Namespace, names: dict[str, str]) -> None:
    """Log which of these options were given, and why they change nothing."""
    for name, reason in names.items():
        if getattr(arguments, "ignored" + name):
            logger.info("%s has no effect: %s", name, reason)


def check_source(arguments: argparse.Namespace) -> None:
    """End with status 2 when it is not clear where the blobs of a bootstrap are."""
    parser: CommandParser = arguments.parser
    if arguments.config is not None and arguments.localfs_dir is not None:
        conflict(parser, "config", "localfs-dir")
    if arguments.bootstrap is not None and not (arguments.config or arguments.localfs_dir):
        missing(parser, "--config <config> or --localfs-dir <localfs-dir>")


def check_filesystem(arguments: argparse.Namespace) -> None:
    """End with status 2 for words of `add_filesystem` that do not go together."""
    check_source(arguments)
    check_names(arguments)
    if arguments.bootstrap is not None and arguments.shared_dir is not None:
        conflict(arguments.parser, "bootstrap", "shared-dir")
    if arguments.prefetch_files is not None and arguments.bootstrap is None:
        missing(arguments.parser, "--bootstrap <bootstrap>")


def daemon_config(arguments: argparse.Namespace) -> DaemonConfig | None:
    """Read the configuration that is named, if any; raise `ConfigError`."""
    if arguments.localfs_dir is not None:
        directory = arguments.localfs_dir
        if not directory.is_dir():
            raise ConfigError("not a directory", path=directory)
        return DaemonConfig(LocalFsConfig(dir=directory), directory)
    if arguments.config is None:
        return None
    config = load_config(arguments.config)
    return config._replace(backend=with_environment(config.backend, os.environ))


def filesystem_options(arguments: argparse.Namespace, mountpoint: Path) -> NodeOptions:
    """Return what is served first and how; raise `ConfigError`."""
    config = daemon_config(arguments)
    if config is not None and arguments.prefetch_files is not None:
        # Imported here, as few daemons have one.
        from fscache.fetch.prefetchlist import read_prefetch_file

        config = config._replace(prefetch_files=read_prefetch_file(arguments.prefetch_files))
    return NodeOptions(
        mountpoint,
        bootstrap=arguments.bootstrap,
        config=config,
        shared_dir=arguments.shared_dir,
        virtual=arguments.virtual_mountpoint,
        id=arguments.id,
        supervisor=str(arguments.supervisor) if arguments.supervisor is not None else None,
        environment=os.environ,
        transport=Transport(arguments.transport),
    )
