"""The words that say where data blobs are, shared by sub-commands that read them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from builder.backends import (
    BACKEND_TYPES,
    blob_directory,
    blob_file,
    configured_backend,
    daemon_backend,
)
from builder.errors import BuildError
from fscache.backend import Backend, open_backend

if TYPE_CHECKING:
    from erofs.console import CommandParser


def add_backend_type(parser: CommandParser) -> None:
    """Add the options that describe a backend."""
    parser.add_argument(
        "--backend-type", metavar="<backend-type>", choices=BACKEND_TYPES,
        help=f"Type of backend [possible values: {', '.join(BACKEND_TYPES)}]",
    )  # fmt: skip
    parser.add_argument(
        "--backend-config", metavar="<backend-config>", help="Config string of backend"
    )
    parser.add_argument(
        "--backend-config-file", metavar="<backend-config-file>", type=Path,
        help="Config file of backend",
    )  # fmt: skip


def add_blob(parser: CommandParser) -> None:
    """Add the option that names the one blob."""
    parser.add_argument(
        "-b", "--blob", metavar="<blob>", type=Path, help="Path to RAFS data blob file"
    )


def described_backend(arguments: argparse.Namespace) -> Backend | None:
    """Return the backend that `add_backend_type` has options for, None without a type."""
    kind, text, file = (
        arguments.backend_type, arguments.backend_config, arguments.backend_config_file
    )  # fmt: skip
    if kind is None:
        return None
    if (text is None) == (file is None):
        arguments.parser.error(
            "--backend-type needs one of --backend-config and --backend-config-file"
        )
    return configured_backend(kind, file.read_bytes() if text is None else text)


def chosen_backend(arguments: argparse.Namespace) -> Backend:
    """Return the one place of data that was named; raise `BuildError`, `ConfigError`."""
    config: Path | None = getattr(arguments, "config", None)
    kind = arguments.backend_type
    given = [value for value in (arguments.blob, arguments.blob_dir, kind) if value is not None]
    if len(given) > 1:
        arguments.parser.error("only one of --blob, --blob-dir and --backend-type can be used")
    if arguments.blob is not None:
        return blob_file(arguments.blob)
    if arguments.blob_dir is not None:
        return blob_directory(arguments.blob_dir)
    described = described_backend(arguments)
    if described is not None:
        return described
    if config is not None:
        return open_backend(daemon_backend(config))
    raise BuildError(
        "invalid backend configuration, --blob, --blob-dir or --backend-type must be specified"
    )
