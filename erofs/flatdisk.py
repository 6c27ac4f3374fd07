"""Where metadata and blobs lie on the disk that holds a whole image (spec rafs-v6 6.2).

The bootstrap is at 0, each blob's uncompressed space where its device slot maps it, and
zeros between them. Only places: who reads and writes the bytes is elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

from erofs.errors import CorruptStructure, UnsupportedFeature, error_context
from erofs.layout import BLOCK_SIZE
from erofs.reader import Bootstrap

__all__ = ["Extent", "blob_extents", "disk_size"]


class Extent(NamedTuple):
    """Where something lies on the disk, in bytes."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.start + self.size


def blob_extents(image: Bootstrap) -> list[Extent]:
    """Return the place of each blob, in the order of the blob table, ascending.

    Raises:
        CorruptStructure: a place is impossible.
        UnsupportedFeature: the image is older than such places.
    """
    block_size, position = image.block_size, image.view.length
    if position % BLOCK_SIZE:
        raise CorruptStructure("length of a bootstrap", expected="whole pages", got=position)
    extents = []
    for slot, blob in zip(image.devices, image.blobs, strict=True):
        with error_context(blob=blob.id):
            if not slot.mapped_blkaddr:
                raise UnsupportedFeature("an image of this age has no places for its blobs")
            extent = Extent(slot.mapped_blkaddr * block_size, slot.blocks * block_size)
            if extent.start < position:
                raise CorruptStructure("blob lies over what is before it", offset=extent.start)
            if slot.blocks != blob.uncompressed_size // block_size:
                raise CorruptStructure(
                    "blocks of a blob",
                    expected=blob.uncompressed_size // block_size,
                    got=slot.blocks,
                )
        extents.append(extent)
        position = extent.end
    return extents


def disk_size(image: Bootstrap) -> int:
    """Return the length of the disk in bytes, without a hash tree; raise as `blob_extents`."""
    extents = blob_extents(image)
    return extents[-1].end if extents else image.view.length
