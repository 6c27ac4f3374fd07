"""The command line: `vm-images/guest-image` (docs/kata.md)."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from erofs.console import CommandParser
from erofs.errors import NydusError
from guestimage.image import ImageOptions, make_image
from guestimage.layout import Table
from guestimage.rootfs import DEFAULT_SUITE, bootstrap_debian

__all__ = ["main"]


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="guest-image",
        description="Make a guest image as Kata's image builder lays it out; prints the kernel's"
        " command line for it",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR",
        help="existing folder, which gets guest.img, root_hash.txt and kernel.cmdline",
    )  # fmt: skip
    parser.add_argument(
        "--rootfs", type=Path, metavar="DIR|TAR",
        help="the guest's files [default: Debian minbase, by mmdebstrap]",
    )  # fmt: skip
    parser.add_argument(
        "--suite", default=DEFAULT_SUITE, help=f"of Debian [default: {DEFAULT_SUITE}]"
    )
    parser.add_argument(
        "--include", action="append", default=[], metavar="PACKAGE",
        help="Debian package to have in it, repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--no-verity", action="store_true", help="one partition, and nobody checks it"
    )
    parser.add_argument(
        "--table", choices=[str(kind) for kind in Table], default=str(Table.GPT),
        help="partition table [default: gpt]",
    )  # fmt: skip
    parser.add_argument(
        "--dax", action="store_true", help="with the header for guests that map it (NVDIMM)"
    )
    parser.add_argument(
        "--keep-init", action="store_true", help="keep the /sbin/init of the guest's files"
    )
    parser.add_argument(
        "--device", default="/dev/vda", help="what the guest calls the disk [default: /dev/vda]"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parser().parse_args(argv)
    options = ImageOptions(
        measured=not arguments.no_verity,
        table=Table(arguments.table),
        dax=arguments.dax,
        own_init=not arguments.keep_init,
        device=arguments.device,
    )
    try:
        with tempfile.TemporaryDirectory(dir=arguments.output, prefix=".guest-image-") as work:
            source = arguments.rootfs
            if source is None:
                packages = tuple(arguments.include)
                source = bootstrap_debian(Path(work), arguments.suite, packages)
            print(make_image(source, arguments.output, options))
    except NydusError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"Error: {place}{error.strerror or error}", file=sys.stderr)
        return 1
    return 0
