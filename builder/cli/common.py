"""What the sub-commands share: numbers, patterns, how a bootstrap is named."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from erofs.console import LOG_LEVELS, CommandParser

__all__ = [
    "add_bootstrap_arguments",
    "add_chunk_dict",
    "add_config",
    "add_output_json",
    "bootstrap_path",
    "chosen_dictionary",
    "logging_words",
    "number",
    "read_patterns",
    "require_output",
    "takes_inlined",
    "write_utf8",
]


def logging_words() -> CommandParser:
    """Return the options that every sub-command takes, as a parent for its parser."""
    options = CommandParser(add_help=False)
    options.add_argument(
        "-L", "--log-file", metavar="<log-file>", type=Path, default=argparse.SUPPRESS,
        help="Log file path",
    )  # fmt: skip
    options.add_argument(
        "-l", "--log-level", metavar="<log-level>", default=argparse.SUPPRESS,
        choices=LOG_LEVELS,
        help="Log level: [default: info] [possible values: trace, debug, info, warn, error]",
    )  # fmt: skip
    return options


def number(text: str) -> int:
    """Read a decimal or `0x` number, as an argparse type."""
    try:
        value = int(text, 16) if text.lower().startswith("0x") else int(text, 10)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid number '{text}'") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"negative number '{text}'")
    return value


def read_patterns() -> list[bytes]:
    """Read prefetch patterns, one a line, from standard input."""
    # A name may hold what else ends lines.
    return sys.stdin.buffer.read().split(b"\n")


def add_bootstrap_arguments(parser: CommandParser) -> None:
    """Add the ways of naming the bootstrap to read."""
    parser.add_argument(
        "source", metavar="BOOTSTRAP", nargs="?", type=Path, help="File path of RAFS metadata"
    )
    parser.add_argument(
        "-B", "--bootstrap", metavar="<bootstrap>", type=Path,
        help="[Deprecated] File path of RAFS meta blob/bootstrap",
    )  # fmt: skip
    parser.add_argument(
        "-D", "--blob-dir", metavar="<blob-dir>", type=Path,
        help="Directory of data blobs; BOOTSTRAP may then be a blob with inlined metadata",
    )  # fmt: skip


def add_config(parser: CommandParser, more: str = "") -> None:
    """Add nydusd's configuration; `more` is told of it."""
    parser.add_argument(
        "-C", "--config", metavar="<config>", type=Path,
        help=f"Configuration file for storage backend, cache and RAFS FUSE filesystem{more}",
    )  # fmt: skip


def add_chunk_dict(parser: CommandParser) -> None:
    """Add the option that names a chunk dictionary, for `chosen_dictionary`."""
    parser.add_argument(
        "--chunk-dict", metavar="<chunk-dict>",
        help="File path of chunk dictionary for data deduplication",
    )  # fmt: skip


def add_output_json(parser: CommandParser) -> None:
    """Add the option that says where the report goes."""
    parser.add_argument(
        "-J", "--output-json", metavar="<output-json>", type=Path,
        help="File path to save operation result in JSON format",
    )  # fmt: skip


def require_output(arguments: argparse.Namespace) -> None:
    """End with status 2 unless it was said where a bootstrap goes."""
    if arguments.bootstrap is None and arguments.blob_dir is None:
        arguments.parser.error(
            "the following required arguments were not provided:\n  --bootstrap <bootstrap>"
        )


# Imported in functions: what few commands need, since every command imports this module.


def chosen_dictionary(arguments: argparse.Namespace) -> Path | None:
    """Return the bootstrap of the chunk dictionary, if there is one; raise `BuildError`."""
    if not arguments.chunk_dict:
        return None
    from builder.chunkdict import dictionary_path

    return dictionary_path(arguments.chunk_dict)


def takes_inlined(arguments: argparse.Namespace) -> bool:
    """Tell whether a bootstrap may be inside of a blob; raise `ConfigError`."""
    if arguments.config is not None:
        from builder.backends import daemon_backend

        daemon_backend(arguments.config)
    return arguments.blob_dir is not None or arguments.config is not None


def bootstrap_path(arguments: argparse.Namespace) -> Path:
    """Return the bootstrap that was named; end with a usage error unless it is one."""
    parser: CommandParser = arguments.parser
    path: Path | None = arguments.source or arguments.bootstrap
    if path is None:
        parser.error("the following required arguments were not provided:\n  <BOOTSTRAP>")
    if arguments.source is not None and arguments.bootstrap is not None:
        parser.error("the argument '--bootstrap <bootstrap>' cannot be used with '[BOOTSTRAP]'")
    return path


def write_utf8() -> None:
    """Print names as UTF-8 in every locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
