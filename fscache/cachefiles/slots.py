"""Names in the kernel's cache: what each is filled from, and how often the kernel has it open."""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

from fscache.cachefiles.errors import CachefilesError
from fscache.cachefiles.machine import KernelObject
from fscache.cachefiles.sources import Extent, Source

__all__ = ["Filling", "Slot"]


class Filling:
    """One opening of a file, and what is copied into it unasked; safe for many threads.

    Args:
        target: the opening.
        slot: its name.
        begin: finds a worker, who takes extents until there are none.
    """

    def __init__(self, target: KernelObject, slot: Slot, begin: Callable[[Filling], None]) -> None:
        self.target = target
        self.slot = slot
        self._begin = begin
        self._lock = threading.Lock()
        self._fresh: deque[Extent] = deque()
        self._ready: Iterator[Extent] = iter(())
        self._at_work = False
        self._claimed: set[Extent] = set()

    def add(self, extent: Extent) -> None:
        """Have an extent copied that has become ready."""
        with self._lock:
            self._fresh.append(extent)
        self._start()

    def follow(self, extents: Iterator[Extent]) -> None:
        """Have extents copied that were ready before."""
        with self._lock:
            self._ready = extents
        self._start()

    def _start(self) -> None:
        with self._lock:
            if self._at_work:
                return
            self._at_work = True
        self._begin(self)

    def take(self) -> Extent | None:
        """Return what is next for the worker, None when it is through."""
        with self._lock:
            extent = self._fresh.popleft() if self._fresh else next(self._ready, None)
            self._at_work = extent is not None
            return extent

    def give_up(self) -> None:
        """Forget all that is left, and the worker: readers will ask."""
        with self._lock:
            self._fresh.clear()
            self._ready = iter(())
            self._at_work = False

    def claim(self, extent: Extent) -> bool:
        """Begin to copy an extent; False when another worker does. `release` follows True."""
        with self._lock:
            if extent in self._claimed:
                return False
            self._claimed.add(extent)
            return True

    def release(self, extent: Extent) -> None:
        """End a claim."""
        with self._lock:
            self._claimed.discard(extent)


class Slot:
    """One name: sources that hold the same bytes, and its openings.

    Args:
        scope: the domain, or the fsid of a mount without one.
        name: fsid or blob id.
        size: of the file, in whole pages.
        digest: of a bootstrap's content; a blob's id says it.
    """

    def __init__(self, scope: str, name: str, size: int, digest: bytes = b"") -> None:
        self.scope = scope
        self.name = name
        self.size = size
        self.digest = digest
        self._lock = threading.Lock()
        self._sources: list[Source] = []
        self._fillings: tuple[Filling, ...] = ()

    @property
    def source(self) -> Source:
        """What the file is filled from now; there is one as long as the kernel may ask.

        Raises `CachefilesError` after that.
        """
        sources = self._sources
        if not sources:
            raise CachefilesError("not served any more", errno.ENOENT, blob=self.name)
        return sources[0]

    def ahead(self) -> Iterator[Extent]:
        """Yield what is ready and is to be copied before it is read; raise `NydusError`."""
        yield from self.source.ahead()

    @property
    def is_open(self) -> bool:
        """Whether the kernel has it open."""
        return bool(self._fillings)

    @property
    def count(self) -> int:
        """How many sources there are."""
        return len(self._sources)

    def add(self, source: Source) -> None:
        """Fill the file from a further source, when those before it are gone."""
        with self._lock:
            self._sources.append(source)
        source.listen(partial(self._became_ready, source))

    def put_last(self, source: Source) -> None:
        """Prefer all others, because this one may lose its files."""
        with self._lock:
            self._sources = [item for item in self._sources if item is not source] + [source]

    def remove(self, source: Source) -> None:
        """Fill the file from this source no longer."""
        source.listen(None)
        with self._lock:
            self._sources = [item for item in self._sources if item is not source]

    def open(self, target: KernelObject, begin: Callable[[Filling], None]) -> Filling:
        """Note an opening; `close` has to be called in the end."""
        filling = Filling(target, self, begin)
        with self._lock:
            self._fillings += (filling,)
        self.source.opened()
        return filling

    def close(self, filling: Filling) -> None:
        """Forget an opening."""
        with self._lock:
            self._fillings = tuple(item for item in self._fillings if item is not filling)

    def _became_ready(self, source: Source, extent: Extent) -> None:
        if self._sources and self._sources[0] is source:
            for filling in self._fillings:
                filling.add(extent)
