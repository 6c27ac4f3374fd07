"""The words of `nydus-image create`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cli.common import add_chunk_dict, add_config, add_output_json, number
from builder.options import SourceType
from builder.prefetch import PrefetchPolicy
from builder.source.options import WhiteoutSpec
from erofs.rafs import Compressor, Digester

if TYPE_CHECKING:
    from erofs.console import CommandParser

SOURCE_TYPES = {
    "directory": SourceType.DIRECTORY,
    "dir-rafs": SourceType.DIRECTORY,
    "estargz-rafs": SourceType.TAR,
    "estargz-ref": SourceType.ESTARGZ_REF,
    "estargztoc-ref": SourceType.ESTARGZTOC_REF,
    "stargz_index": SourceType.ESTARGZTOC_REF,
    "tar-rafs": SourceType.TAR,
    "tar-tarfs": SourceType.TARFS,
    "targz-rafs": SourceType.TAR,
    "targz-ref": SourceType.TARGZ_REF,
}
COMPRESSORS = {
    "none": Compressor.NONE,
    "lz4_block": Compressor.LZ4_BLOCK,
    "zstd": Compressor.ZSTD,
}
DIGESTERS = {"blake3": Digester.BLAKE3, "sha256": Digester.SHA256}


def _hexadecimal(text: str) -> int:
    """Read a number as the real tool does: hexadecimal, `0x` or not."""
    return number("0x" + text.lower().removeprefix("0x"))


def add_options(parser: CommandParser) -> None:
    """Add all options and the source."""
    parser.add_argument(
        "source",
        metavar="<SOURCE>",
        help="source from which to build the RAFS filesystem; '-' is standard input",
    )
    _add_outputs(parser)
    _add_names(parser)
    _add_format(parser)
    _add_others(parser)
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
        "--external-blob", metavar="<external-blob>", type=Path,
        help="File path to save the generated RAFS external blob",
    )  # fmt: skip
    parser.add_argument(
        "--blob-cache-dir", metavar="<blob-cache-dir>", type=Path,
        help="Directory path to generate blob cache files ($id.blob.meta and $id.blob.data)",
    )  # fmt: skip
    add_output_json(parser)


def _add_names(parser: CommandParser) -> None:
    parser.add_argument(
        "--blob-inline-meta", "--inline-bootstrap", action="store_true",
        help="Inline RAFS metadata and blob metadata into the data blob",
    )  # fmt: skip
    parser.add_argument(
        "--blob-id", metavar="<blob-id>", help="Name for the generated RAFS data blob"
    )
    parser.add_argument(
        "--blob-data-size", metavar="<blob-data-size>", type=_hexadecimal,
        help="Set data blob size for 'estargztoc-ref' conversion, in hexadecimal",
    )  # fmt: skip
    parser.add_argument(
        "--blob-meta", metavar="<blob-meta>", type=Path,
        help="File path to save the chunk table for 'estargztoc-ref' conversion",
    )  # fmt: skip
    parser.add_argument("--blob-offset", type=number, default=0, help=argparse.SUPPRESS)


def _add_format(parser: CommandParser) -> None:
    parser.add_argument(
        "--chunk-size", metavar="<chunk-size>", type=number,
        help="Set the size of data chunks, must be power of two and between"
        " 0x1000-0x1000000: [default: 0x100000, for estargztoc-ref 0x400000]",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", metavar="<batch-size>", type=number, default=0,
        help="Set the batch size to merge small chunks, must be power of two, between"
        " 0x1000-0x1000000 or be zero: [default: 0]",
    )  # fmt: skip
    parser.add_argument(
        "--compressor", metavar="<compressor>", choices=COMPRESSORS,
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
        help="Set RAFS format version number: [default: 6] [possible values: 5, 6]"
        " (5 is not written)",
    )  # fmt: skip
    parser.add_argument(
        "--features", metavar="<features>", choices=("blob-toc",), action="append", default=[],
        help="Enable/disable features [possible values: blob-toc]",
    )  # fmt: skip
    parser.add_argument(
        "--aligned-chunk", action="store_true",
        help="Align uncompressed data chunks to 4K, which RAFS v6 always does",
    )  # fmt: skip
    parser.add_argument(
        "-E", "--encrypt", action="store_true",
        help="Encrypt the generated RAFS data blobs; the key is in the metadata",
    )  # fmt: skip


def _add_others(parser: CommandParser) -> None:
    add_config(parser)
    add_chunk_dict(parser)
    parser.add_argument(
        "--parent-bootstrap", metavar="<parent-bootstrap>",
        help="File path of the parent/referenced RAFS metadata blob (optional)",
    )  # fmt: skip
    parser.add_argument(
        "--attributes", metavar="<attributes>", type=Path,
        help="Nydus attributes file path (usually .nydusattributes file)",
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
