"""`nydus-image create`: one layer or one whole filesystem."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from builder.build import BuildOptions, BuildResult, SourceType, build
from builder.cli.common import Progress, number, read_patterns
from builder.errors import BuildError
from builder.prefetch import PrefetchPolicy
from builder.report import owner_events, report, write_report
from builder.source.options import SourceOptions, WhiteoutSpec
from erofs.rafs import DEFAULT_CHUNK_SIZE, Compressor, Digester

if TYPE_CHECKING:
    from erofs.console import CommandParser

logger = logging.getLogger(__name__)

SOURCE_TYPES = {
    "directory": SourceType.DIRECTORY,
    "dir-rafs": SourceType.DIRECTORY,
    "tar-rafs": SourceType.TAR,
    "targz-rafs": SourceType.TAR,
}
COMPRESSORS = {
    "none": Compressor.NONE,
    "lz4_block": Compressor.LZ4_BLOCK,
    "zstd": Compressor.ZSTD,
}
DIGESTERS = {"blake3": Digester.BLAKE3, "sha256": Digester.SHA256}


def add_parser(
    commands: argparse._SubParsersAction[CommandParser], logging_options: CommandParser
) -> None:
    """Add the sub-command."""
    text = "Create RAFS filesystems from directories or tar files"
    parser = commands.add_parser("create", help=text, description=text, parents=[logging_options])
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument(
        "source",
        metavar="<SOURCE>",
        help="source from which to build the RAFS filesystem; '-' is standard input",
    )
    _add_outputs(parser)
    _add_format(parser)
    _add_content(parser)


def _add_outputs(parser: CommandParser) -> None:
    parser.add_argument(
        "-t", "--type", "--source-type", dest="type", metavar="<type>", default="dir-rafs",
        choices=SOURCE_TYPES,
        help="Conversion type: [default: dir-rafs]"
        f" [possible values: {', '.join(SOURCE_TYPES)}]",
    )  # fmt: skip
    parser.add_argument(
        "-B", "--bootstrap", metavar="<bootstrap>", type=Path,
        help="File path to save the generated RAFS metadata blob",
    )  # fmt: skip
    parser.add_argument(
        "-D", "--blob-dir", metavar="<blob-dir>", type=Path,
        help="Directory path to save generated RAFS metadata and data blobs",
    )  # fmt: skip
    parser.add_argument(
        "-b", "--blob", metavar="<blob>", type=Path,
        help="File path to save the generated RAFS data blob",
    )  # fmt: skip
    parser.add_argument(
        "--blob-inline-meta", "--inline-bootstrap", action="store_true",
        help="Inline RAFS metadata and blob metadata into the data blob",
    )  # fmt: skip
    parser.add_argument(
        "--blob-id", metavar="<blob-id>", help="Name for the generated RAFS data blob"
    )
    parser.add_argument(
        "-J", "--output-json", metavar="<output-json>", type=Path,
        help="File path to save operation result in JSON format",
    )  # fmt: skip


def _add_format(parser: CommandParser) -> None:
    parser.add_argument(
        "--chunk-size", metavar="<chunk-size>", type=number, default=DEFAULT_CHUNK_SIZE,
        help="Set the size of data chunks, must be power of two and between"
        " 0x1000-0x1000000: [default: 0x100000]",
    )  # fmt: skip
    parser.add_argument(
        "--compressor", metavar="<compressor>", choices=COMPRESSORS, default="zstd",
        help="Algorithm to compress data chunks: [default: zstd]"
        f" [possible values: {', '.join(COMPRESSORS)}]",
    )  # fmt: skip
    parser.add_argument(
        "--digester", metavar="<digester>", choices=DIGESTERS, default="blake3",
        help="Algorithm to digest data chunks: [default: blake3]"
        f" [possible values: {', '.join(DIGESTERS)}]",
    )  # fmt: skip
    parser.add_argument(
        "-v", "--fs-version", metavar="<fs-version>", choices=("5", "6"), default="6",
        help="Set RAFS format version number: [default: 6] (5 is not written)",
    )  # fmt: skip
    parser.add_argument(
        "--features", metavar="<features>", choices=("blob-toc",), action="append", default=[],
        help="Enable/disable features [possible values: blob-toc]",
    )  # fmt: skip
    parser.add_argument(
        "--aligned-chunk", action="store_true",
        help="Align uncompressed data chunks to 4K, which RAFS v6 always does",
    )  # fmt: skip


def _add_content(parser: CommandParser) -> None:
    parser.add_argument(
        "--repeatable", action="store_true",
        help="Leave out owners, so that another user's build gives the same bytes",
    )  # fmt: skip
    parser.add_argument(
        "--whiteout-spec", metavar="<whiteout-spec>", default="oci",
        choices=[spec.value for spec in WhiteoutSpec],
        help="Set the type of whiteout specification: [default: oci]"
        " [possible values: oci, overlayfs, none]",
    )  # fmt: skip
    parser.add_argument(
        "--prefetch-policy", metavar="<prefetch-policy>", default="none",
        choices=[policy.value for policy in PrefetchPolicy],
        help="Set data prefetch policy, the list comes from standard input [default: none]"
        " [possible values: fs, blob, none]",
    )  # fmt: skip
    parser.add_argument(
        "--pax-mtime", action="store_true",
        help="Take times of PAX headers with their nanoseconds (the original tool keeps"
        " the ustar header's seconds only)",
    )  # fmt: skip
    parser.add_argument("--disable-check", action="store_true", help=argparse.SUPPRESS)


def _check_words(arguments: argparse.Namespace) -> None:
    """Refuse combinations as the real tool does: usage errors, exit status 2."""
    parser: CommandParser = arguments.parser
    if arguments.blob_inline_meta:
        for value, name in (
            (arguments.bootstrap, "--bootstrap <bootstrap>"),
            (arguments.blob_id, "--blob-id <blob-id>"),
        ):
            if value is not None:
                parser.error(f"the argument '--blob-inline-meta' cannot be used with '{name}'")
    elif arguments.bootstrap is None and arguments.blob_dir is None:
        parser.error(
            "the following required arguments were not provided:\n  --bootstrap <bootstrap>"
        )
    if arguments.blob is None and arguments.blob_dir is None:
        parser.error(
            "the following required arguments were not provided:\n"
            "  --blob <blob> or --blob-dir <blob-dir>"
        )
    if arguments.fs_version == "5":
        raise BuildError("RAFS v5 is not written, only v6 is supported")
    if arguments.source == "-" and arguments.prefetch_policy != "none":
        parser.error("standard input cannot be both the source and the prefetch list")


def _options(arguments: argparse.Namespace, progress: Progress) -> BuildOptions:
    policy = PrefetchPolicy(arguments.prefetch_policy)
    return BuildOptions(
        source_type=SOURCE_TYPES[arguments.type],
        bootstrap=arguments.bootstrap,
        blob_dir=arguments.blob_dir,
        blob=arguments.blob,
        inline_bootstrap=arguments.blob_inline_meta,
        blob_id=arguments.blob_id,
        toc="blob-toc" in arguments.features,
        chunk_size=arguments.chunk_size,
        compressor=COMPRESSORS[arguments.compressor],
        digester=DIGESTERS[arguments.digester],
        source=SourceOptions(
            whiteout_spec=WhiteoutSpec(arguments.whiteout_spec),
            keep_owners=not arguments.repeatable,
            pax_mtime=arguments.pax_mtime,
        ),
        prefetch_policy=policy,
        prefetch_patterns=[] if policy is PrefetchPolicy.NONE else read_patterns(),
        progress=progress.callback(),
    )


def _write_report(path: Path, result: BuildResult, options: BuildOptions) -> None:
    counters = {
        "blob_uncompressed_size": result.blob_content_bytes,
        "dedup_chunks": result.stats.duplicate_chunks,
        "dedup_uncompressed_size": result.stats.duplicate_bytes,
    }
    if options.source_type is SourceType.DIRECTORY:
        counters["load_from_directory"] = result.names - 1
    # The real report holds only what was counted at all.
    counted = {name: count for name, count in counters.items() if count}
    content = report(
        bootstrap=result.bootstrap,
        blobs=result.blobs,
        compressor=options.compressor,
        seconds=result.seconds,
        events={**counted, **owner_events()},
    )
    write_report(path, content)


def run(arguments: argparse.Namespace) -> int:
    """Build, and say what was built."""
    _check_words(arguments)
    progress = Progress("chunking")
    options = _options(arguments, progress)
    source: Path | BinaryIO = (
        sys.stdin.buffer if arguments.source == "-" else Path(arguments.source)
    )
    if isinstance(source, Path) and not source.exists():
        raise BuildError("No such file or directory", path=source)
    try:
        result = build(source, options)
    finally:
        progress.end()
    if arguments.output_json is not None:
        _write_report(arguments.output_json, result, options)
    log_success(result)
    return 0


def log_success(result: BuildResult) -> None:
    """Log what callers of the real tool look for."""
    blobs = ", ".join(f'"{blob}"' for blob in result.blobs)
    logger.info(
        "successfully built RAFS filesystem: \nmeta blob path: %s\ndata blob size: 0x%x"
        "\ndata blobs: [%s]",
        "<none>" if result.bootstrap is None else result.bootstrap,
        result.blob_size,
        blobs,
    )
