"""What a bootstrap says about its blobs: all that serving an image needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from erofs import Bootstrap, CorruptStructure, NydusError, error_context, open_bootstrap
from erofs.inlined import blob_ids
from erofs.rafs import BlobEntry, BlobFeatures, ChunkInfo
from erofs.values import Value
from erofs.view import align_down
from fscache.cache.tarpieces import in_pieces

__all__ = ["BlobPlan", "ImagePlan", "PlanError", "read_plan"]


class PlanError(NydusError):
    """A bootstrap that cannot be opened."""


class BlobPlan(Value):
    """One blob: its table entry, and the chunks of it that files refer to; of a tar all pieces.

    `tables_id` names the blob with the tables of an original layer, others have none.
    """

    entry: BlobEntry
    chunks: Sequence[ChunkInfo]
    tables_id: str = ""


class ImagePlan(Value):
    """The blobs in device order, and the size of the image's blocks in bytes."""

    blobs: list[BlobPlan]
    block_size: int


def read_plan(path: Path, named: Path | None = None) -> ImagePlan:
    """Read what a bootstrap says about its blobs.

    Args:
        path: of the bootstrap.
        named: the file that it came from, if not `path`; a bootstrap that was made inside of
            its blob takes the blob's id from there.

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
        chunks: list[Sequence[ChunkInfo]] = [image.chunk_infos]
        if len(image.blobs) != 1:
            by_blob: list[list[ChunkInfo]] = [[] for _ in image.blobs]
            for info in image.chunk_infos:
                by_blob[info.blob_index].append(info)
            chunks = [*by_blob]
        ids = blob_ids(image, named or path)
        return ImagePlan(
            [
                _blob_plan(
                    entry._replace(blob_id=name.encode("ascii", "backslashreplace")),
                    infos,
                    named or path,
                )
                for entry, name, infos in zip(image.blobs, ids, chunks, strict=True)
            ],
            image.block_size,
        )


def _blob_plan(entry: BlobEntry, chunks: Sequence[ChunkInfo], path: Path) -> BlobPlan:
    if entry.features & BlobFeatures.TARFS:
        return BlobPlan(*in_pieces(entry))
    return BlobPlan(entry, chunks, _tables_id(entry, path))


def _tables_id(entry: BlobEntry, path: Path) -> str:
    """Return what the tables of an original layer are called: by the entry, or as the bootstrap.

    A bootstrap that was made inside of the tables does not know their name (spec rafs-v6 4.7).
    """
    if not entry.features & BlobFeatures.SEPARATE:
        return ""
    if any(entry.blob_meta_digest):
        return entry.blob_meta_digest.hex()
    return path.name.split(".", 1)[0]


def _check_devices(image: Bootstrap) -> None:
    """Refuse sizes that differ: the kernel goes by the one table, the cache by the other."""
    for entry, slot in zip(image.blobs, image.devices, strict=True):
        expected = entry.uncompressed_size
        if entry.features & BlobFeatures.IS_CHUNKDICT_GENERATED:
            # A sum of sizes; the blob itself says how large it is (`fscache.cache.dictionary`).
            expected = align_down(expected, image.block_size)
        if slot.blocks * image.block_size != expected:
            raise CorruptStructure(
                "device slot and blob table differ in size",
                blob=entry.id,
                expected=expected,
                got=slot.blocks * image.block_size,
            )
        if slot.tag.rstrip(b"\0") != entry.blob_id:
            raise CorruptStructure("device slot and blob table name different blobs", blob=entry.id)
