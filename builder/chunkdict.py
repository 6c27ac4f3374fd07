"""Chunk dictionaries: chunks of another image that need not be stored again (spec 4.12)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from builder.blobtable import BlobTable
from builder.bootstrap import blob_ids, load_tree, open_source_image
from builder.consistency import Profile, require_profile
from builder.errors import BuildError
from erofs import Bootstrap, Chunk
from erofs.rafs import BlobEntry, BlobFeatures, ChunkInfo, Digester, SuperFlags
from erofs.tree import iter_names

__all__ = ["ChunkDictionary", "dictionary_path", "foreign_blobs", "load_dictionary"]

logger = logging.getLogger(__name__)


def dictionary_path(text: str) -> Path:
    """Return the path in `PATH` or `bootstrap=PATH`; raise `BuildError` for another kind."""
    kind, equals, path = text.partition("=")
    if not equals:
        return Path(text)
    if kind != "bootstrap":
        raise BuildError(f"invalid chunk dict type {kind}", expected="bootstrap=PATH")
    return Path(path)


def foreign_blobs(image: Bootstrap, path: Path) -> list[BlobEntry]:
    """Return the blobs of an image as another image names them (spec 4.7, 5.4)."""
    return [
        blob._replace(
            blob_id=name.encode("ascii", "backslashreplace"),
            features=blob.features & ~BlobFeatures.INLINED_FS_META,
        )
        for blob, name in zip(image.blobs, blob_ids(image, path), strict=True)
    ]


class ChunkDictionary:
    """Finds chunks of another image; a blob enters the table when one of its chunks is used.

    Args:
        chunks: of two with one digest the first counts.
        blobs: that image's blob table.
    """

    def __init__(self, chunks: Iterable[ChunkInfo], blobs: list[BlobEntry]) -> None:
        self._chunks: dict[bytes, ChunkInfo] = {}
        for chunk in chunks:
            self._chunks.setdefault(chunk.digest, chunk)
        self.blobs = blobs
        self._used: dict[bytes, Chunk] = {}

    def find(self, digest: bytes, size: int, table: BlobTable) -> Chunk | None:
        """Return the chunk of that digest and size as the new image refers to it."""
        found = self._chunks.get(digest)
        if found is None or found.uncompressed_size != size:
            return None
        chunk = self._used.get(digest)
        if chunk is None:
            chunk = self._used[digest] = Chunk.from_info(found)
            chunk.blob_index = table.add(self.blobs[found.blob_index])
        return chunk


def load_dictionary(
    path: Path, profile: Profile, digester: Digester, parent: Iterable[BlobEntry] = ()
) -> ChunkDictionary:
    """Load the dictionary for a build of that profile.

    A generated dictionary counts chunks in its own way. Of blobs that `parent` has already
    it is therefore not asked.

    Raises:
        BuildError: it cannot be opened, or does not fit.
        FormatError: it is no bootstrap.
    """
    with open_source_image(path, "chunk dictionary cannot be opened") as opened:
        image = require_profile(profile, opened, path)
        blobs = foreign_blobs(image, path)
        if image.digester is not digester:
            logger.warning(
                "%s: chunk dictionary is of no use, its digests are %s",
                path,
                image.digester.name.lower(),
            )
            return ChunkDictionary((), blobs)
        taken = {blob.blob_id for blob in parent}
        left_out = {
            blob.blob_index
            for blob in blobs
            if blob.features & BlobFeatures.IS_CHUNKDICT_GENERATED and blob.blob_id in taken
        }
        chunks = (info for info in _chunks(image) if info.blob_index not in left_out)
        return ChunkDictionary(chunks, blobs)


def _chunks(image: Bootstrap) -> Iterable[ChunkInfo]:
    """Return the chunks in the order in which the real tool learns them.

    Where every blob carries digests that is the tree's; a generated dictionary has no files
    that could be read.
    """
    generated = any(blob.features & BlobFeatures.IS_CHUNKDICT_GENERATED for blob in image.blobs)
    if generated or SuperFlags.INLINED_CHUNK_DIGEST not in image.flags:
        return image.chunk_infos
    return (chunk.info() for _, _, node in iter_names(load_tree(image)) for chunk in node.chunks)
