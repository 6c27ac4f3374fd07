"""`nydus-image chunkdict generate`: a dictionary of the chunks that images have in common."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from builder.chunkdb import database_path
from builder.cli.common import (
    add_config,
    add_output_json,
    logging_words,
    read_patterns,
    require_output,
)
from builder.dictgenerate import DictionaryOptions, generate_dictionary
from builder.prefetch import PrefetchPolicy
from builder.report import write_result

if TYPE_CHECKING:
    from erofs.console import CommandParser

logger = logging.getLogger(__name__)


def add_words(parser: CommandParser) -> None:
    """Add the words of the sub-command, and what carries it out."""
    parser.set_defaults(run=_print_usage, parser=parser)
    kinds = parser.add_subparsers(title="Commands", metavar="[COMMAND]", dest="chunkdict")
    text = "Generate chunk dictionary based on database"
    generate = kinds.add_parser("generate", help=text, description=text, parents=[logging_words()])
    generate.set_defaults(run=run, parser=generate)
    _add_generate(generate)


def _add_generate(parser: CommandParser) -> None:
    parser.add_argument(
        "sources", metavar="<SOURCE>", nargs="+", type=Path,
        help="bootstrap paths (allow one or more), in directories named IMAGE:VERSION",
    )  # fmt: skip
    parser.add_argument(
        "--database", metavar="<database>", default="sqlite://:memory:",
        help="Database connection address for assisting chunk dictionary generation, e.g."
        " sqlite:///path/database.db, where chunks of earlier runs are, too"
        " [default: sqlite://:memory:]",
    )  # fmt: skip
    parser.add_argument(
        "-B", "--bootstrap", metavar="<bootstrap>", type=Path,
        help="Output path of nydus overlaid bootstrap",
    )  # fmt: skip
    parser.add_argument(
        "-D", "--blob-dir", metavar="<blob-dir>", type=Path,
        help="Directory path to save generated RAFS metadata and data blobs",
    )  # fmt: skip
    parser.add_argument(
        "--prefetch-policy", metavar="<prefetch-policy>", default="none",
        choices=[policy.value for policy in PrefetchPolicy],
        help="Set data prefetch policy, which a dictionary has no use for [default: none]"
        " [possible values: fs, blob, none]",
    )  # fmt: skip
    add_output_json(parser)
    add_config(parser)
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="Output message in verbose mode"
    )


def _print_usage(arguments: argparse.Namespace) -> int:
    print("Usage: nydus-image chunkdict [OPTIONS] [COMMAND]")
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Generate, and say where the dictionary is."""
    require_output(arguments)
    if arguments.prefetch_policy != PrefetchPolicy.NONE:
        # Who pipes a list wants somebody to read it.
        read_patterns()
    database = database_path(arguments.database)
    result = generate_dictionary(
        arguments.sources,
        DictionaryOptions(database, arguments.bootstrap, arguments.blob_dir),
    )
    write_result(arguments.output_json, result)
    logger.info('Chunkdict metadata is saved at: "%s"', result.bootstrap)
    return 0
