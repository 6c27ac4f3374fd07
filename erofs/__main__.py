"""`python -m erofs dump|check FILE`: look into bootstraps and blobs.

Exit status: 0 all is well, 1 the file is broken or a check found an error, 2 wrong usage
or a file that cannot be read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from erofs.base import open_as
from erofs.blobcheck import check_blob
from erofs.blobdump import dump_blob
from erofs.check import ERROR, check_image
from erofs.dump import dump_image
from erofs.errors import BadMagic, FormatError, NydusError
from erofs.layout import FEATURE_COMPAT_RAFS_V6
from erofs.rafs import INLINED_BLOB_ID, BlobEntry
from erofs.reader import Bootstrap, Image, open_bootstrap, open_image
from erofs.v5.image import BootstrapV5
from erofs.v5.layout import SUPERBLOCK_SIZE, is_v5
from erofs.view import View


class _BlobFile:
    """A blob on disk as `ReadAt`; a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        data = os.pread(self._file.fileno(), length, offset)
        View(data).check(0, length, "blob")
        return data

    def __enter__(self) -> _BlobFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _open_for_check(path: Path) -> Image | BootstrapV5:
    try:
        return _open(path, lenient=False)
    except BadMagic:
        with path.open("rb") as file:
            if not is_v5(View(file.read(SUPERBLOCK_SIZE))):
                raise
    return open_as(BootstrapV5, path)


def _open(path: Path, *, lenient: bool) -> Image:
    """Open a bootstrap as such; `lenient` also takes one that strict readers refuse."""
    image = open_image(path)
    if not image.superblock.feature_compat & FEATURE_COMPAT_RAFS_V6:
        return image
    try:
        bootstrap = open_bootstrap(path)
    except FormatError as error:
        if not lenient:
            image.close()
            raise
        print(f"not a sound bootstrap, dumped as EROFS: {error}", file=sys.stderr)
        return image
    image.close()
    return bootstrap


def _entry_for(image: Image | BootstrapV5, path: Path) -> BlobEntry | None:
    """Return the blob table entry of a file: by its name, or the only one there is."""
    blobs = image.blobs if isinstance(image, Bootstrap) else ()
    name = path.name.split(".")[0]
    for blob in blobs:
        if blob.id == name or (len(blobs) > 1 and blob.blob_id == INLINED_BLOB_ID):
            return blob
    return blobs[0] if len(blobs) == 1 else None


def _dump(image: Image, blobs: Sequence[Path]) -> Iterator[str]:
    yield from dump_image(image)
    for path in blobs:
        yield f"blob {path}"
        with _BlobFile(path) as blob:
            yield from dump_blob(blob, _entry_for(image, path))


def _check(image: Image | BootstrapV5, blobs: Sequence[Path], *, data: bool) -> int:
    errors = 0
    for finding in check_image(image):
        errors += finding.severity == ERROR
        print(finding)
    for path in blobs:
        entry = _entry_for(image, path)
        if entry is None or not isinstance(image, Bootstrap):
            print(f"{path}: no blob of this name in the blob table", file=sys.stderr)
            errors += 1
            continue
        with _BlobFile(path) as blob:
            for finding in check_blob(entry, blob, image, data=data):
                errors += finding.severity == ERROR
                print(f"{path}: {finding}")
    return 1 if errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m erofs", description="Look into an image.")
    commands = parser.add_subparsers(dest="command", required=True)
    dump = commands.add_parser("dump", help="print every byte of an image, decoded")
    check = commands.add_parser("check", help="report what strict readers would refuse")
    for command in (dump, check):
        command.add_argument("file", type=Path, metavar="FILE", help="bootstrap or EROFS image")
        command.add_argument(
            "--blob", type=Path, action="append", default=[], metavar="FILE",
            help="a data blob of the image; may be repeated",
        )  # fmt: skip
    check.add_argument("--data", action="store_true", help="decompress and digest every chunk")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "check":
            with _open_for_check(options.file) as checked:
                return _check(checked, options.blob, data=options.data)
        with _open(options.file, lenient=True) as image:
            for line in _dump(image, options.blob):
                print(line)
    except NydusError as error:
        print(f"erofs: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader has seen enough; nothing more may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"erofs: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
