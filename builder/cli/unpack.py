"""`nydus-image unpack`: an image back to a tar."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from builder.cli.backendwords import add_backend_type, add_blob, chosen_backend
from builder.cli.common import add_bootstrap_arguments, bootstrap_path
from builder.progress import Progress
from builder.unpack import unpack

if TYPE_CHECKING:
    from erofs.console import CommandParser


def add_words(parser: CommandParser) -> None:
    """Add the words of the sub-command, and what carries it out."""
    parser.set_defaults(run=run, parser=parser)
    add_bootstrap_arguments(parser)
    add_blob(parser)
    add_backend_type(parser)
    parser.add_argument(
        "--output", metavar="<output>", required=True,
        help="Path for output tar file; '-' is standard output",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Unpack the image that was named."""
    path = bootstrap_path(arguments)
    is_stdout = arguments.output == "-"
    output: Path | BinaryIO = sys.stdout.buffer if is_stdout else Path(arguments.output)
    backend = chosen_backend(arguments)
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
