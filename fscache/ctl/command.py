"""The command line of `nydusctl`, a client of nydusd's API (tools sections 7 and 12).

Here are the options, the requests and the exit statuses; `fscache.ctl.client` sends and
`fscache.ctl.text` makes what is printed. Nothing of the daemon is imported.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from erofs.console import CommandParser
from erofs.errors import NydusError
from erofs.version import VERSION
from fscache.ctl.client import BODY_LIMIT, ApiClient, CtlError
from fscache.ctl.listing import prefetch_list, write_list
from fscache.ctl.text import (
    backend_rates_text,
    backend_text,
    cache_text,
    fsstats_text,
    info_text,
    is_set,
    raw_text,
)

__all__ = ["main"]

INTERVAL_LIMIT = (1 << 32) - 1
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT

KINDS = {"log-level": "log_level"}
MOUNT_TYPES = ("rafs", "passthrough_fs")
METRICS: dict[str, tuple[str, Callable[[object], str]]] = {
    "backend": ("/api/v1/metrics/backend", backend_text),
    "cache": ("/api/v1/metrics/blobcache", cache_text),
    "fsstats": ("/api/v1/metrics", fsstats_text),
}


class _Parser(CommandParser):
    """A parser that names what is wrong in the words of the original."""

    def require(self, arguments: argparse.Namespace, **shown: str) -> None:
        """Leave with status 2 unless every named argument was given."""
        missing = [text for name, text in shown.items() if getattr(arguments, name) is None]
        if missing:
            lines = "".join(f"\n  {text}" for text in missing)
            self.error(f"the following required arguments were not provided:{lines}")

    def choose(self, value: str, shown: str, possible: Sequence[str]) -> None:
        """Leave with status 2 unless the value is a possible one."""
        if value not in possible:
            self._leave(value, shown, f"\n  [possible values: {', '.join(possible)}]")

    def seconds(self, value: str, shown: str) -> int:
        """Return a whole number of seconds, at least 1, or leave with status 2."""
        plain = value.isascii() and value.isdecimal() and len(value) <= 10
        if not plain or not 1 <= int(value) <= INTERVAL_LIMIT:
            self._leave(value, shown, f": not 1 to {INTERVAL_LIMIT} seconds")
        return int(value)

    def _leave(self, value: str, shown: str, why: str) -> NoReturn:
        self.exit(
            2,
            f"error: invalid value '{value}' for '{shown}'{why}\n\n"
            "For more information, try '--help'.\n",
        )


def _parser() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    common = _Parser(add_help=False)
    common.add_argument(
        "-r", "--raw", action="store_true", default=argparse.SUPPRESS,
        help="Outputs messages in plain json mode",
    )  # fmt: skip
    parser = _Parser(
        prog="nydusctl", usage="nydusctl [OPTIONS] --sock <sock> [COMMAND]", parents=[common],
        description="Control and look at a running nydusd",
    )  # fmt: skip
    parser.add_argument(
        "-S", "--sock", metavar="<sock>", help="Sets file path for the nydusd API socket"
    )
    parser.add_argument(
        "-V", "--version", action="version", version=f"nydusctl {VERSION}",
        help="Print version",
    )  # fmt: skip
    commands = parser.add_subparsers(title="Commands", dest="command", metavar="<COMMAND>")
    _add_commands(commands, common)
    asking = commands.add_parser(
        "help", help="Print this message or the help of the given subcommand(s)",
        usage="nydusctl help [COMMAND]",
    )  # fmt: skip
    asking.add_argument("topic", nargs="?", choices=list(commands.choices), metavar="<COMMAND>")
    return parser, dict(commands.choices)


def _add_commands(commands: argparse._SubParsersAction[_Parser], common: _Parser) -> None:
    def add(name: str, about: str, usage: str, epilog: str | None = None) -> _Parser:
        added = commands.add_parser(
            name, help=about, description=about, usage=f"nydusctl --sock <sock> {usage}",
            parents=[common], epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        added.set_defaults(parser=added)
        return added

    add("info", "Gets information about the nydusd daemon", "info [OPTIONS]")
    setting = add(
        "set", "Configures parameters for the nydusd daemon", "set [OPTIONS] <KIND> <VALUE>",
        "Configurable parameters:\n"
        "         <KIND>  : <VALUE>\n"
        "        log-level: trace, debug, info, warn, error",
    )  # fmt: skip
    setting.add_argument("kind", nargs="?", metavar="<KIND>", help="the parameter to configure")
    setting.add_argument("value", nargs="?", metavar="<VALUE>", help="the configuration value")
    _add_metrics(add(
        "metrics", "Gets runtime metrics about backend, cache and filesystems",
        "metrics [OPTIONS] <category>",
    ))  # fmt: skip
    _add_prefetch_list(add(
        "prefetch-list", "Prints the files that were read, in the order of first access",
        "prefetch-list [OPTIONS]",
        "The daemon has to serve with access_pattern. The list is one for 'nydusd fuse\n"
        "--prefetch-files' and for the standard input of 'nydus-image create\n"
        "--prefetch-policy fs'.",
    ))  # fmt: skip
    _add_mount(add(
        "mount", "Mounts a new filesystem instance",
        "mount [OPTIONS] --source <source> --config <config> --mountpoint <mountpoint>"
        " --type <type>",
    ))  # fmt: skip
    umount = add("umount", "Umounts a filesystem instance", "umount [OPTIONS] -m <mountpoint>")
    umount.add_argument(
        "-m", "--mountpoint", metavar="<mountpoint>", help="Mountpoint of the filesystem instance"
    )


def _add_metrics(parser: _Parser) -> None:
    parser.add_argument(
        "category", nargs="?", metavar="<category>",
        help=f"the metrics category to fetch [possible values: {', '.join(METRICS)}]",
    )  # fmt: skip
    parser.add_argument(
        "-I", "--interval", metavar="<interval>",
        help="interval to refresh the metrics, in seconds; backend prints rates",
    )  # fmt: skip
    parser.add_argument(
        "--id", metavar="<id>",
        help="instance to ask for, needed when the daemon has several: the mountpoint, or"
        " for cache the id of the configuration",
    )  # fmt: skip


def _add_prefetch_list(parser: _Parser) -> None:
    parser.add_argument(
        "--id", metavar="<id>",
        help="mountpoint of the instance, needed when the daemon has several",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="<output>", type=Path,
        help="file to write in place of standard output",
    )  # fmt: skip


def _add_mount(parser: _Parser) -> None:
    parser.add_argument(
        "-s", "--source", metavar="<source>",
        help="Storage backend for the filesystem instance",
    )  # fmt: skip
    parser.add_argument(
        "-c", "--config", metavar="<config>",
        help="Configuration file for the new filesystem instance",
    )  # fmt: skip
    parser.add_argument(
        "-m", "--mountpoint", metavar="<mountpoint>",
        help="Mountpoint for the new filesystem instance",
    )  # fmt: skip
    parser.add_argument(
        "-t", "--type", metavar="<type>",
        help=f"Type of the new filesystem instance [possible values: {', '.join(MOUNT_TYPES)}]",
    )  # fmt: skip


def _check(arguments: argparse.Namespace) -> None:
    """Leave with status 2 unless the arguments make a complete command."""
    parser: _Parser = arguments.parser
    if arguments.command == "set":
        parser.require(arguments, kind="<KIND>", value="<VALUE>")
        parser.choose(arguments.kind, "<KIND>", list(KINDS))
    elif arguments.command == "metrics":
        parser.require(arguments, category="<category>")
        parser.choose(arguments.category, "<category>", list(METRICS))
        if arguments.interval is not None:
            arguments.interval = parser.seconds(arguments.interval, "--interval <interval>")
    elif arguments.command == "mount":
        parser.require(
            arguments,
            source="--source <source>",
            config="--config <config>",
            mountpoint="--mountpoint <mountpoint>",
            type="--type <type>",
        )
        parser.choose(arguments.type, "--type <type>", MOUNT_TYPES)
    elif arguments.command == "umount":
        parser.require(arguments, mountpoint="-m <mountpoint>")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_config(path: str) -> str:
    """Return the text of a configuration file; raise `CtlError`."""
    try:
        with open(path, "rb") as file:
            # One byte more than a request may have is enough to be refused.
            data = file.read(BODY_LIMIT + 1)
    except OSError as error:
        raise CtlError(
            f"failed to read mount config {path}\n\nCaused by:\n"
            f"    {error.strerror} (os error {error.errno})"
        ) from error
    if len(data) > BODY_LIMIT:
        raise CtlError(f"mount config {path} has more than the {BODY_LIMIT} bytes of a request")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CtlError(f"mount config {path} is not UTF-8") from error


def _info(client: ApiClient, arguments: argparse.Namespace) -> None:
    answer = client.request("GET", "/api/v1/daemon")
    _show(raw_text(answer) if arguments.raw else info_text(answer))


def _set(client: ApiClient, arguments: argparse.Namespace) -> None:
    client.request("PUT", "/api/v1/daemon", body={KINDS[arguments.kind]: arguments.value})


def _metrics(client: ApiClient, arguments: argparse.Namespace) -> None:
    target, text = METRICS[arguments.category]
    query = None if arguments.id is None else {"id": arguments.id}
    # Only the backend has rates, and they need two answers.
    rates = arguments.interval is not None and arguments.category == "backend"
    rates = rates and not arguments.raw
    before, asked = client.request("GET", target, query), time.monotonic()
    if not rates:
        _show(raw_text(before) if arguments.raw else text(before))
    while arguments.interval is not None:
        time.sleep(arguments.interval)
        answer, now = client.request("GET", target, query), time.monotonic()
        if rates:
            _show(backend_rates_text(before, answer, now - asked))
        else:
            _show(raw_text(answer) if arguments.raw else text(answer))
        before, asked = answer, now


def _prefetch_list(client: ApiClient, arguments: argparse.Namespace) -> None:
    query = {} if arguments.id is None else {"id": arguments.id}
    # Without a recording the list would be empty, too.
    if not is_set(client.request("GET", "/api/v1/metrics", query), "access_pattern_enabled"):
        raise CtlError("nothing is recorded: the configuration has no access_pattern")
    answer = client.request("GET", "/api/v1/metrics/pattern", {**query, "paths": "true"})
    if arguments.raw:
        _show(raw_text(answer))
        return
    listed, left_out = prefetch_list(answer)
    for path in left_out:
        print(f"warning: left out, a list cannot hold it: {path!a}", file=sys.stderr)
    if arguments.output is not None:
        write_list(arguments.output, listed)
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(b"".join(path + b"\n" for path in listed))
        sys.stdout.flush()


def _mount(client: ApiClient, arguments: argparse.Namespace) -> None:
    body = {
        "source": arguments.source,
        "fs_type": arguments.type,
        "config": _read_config(arguments.config),
    }
    client.request("POST", "/api/v1/mount", {"mountpoint": arguments.mountpoint}, body)


def _umount(client: ApiClient, arguments: argparse.Namespace) -> None:
    client.request("DELETE", "/api/v1/mount", {"mountpoint": arguments.mountpoint})


COMMANDS: dict[str, Callable[[ApiClient, argparse.Namespace], None]] = {
    "info": _info,
    "set": _set,
    "metrics": _metrics,
    "prefetch-list": _prefetch_list,
    "mount": _mount,
    "umount": _umount,
}


def _run(arguments: argparse.Namespace) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding does not have is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        COMMANDS[arguments.command](ApiClient(arguments.sock), arguments)
    except NydusError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except OSError as error:
        print(f"Error: {error.strerror or error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser, commands = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "help":
        commands.get(arguments.topic, parser).print_help()
        return 0
    parser.require(arguments, sock="--sock <sock>")
    if arguments.command is None:
        return 0
    arguments.raw = getattr(arguments, "raw", False)
    _check(arguments)
    return _run(arguments)


if __name__ == "__main__":
    sys.exit(main())
