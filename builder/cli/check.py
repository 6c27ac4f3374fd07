"""`nydus-image check`: is this bootstrap, and on demand its data, what readers take?"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING

from builder.backends import blob_directory, daemon_backend
from builder.bootstrap import blob_ids, open_any_bootstrap
from builder.cli.common import (
    add_bootstrap_arguments,
    add_config,
    add_output_json,
    bootstrap_path,
    takes_inlined,
    write_utf8,
)
from builder.datacheck import check_data
from builder.listing import blob_lines, inode_lines, log_features
from builder.progress import Progress
from builder.report import report, write_report
from erofs import AnyBootstrap
from erofs.check import ERROR, Finding, check_image
from fscache.backend import Backend, open_backend

if TYPE_CHECKING:
    from erofs.console import CommandParser

logger = logging.getLogger(__name__)


def add_words(parser: CommandParser) -> None:
    """Add the words of the sub-command, and what carries it out."""
    parser.set_defaults(run=run, parser=parser)
    add_bootstrap_arguments(parser)
    add_config(parser, "; BOOTSTRAP may then be a blob with inlined metadata")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="Output message in verbose mode"
    )
    add_output_json(parser)
    parser.add_argument(
        "--data", action="store_true",
        help="Read the blobs in <blob-dir>, or where <config> has them, and verify every chunk",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Check, and say what is wrong or list what is there."""
    if arguments.data and arguments.blob_dir is None and arguments.config is None:
        arguments.parser.error(
            "the following required arguments were not provided:\n  --blob-dir <blob-dir>"
        )
    path = bootstrap_path(arguments)
    start = time.monotonic()
    with open_any_bootstrap(path, inlined=takes_inlined(arguments)) as image:
        log_features(image)
        ids = blob_ids(image, path)
        progress = Progress("checking", "names")
        found = check_image(image, progress.callback())
        sound = _tell(progress, (("", finding) for finding in found))
        seconds = {"load_tree_from_bootstrap": time.monotonic() - start}
        if sound and arguments.data:
            with closing(_backend(arguments)) as backend:
                progress = Progress("reading")
                findings = check_data(image, ids, backend, path, progress=progress.callback())
                about = ((f"blob {blob_id}: ", finding) for blob_id, finding in findings)
                sound = _tell(progress, about)
        if not sound:
            return 1
        _list(image, ids, arguments.verbose)
        if arguments.output_json is not None:
            content = report(
                bootstrap=path,
                blobs=ids,
                compressor=image.compressor,
                version=image.version,
                seconds=seconds,
                events={},
            )
            write_report(arguments.output_json, content, indent=None)
    return 0


def _backend(arguments: argparse.Namespace) -> Backend:
    if arguments.blob_dir is not None:
        return blob_directory(arguments.blob_dir)
    return open_backend(daemon_backend(arguments.config))


def _tell(progress: Progress, findings: Iterable[tuple[str, Finding]]) -> bool:
    """Print findings behind what they are about; return whether none is an error.

    The progress line of finding them is away while one is printed, and at the end.
    """
    sound = True
    try:
        for about, finding in findings:
            progress.end()
            text = about + str(finding).removeprefix(f"{finding.severity}: ")
            if finding.severity == ERROR:
                sound = False
                print(f"Error: {text}", file=sys.stderr)
            else:
                logger.warning("%s", text)
    finally:
        progress.end()
    return sound


def _list(image: AnyBootstrap, ids: list[str], verbose: bool) -> None:
    write_utf8()
    if verbose:
        for line in inode_lines(image):
            print(line)
    print("RAFS filesystem metadata is valid, referenced data blobs: ")
    for line in blob_lines(image, ids):
        print(line)
