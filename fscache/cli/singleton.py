"""The words of `nydusd singleton`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from erofs.console import CommandParser
from fscache.blobentry import parse_blob_list
from fscache.cli.words import add_names, check_names, missing, threads
from fscache.config import load
from fscache.singleton import SingletonOptions

__all__ = ["add_singleton", "singleton_options", "waits_for_take_over"]


def add_singleton(parser: CommandParser) -> None:
    """Add the options, and the check of those that go together."""
    parser.set_defaults(parser=parser, check=_check)
    parser.add_argument(
        "-F", "--fscache", type=Path, metavar="<fscache>",
        help="Directory of the kernel's cachefiles",
    )  # fmt: skip
    parser.add_argument(
        "--fscache-tag", metavar="<fscache-tag>", help="Tag of the cache; needs --fscache"
    )
    parser.add_argument(
        "--fscache-threads", type=threads, default=4, metavar="<fscache-threads>",
        help="Threads that answer the kernel [default: 4]",
    )  # fmt: skip
    add_names(parser)
    parser.add_argument(
        "--upgrade", action="store_true",
        help="Wait until the API says to take over from the daemon that serves this directory",
    )  # fmt: skip


def _check(arguments: argparse.Namespace) -> None:
    check_names(arguments)
    if arguments.fscache_tag is not None and arguments.fscache is None:
        missing(arguments.parser, "--fscache <fscache>")


def singleton_options(arguments: argparse.Namespace) -> SingletonOptions:
    """Read the configuration, `{"blobs": […]}`; raise `ConfigError`."""
    config: Path | None = arguments.config
    return SingletonOptions(
        id=arguments.id,
        supervisor=str(arguments.supervisor) if arguments.supervisor is not None else None,
        blobs=load(config, parse_blob_list) if config is not None else (),
        fscache=arguments.fscache,
        tag=arguments.fscache_tag,
        threads=arguments.fscache_threads,
        environment=os.environ,
    )


def waits_for_take_over(arguments: argparse.Namespace) -> bool:
    """Whether a client wants to say when to begin: by a word, or because a predecessor crashed.

    It starts the same command line again then (spec tools 9): the API socket refuses, and the
    device is kept by somebody.
    """
    if arguments.fscache is None:
        return False
    if arguments.upgrade:
        return True
    if arguments.supervisor is None or arguments.apisock is None:
        return False
    # Imported here, as nobody else needs them.
    from fscache.cachefiles.device import is_kept
    from fscache.unixsocket import is_stale

    return is_stale(arguments.apisock) and is_kept()
