"""`nydus-image merge`: bootstraps of layers into one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from builder.backends import daemon_backend
from builder.cli.common import (
    add_chunk_dict,
    add_config,
    add_output_json,
    chosen_dictionary,
    read_patterns,
    require_output,
)
from builder.cli.create import log_success
from builder.merge import MergeOptions, merge
from builder.prefetch import PrefetchPolicy
from builder.progress import Progress
from builder.report import write_result

if TYPE_CHECKING:
    from erofs.console import CommandParser


def _digests(text: str) -> list[bytes]:
    try:
        return [bytes.fromhex(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a list of hex digests: '{text}'") from None


def _numbers(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a list of numbers: '{text}'") from None


def add_words(parser: CommandParser) -> None:
    """Add the words of the sub-command, and what carries it out."""
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument(
        "sources", metavar="<SOURCE>", nargs="+", type=Path,
        help="bootstrap paths (allow one or more)",
    )  # fmt: skip
    parser.add_argument(
        "--parent-bootstrap", metavar="<parent-bootstrap>", type=Path,
        help="File path of the parent/referenced RAFS metadata blob (optional)",
    )  # fmt: skip
    parser.add_argument(
        "-B", "--bootstrap", metavar="<bootstrap>", type=Path,
        help="Output path of nydus overlaid bootstrap",
    )  # fmt: skip
    parser.add_argument(
        "-D", "--blob-dir", metavar="<blob-dir>", type=Path,
        help="Directory path to save generated RAFS metadata and data blobs",
    )  # fmt: skip
    add_chunk_dict(parser)
    add_config(
        parser, "; a SOURCE may then be a blob with inlined metadata, and blobs keep their ids"
    )
    parser.add_argument(
        "--prefetch-policy", metavar="<prefetch-policy>", default="none",
        choices=[policy.value for policy in PrefetchPolicy],
        help="Set data prefetch policy [default: none] [possible values: fs, blob, none]",
    )  # fmt: skip
    add_output_json(parser)
    _add_lists(parser)


def _add_lists(parser: CommandParser) -> None:
    parser.add_argument(
        "--blob-digests", metavar="<blob-digests>", type=_digests, default=[],
        help="RAFS blob digest list separated by comma",
    )  # fmt: skip
    parser.add_argument(
        "--original-blob-ids", metavar="<original-blob-ids>", default=[],
        type=lambda text: text.split(","),
        help="original blob id list separated by comma, it may usually be a sha256 hex string",
    )  # fmt: skip
    parser.add_argument(
        "--blob-sizes", metavar="<blob-sizes>", type=_numbers, default=[],
        help="RAFS blob size list separated by comma",
    )  # fmt: skip
    parser.add_argument(
        "--blob-toc-digests", metavar="<blob-toc-digests>", type=_digests, default=[],
        help="RAFS blob toc digest list separated by comma",
    )  # fmt: skip
    parser.add_argument(
        "--blob-toc-sizes", metavar="<blob-toc-sizes>", type=_numbers, default=[],
        help="RAFS blob toc size list separated by comma",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Merge, and say what was made."""
    require_output(arguments)
    if arguments.config is not None:
        daemon_backend(arguments.config)
    policy = PrefetchPolicy(arguments.prefetch_policy)
    progress = Progress("merging")
    options = MergeOptions(
        bootstrap=arguments.bootstrap,
        blob_dir=arguments.blob_dir,
        parent_bootstrap=arguments.parent_bootstrap,
        chunk_dict=chosen_dictionary(arguments),
        keep_ids=arguments.config is not None,
        inlined=arguments.config is not None or arguments.blob_dir is not None,
        prefetch_policy=policy,
        prefetch_patterns=[] if policy is PrefetchPolicy.NONE else read_patterns(),
        original_blob_ids=arguments.original_blob_ids,
        blob_digests=arguments.blob_digests,
        blob_sizes=arguments.blob_sizes,
        blob_toc_digests=arguments.blob_toc_digests,
        blob_toc_sizes=arguments.blob_toc_sizes,
        progress=progress.callback(),
    )
    try:
        result = merge(arguments.sources, options)
    finally:
        progress.end()
    write_result(arguments.output_json, result)
    log_success(result)
    return 0
