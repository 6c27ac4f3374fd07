"""The layer with the metadata of a Nydus image: a tar of `image/image.boot` and chunk tables."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from builder.oci.errors import ImageError
from builder.oci.place import PieceReader, Target, uploading
from builder.oci.records import Descriptor
from erofs.errors import CodecError

__all__ = ["BootstrapLayer", "extract_bootstrap", "write_bootstrap_layer"]

BOOTSTRAP_NAME = "image/image.boot"
# A bootstrap of some millions of files; what a layer may make us write.
BOOTSTRAP_MAX = 1 << 32
_HEADER = struct.Struct("<100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x")
_BLOCK = 512
_PIECE_BYTES = 1 << 20
# As Go writes it: no time, unknown system.
_GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
_LEVEL = 6

Content = bytes | Path


class BootstrapLayer(NamedTuple):
    """A bootstrap layer that was stored, and its digest without compression."""

    descriptor: Descriptor
    diff_id: str


def _header(name: str, size: int, mode: int, kind: bytes) -> bytes:
    """Return a member's header as Go writes it: device fields are filled, folders end in no `/`."""
    fields = [
        name.encode("ascii"), b"%07o" % mode, b"0" * 7, b"0" * 7, b"%011o" % size, b"0" * 11,
        b" " * 8, kind, b"", b"ustar\00000", b"", b"", b"0" * 7, b"0" * 7, b"",
    ]  # fmt: skip
    fields[6] = b"%06o\0 " % sum(_HEADER.pack(*fields))
    return _HEADER.pack(*fields)


def _size(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _pieces(content: Content) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _tar(files: Iterable[tuple[str, Content]]) -> Iterator[bytes]:
    yield _header("image", 0, 0o755, tarfile.DIRTYPE)
    for name, content in files:
        size = _size(content)
        yield _header(f"image/{name}", size, 0o444, tarfile.REGTYPE)
        yield from _pieces(content)
        yield bytes(-size % _BLOCK)
    yield bytes(2 * _BLOCK)


def write_bootstrap_layer(
    target: Target, files: Iterable[tuple[str, Content]], media_type: str
) -> BootstrapLayer:
    """Store the layer, compressed while it is sent.

    Args:
        target: takes it.
        files: names below `image/`, in order, with their content.
        media_type: of the layer.

    Raises:
        NydusError: the target does not take it.
    """
    # Half the time of zlib, for nearly the same size.
    from zlib_ng import zlib_ng

    plain, packer = hashlib.sha256(), zlib_ng.compressobj(_LEVEL, wbits=-15)
    checksum, length = 0, 0
    with uploading(target) as upload:
        upload.write(_GZIP_HEADER)
        for piece in _tar(files):
            plain.update(piece)
            checksum = zlib.crc32(piece, checksum)
            length += len(piece)
            upload.write(packer.compress(piece))
        upload.write(packer.flush())
        upload.write(struct.pack("<II", checksum, length & 0xFFFFFFFF))
        descriptor = upload.finish(media_type)
    return BootstrapLayer(descriptor, f"sha256:{plain.hexdigest()}")


def extract_bootstrap(
    pieces: Iterator[bytes],
    layer: Descriptor,
    path: Path,
    others: Callable[[str], Path | None] | None = None,
) -> None:
    """Write the bootstrap of a bootstrap layer to a file.

    Args:
        pieces: of the layer, which raise at their end when it is another.
        layer: which one it is, for errors.
        path: of the file.
        others: asked where to put another member of `image/`, by its name.

    Raises:
        ImageError: no bootstrap layer.
        NydusError: it cannot be read, or is not what its digest promises.
    """
    found = False
    stream = io.BufferedReader(PieceReader(pieces, layer.digest), _PIECE_BYTES)
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                place = path if name == BOOTSTRAP_NAME else None
                if place is None and others is not None and name.startswith("image/"):
                    place = others(name.removeprefix("image/"))
                if place is None or not member.isreg():
                    continue
                if member.size > BOOTSTRAP_MAX:
                    raise ImageError("member of an impossible size", entry=name, got=member.size)
                content = tar.extractfile(member)
                assert content is not None  # noqa: S101 - it is a regular file
                with place.open("wb") as file:
                    while piece := content.read(_PIECE_BYTES):
                        file.write(piece)
                found = found or place == path
        for _ in pieces:
            pass  # its digest is looked at behind the last byte
    except (tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        raise CodecError(f"bootstrap layer is broken ({error})", blob=layer.digest) from error
    finally:
        stream.detach()
    if not found:
        raise ImageError("layer has no bootstrap", blob=layer.digest, expected=BOOTSTRAP_NAME)
