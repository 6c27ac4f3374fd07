"""The bootstrap that a blob with inlined metadata carries at its end (spec 4.1, 4.6, 4.7)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from erofs import framing, rafs
from erofs.errors import BadMagic, OutOfBounds, error_context
from erofs.view import ReadAt, View

if TYPE_CHECKING:
    from erofs.opening import AnyBootstrap

__all__ = ["blob_ids", "load_inlined_bootstrap", "read_inlined_bootstrap"]


def read_inlined_bootstrap(blob: ReadAt) -> bytes:
    """Return the bootstrap inside of a blob, decompressed, and verified when there is a ToC.

    Raises:
        FormatError: there is none (`BadMagic`), or its place is impossible.
        CodecError: it does not decompress.
        IntegrityError: it does not have the digest that the ToC promises.
    """
    end = blob.size()
    last = framing.section_before(blob, end)
    if last.name == framing.SECTION_TOC:
        entry = framing.read_toc(blob).find(framing.SECTION_BOOTSTRAP)
        if entry is not None:
            return framing.read_toc_section(blob, entry)
    elif last.name == framing.SECTION_BOOTSTRAP:
        if last.size > framing.SECTION_MAX:
            raise OutOfBounds("bootstrap of an impossible size", got=last.size)
        return bytes(blob.read_at(last.offset, last.size))
    raise BadMagic("blob without a bootstrap inside", offset=last.header_offset, got=last.name)


class _File:
    """A file as `ReadAt`, without a mapping: it may be truncated while it is read."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, offset)
        View(data).check(0, length, "blob")
        return data


def load_inlined_bootstrap(path: Path) -> bytes:
    """Return the bootstrap inside of a blob file; raise as `read_inlined_bootstrap`, `OSError`."""
    # O_NONBLOCK: a FIFO is refused instead of waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with error_context(path=path):
            return read_inlined_bootstrap(_File(descriptor))
    finally:
        os.close(descriptor)


def blob_ids(image: AnyBootstrap, path: Path) -> list[str]:
    """Return the ids under which the blobs are stored, in table order.

    A bootstrap from inside of a blob does not know that blob's id: the name of the file `path`
    that it was read from stands for it, up to the first dot (spec rafs-v6 4.7).
    """
    own = path.name.split(".", 1)[0]
    return [own if blob.blob_id == rafs.INLINED_BLOB_ID else blob.id for blob in image.blobs]
