"""The command line of `kata`: volumes, options and bundles for VM runtimes (docs/kata.md).

Options may hold credentials: they are read from files or standard input, never from arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from erofs.console import CommandParser
from erofs.errors import NydusError
from erofs.version import VERSION
from kata.errors import OptionError
from kata.extraoption import NydusExtraOptions, detect_fs_version
from kata.guestpull import guest_pull_volume
from kata.profile import Profile
from kata.show import MAX_TEXT_BYTES, decode_any, describe, find_options
from kata.verity import DmVerity, parse_verity
from kata.volume import KataVirtualVolume, Metadata, NydusImage, VolumeType

__all__ = ["main"]

EXTRAOPTION = "extraoption"
_TYPES = (EXTRAOPTION, *(kind.value for kind in VolumeType))
_DISKS = (VolumeType.IMAGE_RAW_BLOCK, VolumeType.LAYER_RAW_BLOCK)


def _read(name: str) -> str:
    """Return the text of a file or of standard input (`-`); raise `OptionError`."""
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise OptionError(f"cannot be read: {error.strerror}", path=name) from error
    if len(data) > MAX_TEXT_BYTES:
        raise OptionError("too long", path=name, expected=f"at most {MAX_TEXT_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise OptionError("not UTF-8", path=name, offset=error.start) from None


def _pairs(words: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise OptionError("--metadata", expected="NAME=TEXT", got=ascii(word[:64]))
        pairs[key] = value
    return pairs


def _verity(text: str | None) -> DmVerity | None:
    if text is None:
        return None
    return parse_verity(_read(text[1:]).rstrip("\n") if text.startswith("@") else text)


def _make_extra(arguments: argparse.Namespace) -> str:
    if not arguments.config or not arguments.snapshot_dir or not arguments.source:
        raise OptionError("extraoption needs --source, --config and --snapshot-dir")
    version = arguments.fs_version or detect_fs_version(Path(arguments.source))
    config = _read(arguments.config)
    options = NydusExtraOptions(arguments.source, config, arguments.snapshot_dir, version)
    options.check(Profile.PRODUCER)
    return options.encode()


def _volume(arguments: argparse.Namespace) -> KataVirtualVolume:
    kind = VolumeType(arguments.type)
    metadata = _pairs(arguments.metadata)
    if kind is VolumeType.IMAGE_GUEST_PULL:
        return guest_pull_volume(metadata, arguments.source or "")
    disk = kind in _DISKS
    image = None
    if arguments.config or arguments.snapshot_dir:
        config = _read(arguments.config) if arguments.config else ""
        image = NydusImage(config, arguments.snapshot_dir or "")
    return KataVirtualVolume(
        kind,
        source=arguments.source or "",
        fs_type=arguments.fs_type or ("erofs" if disk else ""),
        options=tuple(arguments.option) or (("ro",) if disk else ()),
        direct_volume=Metadata(metadata) if kind is VolumeType.DIRECT_BLOCK else None,
        nydus_image=image,
        dm_verity=_verity(arguments.verity),
    )


def _make(arguments: argparse.Namespace) -> None:
    if arguments.type == EXTRAOPTION:
        print(_make_extra(arguments))
    else:
        print(_volume(arguments).encode())


def _show(arguments: argparse.Namespace) -> None:
    options = find_options(_read(arguments.file))
    # All are decoded before the first is shown: an error is all there is.
    shown = list(describe(options, Profile(arguments.profile), reveal=arguments.reveal))
    print(json.dumps(shown, indent=2, ensure_ascii=False))


def _check(arguments: argparse.Namespace) -> None:
    options = find_options(_read(arguments.file))
    for number, option in enumerate(options, 1):
        try:
            decode_any(option, Profile(arguments.profile))
        except OptionError as error:
            raise OptionError(f"option {number} of {len(options)}: {error}") from error
    print(f"{len(options)} right")


def _add_make(commands: argparse._SubParsersAction[CommandParser]) -> None:
    text = "print the mount option that describes an image to a VM runtime"
    parser = commands.add_parser("make", help=text, description=text)
    parser.add_argument("type", choices=_TYPES, metavar="TYPE", help=", ".join(_TYPES))
    parser.add_argument("--source", help="path of disk or bootstrap, or reference of an image")
    parser.add_argument("--fs-type", help="filesystem inside (disks: erofs)")
    parser.add_argument("--option", action="append", default=[], help="mount option, repeatable")
    parser.add_argument(
        "--metadata", action="append", default=[], metavar="NAME=TEXT",
        help="for direct_block and image_guest_pull, repeatable",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="nydusd's configuration; - for stdin")
    parser.add_argument("--snapshot-dir", metavar="DIR", help="directory of the active snapshot")
    parser.add_argument("--fs-version", choices=("v5", "v6"), help="else the bootstrap's")
    parser.add_argument(
        "--verity", metavar="TEXT|@FILE",
        help="JSON, its base64, a label, or the line of nydus-image export --verity",
    )  # fmt: skip
    parser.set_defaults(run=_make)


def _bundle(arguments: argparse.Namespace) -> None:
    # Imported here: it brings the whole builder along.
    from builder.nydusify.places import Places
    from builder.oci.names import parse_platforms
    from builder.termination import terminable
    from kata.bundle import BundleOptions, make_bundle

    platforms = parse_platforms(arguments.platform)
    if len(platforms) != 1:
        raise OptionError("--platform", expected="one", got=len(platforms))
    options = BundleOptions(arguments.reference, platforms[0], arguments.place)
    text = arguments.source
    with terminable(), ExitStack() as stack:
        # What looks like a path is one, also when it is not there.
        is_path = text.startswith(("/", ".")) or os.path.lexists(text)
        source = Path(text) if is_path else Places(os.environ, stack).source(text, insecure=False)
        disk = make_bundle(source, arguments.output, options)
    print(disk.verity.root_hash)


def _add_bundle(groups: argparse._SubParsersAction[CommandParser]) -> None:
    text = "make everything that a microVM platform needs of one image"
    parser = groups.add_parser("bundle", help=text, description=f"{text}; prints the root hash")
    parser.add_argument(
        "source", metavar="LAYOUT|DIR|IMAGE",
        help="OCI layout with a Nydus or plain image, folder with bootstrap and blobs, or an image"
        " of a registry",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder to make"
    )
    parser.add_argument(
        "--reference",
        default="",
        metavar="NAME",
        help="which image of the layout, if not the only one",
    )
    parser.add_argument(
        "--platform", default="linux/amd64", metavar="OS/ARCHITECTURE",
        help="which image of an index [default: linux/amd64]",
    )  # fmt: skip
    parser.add_argument(
        "--place", type=PurePosixPath, metavar="DIR",
        help="where the bundle will be on hosts [default: /var/lib/kata/bundles/<root hash>]",
    )  # fmt: skip
    parser.set_defaults(run=_bundle)


def _parser() -> CommandParser:
    parser = CommandParser(prog="kata", description="Contracts with Kata Containers.")
    parser.add_argument("-V", "--version", action="version", version=f"kata {VERSION}")
    groups = parser.add_subparsers(title="Commands", metavar="COMMAND", required=True)
    volume = groups.add_parser("volume", help="virtual volumes and extraoptions")
    commands = volume.add_subparsers(title="Commands", metavar="COMMAND", required=True)
    _add_make(commands)
    _add_bundle(groups)
    reading = CommandParser(add_help=False)
    reading.add_argument(
        "file", metavar="FILE", help="text or JSON that holds options; - for standard input"
    )
    reading.add_argument(
        "--profile", choices=[profile.value for profile in Profile], default=Profile.STRICT.value,
        help="whose rules count: kata-types (default), the snapshotter, Kata's Go runtime",
    )  # fmt: skip
    for name, text, run in (
        ("show", "print what options hold, without secrets", _show),
        ("check", "tell whether options keep the rules", _check),
    ):
        command = commands.add_parser(name, help=text, description=text, parents=[reading])
        if run is _show:
            command.add_argument("--reveal", action="store_true", help="show secrets too")
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except NydusError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is left in the buffer goes nowhere.
        sys.stdout = None
        return 1
    except KeyboardInterrupt as stop:
        from builder.termination import exit_status

        print("Error: interrupted, nothing was left behind", file=sys.stderr)
        return exit_status(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
