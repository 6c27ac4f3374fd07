"""`nydus-image compact`: fewer and smaller blobs for an image of many generations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from builder.backends import BlobPlaces, blob_directory
from builder.cli.backendwords import add_backend_type, described_backend
from builder.cli.common import add_chunk_dict, add_output_json, chosen_dictionary, number
from builder.compact import CompactOptions, compact
from builder.progress import Progress
from builder.report import write_result

if TYPE_CHECKING:
    from erofs.console import CommandParser


def add_words(parser: CommandParser) -> None:
    """Add the words of the sub-command, and what carries it out."""
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument(
        "-B", "--bootstrap", metavar="<bootstrap>", type=Path, required=True,
        help="bootstrap to compact",
    )  # fmt: skip
    add_backend_type(parser)
    parser.add_argument(
        "--min-used-ratio", metavar="<min-used-ratio>", type=_percentage, default=0,
        help="Lower bound of used ratio for blobs to be kept, possible values: 0-99,"
        " 0 means disable",
    )  # fmt: skip
    parser.add_argument(
        "--compact-blob-size", metavar="<compact-blob-size>", type=number, default=10 << 20,
        help="Upper bound of blob size for blobs to be compacted, in bytes [default: 10485760]",
    )  # fmt: skip
    parser.add_argument(
        "--max-compact-size", metavar="<max-compact-size>", type=number, default=100 << 20,
        help="Upper bound of compacted blob size, in bytes [default: 104857600]",
    )  # fmt: skip
    parser.add_argument(
        "--layers-to-compact", metavar="<layers-to-compact>", type=number, default=0,
        help="If number of blobs >= layers_to_compact, do compact. 0 means always compact",
    )  # fmt: skip
    parser.add_argument(
        "-D", "--blob-dir", metavar="<blob-dir>", type=Path, required=True,
        help="Local blobs dir for blobs not in backend, also for output blobs",
    )  # fmt: skip
    add_chunk_dict(parser)
    parser.add_argument(
        "-O", "--output-bootstrap", metavar="<output-bootstrap>", type=Path,
        help="bootstrap to output, default is source bootstrap add suffix .compact",
    )  # fmt: skip
    add_output_json(parser)


def _percentage(text: str) -> int:
    value = number(text)
    if value > 99:
        raise argparse.ArgumentTypeError(f"{value} is not in 0..=99")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Compact, and write the report."""
    source: Path = arguments.bootstrap
    local = blob_directory(arguments.blob_dir)
    remote = described_backend(arguments)
    progress = Progress("compacting")
    try:
        result = compact(
            source,
            BlobPlaces(arguments.blob_dir, local, remote),
            CompactOptions(
                bootstrap=arguments.output_bootstrap or source.with_suffix(".bootstrap.compact"),
                blob_dir=arguments.blob_dir,
                min_used_ratio=arguments.min_used_ratio,
                compact_blob_size=arguments.compact_blob_size,
                max_compact_size=arguments.max_compact_size,
                layers_to_compact=arguments.layers_to_compact,
                chunk_dict=chosen_dictionary(arguments),
                progress=progress.callback(),
            ),
        )
    finally:
        progress.end()
        local.close()
        if remote is not None:
            remote.close()
    write_result(arguments.output_json, result)
    return 0
