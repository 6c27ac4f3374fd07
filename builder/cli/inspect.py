"""`nydus-image inspect`: a shell on a bootstrap, or one request."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from builder.bootstrap import blob_ids, open_any_bootstrap
from builder.cli.common import (
    add_bootstrap_arguments,
    add_config,
    bootstrap_path,
    takes_inlined,
    write_utf8,
)
from builder.inspect import HELP, InspectError, Inspector
from builder.listing import log_features, readable
from erofs import NydusError

if TYPE_CHECKING:
    from erofs.console import CommandParser

PROMPT = "Inspecting RAFS :> "
_LEAVE = (b"exit", b"q")


def add_words(parser: CommandParser) -> None:
    """Add the words of the sub-command, and what carries it out."""
    parser.set_defaults(run=run, parser=parser)
    add_bootstrap_arguments(parser)
    add_config(parser, "; BOOTSTRAP may then be a blob with inlined metadata")
    parser.add_argument(
        "-R", "--request", metavar="<request>",
        help="Inspect RAFS filesystem metadata in request mode",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Answer one request, or as many as are typed."""
    write_utf8()
    path = bootstrap_path(arguments)
    with open_any_bootstrap(path, inlined=takes_inlined(arguments)) as image:
        log_features(image)
        inspector = Inspector(image, blob_ids(image, path))
        if arguments.request is not None:
            _request(inspector, arguments.request)
        else:
            _shell(inspector)
    return 0


def _split(line: str) -> tuple[bytes, bytes]:
    """Return command and argument; the argument is the rest, so names may have spaces inside."""
    words = os.fsencode(line).split(None, 1)
    return (words[0] if words else b""), (words[1].rstrip() if len(words) > 1 else b"")


def _request(inspector: Inspector, line: str) -> None:
    command, argument = _split(line)
    if command == b"help":
        sys.stdout.write(HELP)
        raise InspectError("help is not supported in inspect request mode")
    if not command or command in _LEAVE:
        sys.stdout.write("null")
        return
    answer = inspector.execute(command, argument)
    if answer is None:
        sys.stdout.write(_unknown(command))
        raise InspectError(f"unsupported inspect request `{readable(os.fsencode(line))}`")
    if answer.value is None:
        sys.stdout.write(answer.text)
    sys.stdout.write(json.dumps(answer.value, separators=(",", ":"), ensure_ascii=False))


def _unknown(command: bytes) -> str:
    return f"Unsupported command: {readable(command)}\n{HELP}"


def _shell(inspector: Inspector) -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    with suppress(ImportError):
        import readline  # noqa: F401 -- gives `input` line editing
    try:
        while _command(inspector, input(PROMPT)):
            pass
    except (EOFError, KeyboardInterrupt):
        print()


def _command(inspector: Inspector, line: str) -> bool:
    """Carry out a typed line; return whether the shell goes on."""
    command, argument = _split(line)
    if command in _LEAVE:
        return False
    if command == b"help":
        sys.stdout.write(HELP)
    elif command:
        _answer(inspector, command, argument)
    return True


def _answer(inspector: Inspector, command: bytes, argument: bytes) -> None:
    try:
        answer = inspector.execute(command, argument)
    except NydusError as error:
        print(f"Error: {error}", file=sys.stderr)
        return
    sys.stdout.write(_unknown(command) if answer is None else answer.text)
