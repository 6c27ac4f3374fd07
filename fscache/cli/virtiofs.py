"""The words of `nydusd virtiofs`."""

from __future__ import annotations

import argparse
from pathlib import Path

from erofs.console import CommandParser
from fscache.cli.image import (
    add_filesystem,
    add_ignored,
    add_transport,
    check_filesystem,
    filesystem_options,
    tell_ignored,
)
from fscache.cli.words import add_names
from fscache.entry import NodeOptions

__all__ = ["TREE", "add_virtiofs", "virtiofs_options"]

# Every daemon of this kind has a mount namespace of its own, so all have the same place in it.
TREE = Path("/run/nydusd/virtiofs")
_WITHOUT_EFFECT = {
    "--hybrid-mode": "images and directories always go together",
    "--dedup-db": "blobs are shared by id",
    # Kata's configuration passes them to whatever daemon it starts (spec vm-runtimes 2.5).
    "--thread-pool-size": "virtiofsd decides",
    "--announce-submounts": "Kata's overlay needs directories, not submounts",
}
_SWITCHES = ("--hybrid-mode", "--announce-submounts")


def add_virtiofs(parser: CommandParser) -> None:
    """Add the options, and the check of those that go together."""
    parser.set_defaults(parser=parser, check=check_filesystem, options=virtiofs_options)
    parser.add_argument(
        "--sock", type=Path, required=True, metavar="<sock>",
        help="Socket at which the virtual machine's monitor finds the file system (vhost-user)",
    )  # fmt: skip
    add_filesystem(parser)
    add_transport(parser)
    add_names(parser)
    for name, reason in _WITHOUT_EFFECT.items():
        if name in _SWITCHES:
            help_text = f"No effect: {reason}"
            parser.add_argument(name, dest="ignored" + name, action="store_true", help=help_text)
        else:
            add_ignored(parser, name, reason)


def virtiofs_options(arguments: argparse.Namespace) -> NodeOptions:
    """Return what is served first; raise `ConfigError`."""
    tell_ignored(arguments, _WITHOUT_EFFECT)
    # Directories are the guest's to write to, and get mounts of the runtime later on.
    return filesystem_options(arguments, TREE)._replace(writable=True, follow=True)
