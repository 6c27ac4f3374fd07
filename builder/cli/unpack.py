"""`nydus-image unpack`: an image back to a tar."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from builder.backends import BACKEND_TYPES, blob_directory, blob_file, configured_backend
from builder.cli.common import Progress, add_bootstrap_arguments, bootstrap_path
from builder.errors import BuildError
from builder.unpack import unpack
from fscache.backend import Backend

if TYPE_CHECKING:
    from erofs.console import CommandParser


def add_parser(
    commands: argparse._SubParsersAction[CommandParser], logging_options: CommandParser
) -> None:
    """Add the sub-command."""
    text = "Unpack a RAFS filesystem to a tar file"
    parser = commands.add_parser("unpack", help=text, description=text, parents=[logging_options])
    parser.set_defaults(run=run, parser=parser)
    add_bootstrap_arguments(parser)
    parser.add_argument(
        "-b", "--blob", metavar="<blob>", type=Path, help="Path to RAFS data blob file"
    )
    parser.add_argument(
        "--backend-type", metavar="<backend-type>", choices=BACKEND_TYPES,
        help=f"Type of backend [possible values: {', '.join(BACKEND_TYPES)}]"
        " (http-proxy is supported so far)",
    )  # fmt: skip
    parser.add_argument(
        "--backend-config", metavar="<backend-config>", help="Config string of backend"
    )
    parser.add_argument(
        "--backend-config-file", metavar="<backend-config-file>", type=Path,
        help="Config file of backend",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="<output>", required=True,
        help="Path for output tar file; '-' is standard output",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Unpack the image that was named."""
    path = bootstrap_path(arguments)
    is_stdout = arguments.output == "-"
    output: Path | BinaryIO = sys.stdout.buffer if is_stdout else Path(arguments.output)
    backend = _backend(arguments)
    progress = Progress("unpacking")
    try:
        unpack(
            path,
            output,
            backend,
            inlined=arguments.blob_dir is not None,
            progress=progress.callback(),
        )
    finally:
        progress.end()
        backend.close()
    return 0


def _backend(arguments: argparse.Namespace) -> Backend:
    kind, text, file = (
        arguments.backend_type, arguments.backend_config, arguments.backend_config_file
    )  # fmt: skip
    given = [value for value in (arguments.blob, arguments.blob_dir, kind) if value is not None]
    if len(given) > 1:
        arguments.parser.error("only one of --blob, --blob-dir and --backend-type can be used")
    if kind is None and not given:
        raise BuildError(
            "invalid backend configuration, --blob, --blob-dir or --backend-type must be specified"
        )
    if arguments.blob is not None:
        return blob_file(arguments.blob)
    if arguments.blob_dir is not None:
        return blob_directory(arguments.blob_dir)
    if (text is None) == (file is None):
        arguments.parser.error(
            "--backend-type needs one of --backend-config and --backend-config-file"
        )
    return configured_backend(kind, file.read_bytes() if text is None else text)
