"""What a bootstrap says about its blobs: all that serving an image needs of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from erofs import Bootstrap, CorruptStructure, NydusError, error_context, open_bootstrap
from erofs.rafs import BlobEntry, ChunkInfo

__all__ = ["BlobPlan", "ImagePlan", "PlanError", "read_plan"]


class PlanError(NydusError):
    """A bootstrap that cannot be opened."""


@dataclass(frozen=True, slots=True)
class BlobPlan:
    """One blob: its table entry, and the chunks of it that files refer to."""

    entry: BlobEntry
    chunks: Sequence[ChunkInfo]


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """The blobs in device order, and (blob number, chunk index) of what to prefetch, in order."""

    blobs: list[BlobPlan]
    listed: list[tuple[int, int]]


def read_plan(path: Path) -> ImagePlan:
    """Read what a bootstrap says about its blobs and about prefetch.

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
        blobs = [BlobPlan(*pair) for pair in zip(image.blobs, chunks, strict=True)]
        return ImagePlan(blobs, list(dict.fromkeys(_listed_chunks(image))))


def _listed_chunks(image: Bootstrap) -> Iterator[tuple[int, int]]:
    """Yield the chunks of the files that the prefetch table names or has below it."""
    if image.superblock.root_nid in image.prefetch_nids:
        # All of it; the order is that of the blobs.
        return
    seen: set[int] = set()
    stack = list(reversed(image.prefetch_nids))
    while stack:
        nid = stack.pop()
        if nid in seen:
            continue
        seen.add(nid)
        inode = image.inode(nid)
        if inode.is_dir:
            names = [entry for entry in inode.entries() if entry.name not in (b".", b"..")]
            stack.extend(entry.nid for entry in reversed(names))
        elif inode.is_regular:
            yield from ((info.blob_index, info.chunk_index) for info in image.file_chunks(inode))


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
