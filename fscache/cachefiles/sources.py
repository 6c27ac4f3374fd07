"""What files of the kernel's cache are filled from: bootstraps, and blobs by way of our own cache.

A chunk is fetched, verified and written to its data file in the work directory as for every other
channel, then copied from there: whoever changes the channel finds a warm cache.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

from erofs.errors import error_context
from erofs.layout import BLOCK_SIZE
from erofs.view import align_up
from fscache.cache.cachedblob import CachedBlob
from fscache.cachefiles.errors import CachefilesError
from fscache.fetch.demand import Demand
from fscache.fetch.outstanding import Done

__all__ = ["PIECE_BYTES", "BlobSource", "BootstrapSource", "Extent", "Source"]

# How much is copied at once, and of a bootstrap with one read.
PIECE_BYTES = 1 << 20

# First byte, and the one behind the last; whole pages.
Extent = tuple[int, int]
Listener = Callable[[Extent], None]


class Source(Protocol):
    """Where the bytes of one file come from; `size` is that of the file, in whole pages."""

    size: int

    def opened(self) -> None:
        """Take note that the kernel opens the file; must be short."""

    def request(self, offset: int, length: int, done: Done) -> None:
        """Make a range ready to be copied, then call `done` once; as `Fetcher.request`."""

    def around(self, offset: int, length: int) -> Extent:
        """Return the extent that is ready when a range within it is; raise `NydusError`."""

    def copy(self, offset: int, view: memoryview) -> None:
        """Fill a buffer of whole pages from what is ready; raise `NydusError`."""

    def ahead(self) -> Iterator[Extent]:
        """Yield what is ready and is to be copied before it is read."""

    def listen(self, listener: Listener | None) -> None:
        """Have somebody told of every extent that becomes ready, or with None nobody."""


class BootstrapSource:
    """A bootstrap in a file; all of it is copied at once, since it is read page by page.

    Args:
        fd: the open file; what this needs is a copy, closed when nobody uses this any more.
        opened: called when the kernel opens it, which is when somebody mounts.
    """

    def __init__(self, fd: int, opened: Callable[[], None] | None = None) -> None:
        # Whoever copies in the background may be last: by then the number could be another file's.
        self._fd = os.dup(fd)
        weakref.finalize(self, os.close, self._fd)
        self._opened = opened
        self._bytes = os.fstat(fd).st_size
        self.size = align_up(self._bytes, BLOCK_SIZE)

    def digest(self) -> bytes:
        """Return the sha256 of the content; raise `OSError`."""
        found = hashlib.sha256()
        offset = 0
        while piece := os.pread(self._fd, PIECE_BYTES, offset):
            found.update(piece)
            offset += len(piece)
        return found.digest()

    def opened(self) -> None:
        """Tell who wants to know."""
        if self._opened is not None:
            self._opened()

    def request(self, offset: int, length: int, done: Done) -> None:
        """Call `done`: everything is there."""
        done(None)

    def around(self, offset: int, length: int) -> Extent:
        """Return the piece, or the pieces, that hold a range."""
        start = offset - offset % PIECE_BYTES
        return start, min(align_up(offset + length, PIECE_BYTES), self.size)

    def copy(self, offset: int, view: memoryview) -> None:
        """Fill a buffer, with zeros behind the end; raise `CachefilesError`."""
        wanted = max(0, min(len(view), self._bytes - offset))
        try:
            count = os.preadv(self._fd, [view[:wanted]], offset)
        except OSError as error:
            raise CachefilesError(
                f"bootstrap cannot be read ({error.strerror})", error.errno or 0, offset=offset
            ) from error
        if count != wanted:
            raise CachefilesError("bootstrap was cut", offset=offset, expected=wanted, got=count)
        view[wanted:] = bytes(len(view) - wanted)

    def ahead(self) -> Iterator[Extent]:
        """Yield all of it."""
        for start in range(0, self.size, PIECE_BYTES):
            yield start, min(start + PIECE_BYTES, self.size)

    def listen(self, listener: Listener | None) -> None:
        """Do nothing: all was ready from the beginning."""


class BlobSource:
    """A blob and its data file.

    Args:
        blob: open, and attached to the fetcher behind `demand`, as long as this is used.
        demand: makes ranges ready.
        eager: copy what is ready already as soon as the kernel opens the file, because a prefetch
            will take no notice of it.
    """

    def __init__(self, blob: CachedBlob, demand: Demand, *, eager: bool) -> None:
        self.blob = blob
        self.size = blob.map.uncompressed_size
        self._demand = demand
        self._eager = eager
        self._listener: Listener | None = None

    def opened(self) -> None:
        """Do nothing: what comes with a mount comes with its bootstrap."""

    def request(self, offset: int, length: int, done: Done) -> None:
        """Fetch what is missing."""
        self._demand.request(self.blob, offset, length, done)

    def _extent(self, chunks: range) -> Extent:
        table = self.blob.map
        return table.uncompressed_offsets[chunks[0]], table.page_end(chunks[-1])

    def around(self, offset: int, length: int) -> Extent:
        """Return the extent of the chunks that hold a range; raise `OutOfBounds`."""
        return self._extent(self.blob.map.chunks_in(offset, length))

    def copy(self, offset: int, view: memoryview) -> None:
        """Fill a buffer from the data file; raise `CacheError`."""
        with error_context(blob=self.blob.blob_id):
            self.blob.copy_ready(offset, view)

    def ahead(self) -> Iterator[Extent]:
        """Yield the chunks that are ready, one by one, where that is wanted."""
        if self._eager:
            for position in self.blob.map.positions():
                if self.blob.chunks.is_ready(position):
                    yield self._extent(range(position, position + 1))

    def listen(self, listener: Listener | None) -> None:
        """Have somebody told of every chunk that becomes ready; see `Source`."""
        self._listener = listener
        others = tuple(item for item in self.blob.listeners if item != self._chunk_ready)
        self.blob.listeners = others if listener is None else (*others, self._chunk_ready)

    def _chunk_ready(self, position: int) -> None:
        listener = self._listener
        if listener is not None:
            listener(self._extent(range(position, position + 1)))
