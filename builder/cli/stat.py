"""`nydus-image stat`: what images consist of, and what they have in common."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from builder.bootstrap import open_any_bootstrap
from builder.cli.common import add_config, add_output_json, takes_inlined
from builder.cli.createwords import DIGESTERS
from builder.errors import BuildError
from builder.listing import log_features
from builder.report import write_report
from builder.stat import ImageStat
from erofs import FormatError, NydusError

if TYPE_CHECKING:
    from erofs.console import CommandParser

logger = logging.getLogger(__name__)


def add_words(parser: CommandParser) -> None:
    """Add the words of the sub-command, and what carries it out."""
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument(
        "-B", "--bootstrap", metavar="<bootstrap>", type=Path,
        help="Generate statistics information for the RAFS filesystem",
    )  # fmt: skip
    parser.add_argument(
        "-D", "--blob-dir", metavar="<blob-dir>", type=Path,
        help="Generate statistics information for all RAFS filesystems in the directory;"
        " images may be blobs with inlined metadata",
    )  # fmt: skip
    parser.add_argument(
        "-T", "--target", metavar="<target>", type=Path,
        help="Generate statistics information for the RAFS filesystem after applying chunk"
        " deduplication",
    )  # fmt: skip
    add_config(parser, "; images may then be blobs with inlined metadata")
    parser.add_argument(
        "--digester", metavar="<digester>", choices=DIGESTERS, default="blake3",
        help="Algorithm to digest data chunks: [default: blake3]"
        f" [possible values: {', '.join(DIGESTERS)}]",
    )  # fmt: skip
    add_output_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Count, and print or write what was counted."""
    inlined = takes_inlined(arguments)
    stat = ImageStat(DIGESTERS[arguments.digester])
    if arguments.bootstrap is not None:
        with open_any_bootstrap(arguments.bootstrap, inlined=inlined) as image:
            log_features(image)
            stat.add_base(image)
    elif arguments.blob_dir is not None:
        _add_directory(stat, arguments.blob_dir, arguments.target, inlined)
    else:
        raise BuildError("one of `--bootstrap` and `--blob-dir` must be specified")
    if arguments.target is not None:
        with open_any_bootstrap(arguments.target, inlined=inlined) as image:
            log_features(image)
            stat.add_target(image)
    if arguments.output_json is not None:
        write_report(arguments.output_json, stat.as_json(), indent=None)
    else:
        for line in stat.lines():
            print(line)
    return 0


def _add_directory(stat: ImageStat, directory: Path, target: Path | None, inlined: bool) -> None:
    """Count every image of a directory: what has no extension and is a bootstrap."""
    if not directory.is_dir():
        raise BuildError("specified path must be a directory", path=directory)
    for path in sorted(directory.iterdir()):
        if path == target or path.suffix or not path.is_file():
            continue
        try:
            with open_any_bootstrap(path, inlined=inlined) as image:
                log_features(image)
                stat.add_base(image)
        except FormatError as error:
            logger.debug("%s: not counted: %s", path, error)
        except NydusError as error:
            logger.warning("%s: not counted: %s", path, error)
    stat.deduplicate()
