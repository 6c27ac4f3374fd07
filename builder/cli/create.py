"""`nydus-image create`: one layer or one whole filesystem."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from builder.build import BuildOptions, BuildResult, SourceType, build
from builder.cli.common import chosen_dictionary, read_patterns, require_output
from builder.cli.createwords import COMPRESSORS, DIGESTERS, SOURCE_TYPES, add_options
from builder.errors import BuildError
from builder.options import TOC_CHUNK_SIZE
from builder.prefetch import PrefetchPolicy
from builder.progress import Progress
from builder.source.options import SourceOptions, WhiteoutSpec
from erofs.cipher import BlobCipher
from erofs.rafs import DEFAULT_CHUNK_SIZE

if TYPE_CHECKING:
    from builder.attributes import Attributes
    from erofs.console import CommandParser

logger = logging.getLogger(__name__)


def add_words(parser: CommandParser) -> None:
    """Add the words of the sub-command, and what carries it out."""
    parser.set_defaults(run=run, parser=parser)
    add_options(parser)


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
    else:
        require_output(arguments)
    if arguments.blob_cache_dir is not None:
        _check_cache(arguments)
    elif arguments.blob is None and arguments.blob_dir is None and not _is_toc(arguments):
        parser.error(
            "the following required arguments were not provided:\n"
            "  --blob <blob> or --blob-dir <blob-dir>"
        )
    if arguments.type == "tar-tarfs":
        _check_tarfs(arguments)
    if arguments.fs_version == "5":
        if SOURCE_TYPES[arguments.type].is_reference:
            raise BuildError(
                f"'--fs-version 5' conflicts with conversion type '{arguments.type}', only V6 is"
                " supported"
            )
        raise BuildError("RAFS v5 is not written, only v6 is supported")
    if arguments.config is not None:
        from builder.backends import daemon_backend

        daemon_backend(arguments.config)
    if arguments.source == "-" and arguments.prefetch_policy != "none":
        parser.error("standard input cannot be both the source and the prefetch list")


def _is_toc(arguments: argparse.Namespace) -> bool:
    return SOURCE_TYPES[arguments.type] is SourceType.ESTARGZTOC_REF


def _check_cache(arguments: argparse.Namespace) -> None:
    for value, name in (
        (arguments.blob_inline_meta or None, "--blob-inline-meta"),
        (arguments.blob, "--blob <blob>"),
        (arguments.blob_dir, "--blob-dir <blob-dir>"),
        (arguments.compressor, "--compressor <compressor>"),
    ):
        if value is not None:
            arguments.parser.error(
                f"the argument '--blob-cache-dir <blob-cache-dir>' cannot be used with '{name}'"
            )


def _check_tarfs(arguments: argparse.Namespace) -> None:
    """Refuse what `build` cannot know of; the other conflicts are its own."""
    if arguments.fs_version == "5":
        raise BuildError(
            "'--fs-version 5' conflicts with conversion type 'tar-tarfs', only V6 is supported"
        )
    if arguments.aligned_chunk:
        raise BuildError("conversion type 'tar-tarfs' conflicts with '--aligned-chunk'")


def _chunk_size(arguments: argparse.Namespace) -> int:
    if arguments.chunk_size is not None:
        return int(arguments.chunk_size)
    return TOC_CHUNK_SIZE if _is_toc(arguments) else DEFAULT_CHUNK_SIZE


# Imported in functions: what is seldom needed and takes its time.


def _attributes(arguments: argparse.Namespace) -> Attributes | None:
    if arguments.attributes is None:
        return None
    from builder.attributes import parse_attributes

    return parse_attributes(arguments.attributes)


def _options(arguments: argparse.Namespace, progress: Progress) -> BuildOptions:
    policy = PrefetchPolicy(arguments.prefetch_policy)
    return BuildOptions(
        source_type=SOURCE_TYPES[arguments.type],
        bootstrap=arguments.bootstrap,
        blob_dir=arguments.blob_dir,
        blob=arguments.blob,
        blob_cache_dir=arguments.blob_cache_dir,
        inline_bootstrap=arguments.blob_inline_meta,
        blob_id=arguments.blob_id or None,
        blob_meta=arguments.blob_meta,
        blob_data_size=arguments.blob_data_size,
        blob_offset=arguments.blob_offset,
        toc="blob-toc" in arguments.features,
        chunk_size=_chunk_size(arguments),
        batch_size=arguments.batch_size,
        compressor=COMPRESSORS[arguments.compressor or "zstd"],
        digester=DIGESTERS[arguments.digester],
        encryption=BlobCipher.generate() if arguments.encrypt else None,
        chunk_dict=chosen_dictionary(arguments),
        parent_bootstrap=(Path(arguments.parent_bootstrap) if arguments.parent_bootstrap else None),
        attributes=_attributes(arguments),
        external_blob=arguments.external_blob,
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
    from builder.report import owner_events, write_result

    counters = {
        "blob_uncompressed_size": result.blob_content_bytes,
        "dedup_chunks": result.stats.duplicate_chunks,
        "dedup_uncompressed_size": result.stats.duplicate_bytes,
    }
    # The real report holds only what was counted at all.
    counted = {name: count for name, count in counters.items() if count}
    if options.source_type is SourceType.DIRECTORY:
        counted["load_from_directory"] = result.scanned
    write_result(path, result, {**counted, **owner_events()})


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
    external = ""
    if result.external_blobs:
        path = result.external_bootstrap or "<none>"
        external = f"\nexternal meta blob path: {path}\nexternal data blobs: " + _listed(
            result.external_blobs
        )
    logger.info(
        "successfully built RAFS filesystem: \nmeta blob path: %s\ndata blob size: 0x%x"
        "\ndata blobs: %s%s",
        "<none>" if result.bootstrap is None else result.bootstrap,
        result.blob_size,
        _listed(result.blobs),
        external,
    )


def _listed(blobs: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{blob}"' for blob in blobs) + "]"
