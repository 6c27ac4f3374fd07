"""The words of `nydusd nbd`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from erofs.console import CommandParser
from fscache.backend import LocalFsConfig
from fscache.cli.words import add_names, check_names, conflict, missing, threads
from fscache.config import ConfigError, DaemonConfig, load
from fscache.environment import with_environment

if TYPE_CHECKING:
    from fscache.nbd.daemon import NbdOptions

__all__ = ["add_nbd", "nbd_options"]


def add_nbd(parser: CommandParser) -> None:
    """Add the options, and the check of those that go together."""
    parser.set_defaults(parser=parser, check=_check)
    parser.add_argument(
        "device", nargs="?", type=Path, metavar="DEVICE",
        help="NBD device to attach the image to, as /dev/nbd0",
    )  # fmt: skip
    parser.add_argument(
        "--socket", type=Path, metavar="<socket>",
        help="Serve at a unix socket, for QEMU and other clients; needs no kernel module",
    )  # fmt: skip
    parser.add_argument(
        "-B", "--bootstrap", type=Path, metavar="<bootstrap>",
        help="File path of RAFS filesystem metadata; needs --localfs-dir",
    )  # fmt: skip
    parser.add_argument(
        "-D", "--localfs-dir", type=Path, metavar="<localfs-dir>",
        help="Directory with the blobs, which also holds the cache",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=threads, default=4, metavar="<threads>",
        help="Threads that serve requests, and connections of the device [default: 4]",
    )  # fmt: skip
    add_names(parser)


def _check(arguments: argparse.Namespace) -> None:
    """End with status 2 for words that do not go together."""
    parser: CommandParser = arguments.parser
    check_names(arguments)
    if arguments.device is None and arguments.socket is None:
        missing(parser, "<DEVICE> or --socket <socket>")
    for name in ("bootstrap", "localfs_dir"):
        if arguments.config is not None and getattr(arguments, name) is not None:
            conflict(parser, "config", name.replace("_", "-"))
    if arguments.bootstrap is not None and arguments.localfs_dir is None:
        missing(parser, "--localfs-dir <localfs-dir>")
    if arguments.localfs_dir is not None and arguments.bootstrap is None:
        missing(parser, "--bootstrap <bootstrap>")


def nbd_options(arguments: argparse.Namespace) -> NbdOptions:
    """Read what is named; raise `ConfigError`."""
    # Imported here: these words are known to every daemon, and few are this one.
    from fscache.blobentry import parse_blob_entry
    from fscache.nbd.daemon import NbdOptions

    if arguments.config is not None:
        entry = load(arguments.config, parse_blob_entry)
        if entry.metadata_path is None:
            raise ConfigError("metadata_path: missing", path=arguments.config)
        bootstrap, config, name = entry.metadata_path, entry.config, entry.id or None
        config = config._replace(backend=with_environment(config.backend, os.environ))
    elif arguments.bootstrap is not None:
        directory = arguments.localfs_dir
        if not directory.is_dir():
            raise ConfigError("not a directory", path=directory)
        bootstrap, name = arguments.bootstrap, None
        config = DaemonConfig(LocalFsConfig(dir=directory), directory)
    else:
        raise ConfigError("both option `-C/--config` and `-B/--bootstrap` are missing")
    return NbdOptions(
        bootstrap,
        config,
        device=arguments.device,
        socket=arguments.socket,
        threads=arguments.threads,
        id=arguments.id or name,
        supervisor=str(arguments.supervisor) if arguments.supervisor is not None else None,
    )
