"""Words of the command line of `nydusd` that several sub-commands share, and their checks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

from erofs.console import CommandParser
from erofs.errors import NydusError
from fscache.mounts.treepath import split
from fscache.tcpaddress import parse_address

__all__ = [
    "add_names",
    "address",
    "check_names",
    "conflict",
    "failover_policy",
    "files",
    "megabytes",
    "missing",
    "takes_value",
    "threads",
    "virtual_path",
]


# Options without a value, of all sub-commands.
_SWITCHES = frozenset({
    "--announce-submounts", "--directio", "--eager", "--help", "--hybrid-mode", "--json",
    "--upgrade", "--version", "--writable", "-V", "-h",
})  # fmt: skip
_FAILOVER_POLICIES = ("none", "resend", "flush")
# More are no number that the kernel takes, nor `int`.
_DIGITS = 16


def megabytes(text: str) -> int:
    """Return a number of MB; raise `ArgumentTypeError`."""
    return _number(text, "a number of MB")


def files(text: str) -> int:
    """Return a number of open files; raise `ArgumentTypeError`."""
    return _number(text, "a number of files")


def _number(text: str, what: str) -> int:
    if not (text.isdecimal() and len(text) < _DIGITS):
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return int(text)


def failover_policy(text: str) -> str:
    """Return one of the original's words; raise `ArgumentTypeError`."""
    if text not in _FAILOVER_POLICIES:
        words = ", ".join(_FAILOVER_POLICIES)
        raise argparse.ArgumentTypeError(f"expected one of {words}, got {text!r}")
    return text


def threads(text: str) -> int:
    """Return a number of threads; raise `ArgumentTypeError`."""
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 1024, got {text!r}")
    return int(text)


def address(text: str) -> tuple[str, int]:
    """Return host and port; raise `ArgumentTypeError`."""
    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def virtual_path(text: str) -> str:
    """Return a path below the mount point in its plain form; raise `ArgumentTypeError`."""
    try:
        return "/" + "/".join(map(os.fsdecode, split(text)))
    except NydusError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def takes_value(option: str) -> bool:
    """Return whether the word behind this one is its value, for an option of any sub-command."""
    if option.startswith("--"):
        return "=" not in option and option not in _SWITCHES
    # A short one has its value with it, or behind it.
    return option.startswith("-") and len(option) == 2 and option not in _SWITCHES


def conflict(parser: CommandParser, one: str, other: str) -> NoReturn:
    """End with status 2: two options cannot be used together."""
    parser.error(f"the argument '--{one} <{one}>' cannot be used with '--{other} <{other}>'")


def missing(parser: CommandParser, what: str) -> NoReturn:
    """End with status 2: an option needs another one."""
    parser.error(f"the following required arguments were not provided:\n  {what}")


def add_names(parser: CommandParser) -> None:
    """Add the names that clients with a supervisor give a daemon."""
    parser.add_argument("--id", metavar="<id>", help="Name of the instance")
    parser.add_argument(
        "--supervisor", type=Path, metavar="<supervisor>",
        help="Socket of a client that keeps state for a successor",
    )  # fmt: skip


def check_names(arguments: argparse.Namespace) -> None:
    """End with status 2 when only one of the names is given, or nobody could say to go on."""
    if arguments.id is not None and arguments.supervisor is None:
        missing(arguments.parser, "--supervisor <supervisor>")
    if arguments.supervisor is not None and arguments.id is None:
        missing(arguments.parser, "--id <id>")
    if getattr(arguments, "upgrade", False) and arguments.apisock is None:
        missing(arguments.parser, "--apisock <apisock>")
