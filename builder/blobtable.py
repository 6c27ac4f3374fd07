"""The blob table of an image in the making: which blobs it has, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

from builder.errors import BuildError
from erofs.rafs import BlobEntry

__all__ = ["BlobTable"]


class BlobTable:
    """Numbers blobs: the parent's first, then others when they are referred to (spec 4.3).

    The image's own blob gets its number with its first chunk, but its entry at the end.
    """

    def __init__(self, parent: Sequence[BlobEntry] = ()) -> None:
        self._entries: list[BlobEntry | None] = list(parent)
        self._own: int | None = None
        self._numbers = {entry.blob_id: number for number, entry in enumerate(parent)}

    def own(self) -> int:
        """Return the number of the image's own blob."""
        if self._own is None:
            self._own = len(self._entries)
            self._entries.append(None)
        return self._own

    def add(self, entry: BlobEntry) -> int:
        """Return the number of another image's blob."""
        number = self._numbers.setdefault(entry.blob_id, len(self._entries))
        if number == len(self._entries):
            self._entries.append(entry)
        return number

    def entries(self, own: BlobEntry | None) -> list[BlobEntry]:
        """Return the finished table; `own` is None when there is no new data.

        Raises:
            BuildError: a blob of that name is there already.
        """
        if own is not None and own.blob_id in self._numbers:
            raise BuildError("two blobs of one name", blob=own.id)
        found = (own if entry is None else entry for entry in self._entries)
        return [
            entry._replace(blob_index=number)
            for number, entry in enumerate(found)
            if entry is not None
        ]
