"""What a bootstrap says about its blobs: all that serving an image needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from erofs import Bootstrap, CorruptStructure, NydusError, error_context, open_bootstrap
from erofs.rafs import BlobEntry, ChunkInfo

__all__ = ["BlobPlan", "PlanError", "read_plans"]


class PlanError(NydusError):
    """A bootstrap that cannot be opened."""


@dataclass(frozen=True, slots=True)
class BlobPlan:
    """One blob: its table entry, and the chunks of it that files refer to."""

    entry: BlobEntry
    chunks: Sequence[ChunkInfo]


def read_plans(path: Path) -> list[BlobPlan]:
    """Read what a bootstrap says about its blobs, in device order.

    Raises:
        FormatError: broken, or device table and blob table contradict each other.
        PlanError: the file cannot be opened.
    """
    try:
        image = open_bootstrap(path)
    except OSError as error:
        raise PlanError(f"bootstrap cannot be opened ({error.strerror})", path=path) from error
    with image, error_context(path=path):
        _check_devices(image)
        chunks: list[list[ChunkInfo]] = [[] for _ in image.blobs]
        for info in image.chunk_infos:
            chunks[info.blob_index].append(info)
        return [BlobPlan(*pair) for pair in zip(image.blobs, chunks, strict=True)]


def _check_devices(image: Bootstrap) -> None:
    """Refuse sizes that differ: the kernel goes by the one table, the cache by the other."""
    for entry, slot in zip(image.blobs, image.devices, strict=True):
        if slot.blocks * image.block_size != entry.uncompressed_size:
            raise CorruptStructure(
                "device slot and blob table differ in size",
                blob=entry.id,
                expected=entry.uncompressed_size,
                got=slot.blocks * image.block_size,
            )
        if slot.tag.rstrip(b"\0") != entry.blob_id:
            raise CorruptStructure("device slot and blob table name different blobs", blob=entry.id)
