"""What a Nydus layer says of itself: bootstrap, chunk table and digest of its contents' table."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from builder.oci.place import BlobStore, Source
from builder.oci.records import Descriptor
from erofs import framing
from erofs.citable import pack_cached
from erofs.errors import BadMagic, error_context
from erofs.view import ReadAt

__all__ = ["LayerTail", "read_tail"]


class LayerTail(NamedTuple):
    """The metadata of one layer.

    Args:
        bootstrap: of the layer alone.
        table: the chunk table in the form of caches, None for a layer without data.
        toc_digest: SHA-256 of the table of contents without its tar header, as the real
            converter has it.
    """

    bootstrap: bytes
    table: bytes | None
    toc_digest: bytes


class _Buffered:
    """A blob whose last bytes were read once; most of what is asked for is there."""

    _BYTES = 1 << 16

    def __init__(self, blob: ReadAt, size: int) -> None:
        self._blob = blob
        self._size = size
        self._start = max(0, size - self._BYTES)
        self._tail = blob.read_at(self._start, size - self._start) if size else b""

    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes | memoryview:
        if offset >= self._start:
            place = offset - self._start
            return self._tail[place : place + length]
        return self._blob.read_at(offset, length)


def read_tail(place: Source | BlobStore, descriptor: Descriptor) -> LayerTail:
    """Read the metadata of a layer from its end; everything has the digest that is promised.

    Raises:
        FormatError: no layer with a table of contents and a bootstrap.
        NydusError: it cannot be read.
    """
    with error_context(blob=descriptor.digest):
        blob = _Buffered(place.open(descriptor.hex), descriptor.size)
        toc = framing.read_toc(blob)
        bootstrap = toc.find(framing.SECTION_BOOTSTRAP)
        if bootstrap is None:
            raise BadMagic("layer without a bootstrap inside")
        table = None
        meta, header = toc.find(framing.SECTION_META), toc.find(framing.SECTION_META_HEADER)
        if meta is not None and header is not None:
            plain = framing.read_toc_section(blob, meta)
            table = pack_cached(plain, framing.read_toc_section(blob, header))
        return LayerTail(
            framing.read_toc_section(blob, bootstrap),
            table,
            hashlib.sha256(toc.raw[: -framing.TAR_HEADER_SIZE]).digest(),
        )
