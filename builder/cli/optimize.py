"""`nydus-image optimize`: the chunks of a start-up into one blob more."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cli.backendwords import add_backend_type, add_blob, chosen_backend
from builder.cli.common import add_config, add_output_json
from builder.errors import BuildError
from builder.optimize import OptimizeOptions, optimize, parse_files
from builder.progress import Progress
from builder.report import write_result

if TYPE_CHECKING:
    from erofs.console import CommandParser

_SIZE_LIMIT = 64 << 20


def add_words(parser: CommandParser) -> None:
    """Add the words of the sub-command, and what carries it out."""
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument(
        "-B", "--bootstrap", metavar="<bootstrap>", type=Path, required=True,
        help="File path of RAFS metadata",
    )  # fmt: skip
    parser.add_argument(
        "-p", "--prefetch-files", metavar="<prefetch-files>", type=Path,
        help="Path to a JSON file listing files to be prefetched, and ranges of them",
    )  # fmt: skip
    add_config(parser)
    add_backend_type(parser)
    parser.add_argument(
        "-D", "--blob-dir", metavar="<blob-dir>", type=Path,
        help="Directory for localfs storage backend, hosting data blobs and cache files",
    )  # fmt: skip
    add_blob(parser)
    parser.add_argument(
        "-O", "--output-bootstrap", metavar="<output-bootstrap>", type=Path,
        default=Path("optimized_bootstrap"),
        help="Output path of optimized bootstrap [default: optimized_bootstrap]",
    )  # fmt: skip
    parser.add_argument(
        "--output-blob-dir", metavar="<output-blob-dir>", type=Path,
        help="Directory path for storing optimized blob",
    )  # fmt: skip
    add_output_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Optimize, and write the report."""
    for name in ("output_blob_dir", "prefetch_files"):
        if getattr(arguments, name) is None:
            raise BuildError(f"missing parameter `{name.replace('_', '-')}`")
    files = parse_files(_text(arguments.prefetch_files))
    backend = chosen_backend(arguments)
    progress = Progress("optimizing")
    try:
        result = optimize(
            arguments.bootstrap,
            files,
            backend,
            OptimizeOptions(
                arguments.output_bootstrap, arguments.output_blob_dir, progress.callback()
            ),
        )
    finally:
        progress.end()
        backend.close()
    write_result(arguments.output_json, result)
    return 0


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_SIZE_LIMIT + 1)
    if len(data) > _SIZE_LIMIT:
        raise BuildError("list of prefetch files is too large", path=path)
    return data.decode("utf-8", "surrogateescape")
