"""Check the data blobs of an image, wherever a backend has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from builder.chunkreader import BlobProvider, require_plain
from erofs import Bootstrap, NydusError, UnsupportedFeature
from erofs.blobcheck import check_blob
from erofs.check import ERROR, Finding
from erofs.rafs import BlobEntry, BlobFeatures

__all__ = ["check_data"]


def check_data(
    image: Bootstrap, ids: Sequence[str], blobs: BlobProvider
) -> Iterator[tuple[str, Finding]]:
    """Yield (blob id, finding) after reading every chunk of every blob; nothing means all is well.

    A blob of a kind that cannot be checked is an error. Memory is bounded by the tables of
    one blob. Raises `OSError` when reading fails in a way that is not about one blob.
    """
    for blob_id, entry in zip(ids, image.blobs, strict=True):
        try:
            _require_checkable(entry)
            reader = blobs.open(blob_id)
            reader.size()
        except NydusError as error:
            yield blob_id, Finding(ERROR, error.reason)
            continue
        for finding in check_blob(entry, reader, image, data=True):
            yield blob_id, finding


def _require_checkable(blob: BlobEntry) -> None:
    require_plain(blob)
    if blob.features & BlobFeatures.SEPARATE:
        raise UnsupportedFeature("checking data that is an original layer")
