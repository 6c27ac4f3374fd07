"""The files that a blob consists of: chunks and tables, which for original layers are two."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from erofs.errors import FormatError
from erofs.framing import SECTION_BOOTSTRAP, SECTION_TOC, section_before
from erofs.rafs import BlobEntry, BlobFeatures
from erofs.view import ReadAt
from fscache.backend import LocalFsConfig, open_backend

__all__ = ["BlobFiles", "BlobProvider", "open_blob"]


class BlobProvider(Protocol):
    """A place that holds blobs under their ids."""

    def open(self, blob_id: str) -> ReadAt:
        """Return a reader of one blob; raise `NydusError` when that id is refused."""


class BlobFiles(NamedTuple):
    """Readers of a blob: of its chunks, and of its tables."""

    data: ReadAt
    tables: ReadAt


def open_blob(
    entry: BlobEntry, blob_id: str, provider: BlobProvider, bootstrap: Path | None = None
) -> BlobFiles:
    """Open a blob.

    The tables of an original layer are in a blob that the entry names, or where the bootstrap
    came from when that was made inside of them (spec rafs-v6 4.7).

    Args:
        entry: of the blob table.
        blob_id: under which the chunks are stored.
        provider: where they are.
        bootstrap: the file that the entry was read from.

    Raises:
        NydusError: an id that `provider` refuses.
    """
    data = provider.open(blob_id)
    if not entry.features & BlobFeatures.SEPARATE:
        return BlobFiles(data, data)
    if any(entry.blob_meta_digest) or bootstrap is None:
        return BlobFiles(data, provider.open(entry.blob_meta_digest.hex()))
    own = open_backend(LocalFsConfig(blob_file=bootstrap)).open(bootstrap.name)
    if _has_tables(own):
        return BlobFiles(data, own)
    return BlobFiles(data, provider.open(bootstrap.name.split(".", 1)[0]))


def _has_tables(file: ReadAt) -> bool:
    try:
        return section_before(file, file.size()).name in (SECTION_TOC, SECTION_BOOTSTRAP)
    except FormatError:
        return False
