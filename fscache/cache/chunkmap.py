"""Which chunks of a blob are in the cache: claims in memory, readiness bits on disk.

In memory a chunk is missing, pending (claimed by one fetch, with those who wait for it), or
ready. On disk there is nydusd's file (tools 6), which never says ready before the data is
durable. Nothing here reads or writes data.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from erofs.errors import NydusError
from fscache.cache.cachefile import CacheError, CacheFile, publish

__all__ = ["ChunkMap", "Waiter"]

logger = logging.getLogger(__name__)

HEADER_BYTES = 4096
MAGIC = 0x424D4150
MAGIC2 = 0x434D4150
VERSION = 1
ALL_READY = 0x4D4D4150
# magic, version, magic2, all_ready; the rest of the header is zero.
_HEADER = struct.Struct("<IIII")


def _map_size(chunk_count: int) -> int:
    return HEADER_BYTES + (chunk_count + 7) // 8


def _read_bits(fd: int, path: Path, chunk_count: int) -> bytearray | None:
    """Return the bits of a sound map of this many chunks, None (logged) for any other file."""
    size = os.fstat(fd).st_size
    if size != _map_size(chunk_count):
        logger.warning(
            "%s: chunk map discarded: expected %d bytes, got %d", path, _map_size(chunk_count), size
        )
        return None
    content = bytearray(os.pread(fd, size, 0))
    if len(content) != size or _HEADER.unpack_from(content)[:3] != (MAGIC, VERSION, MAGIC2):
        logger.warning("%s: chunk map discarded: not a chunk map of version 1", path)
        return None
    return content[HEADER_BYTES:]


def load_bits(path: Path, chunk_count: int) -> bytearray | None:
    """Return the readiness bits of a map file, None when there is no sound one.

    A file that is something else is removed. Raises `OSError`.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        bits = _read_bits(fd, path, chunk_count)
    finally:
        os.close(fd)
    if bits is None:
        path.unlink(missing_ok=True)
    return bits


def merge_bits(path: Path, chunk_count: int, indexes: Iterable[int]) -> None:
    """Set bits in the map file, durably, beside those that other processes set.

    The file is created when it is missing or broken. `all_ready` is set with the last bit.
    Raises `OSError` and `CacheError`.
    """
    if load_bits(path, chunk_count) is None:
        publish(path, _HEADER.pack(MAGIC, VERSION, MAGIC2, 0), _map_size(chunk_count))
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        bits = _read_bits(fd, path, chunk_count)
        if bits is None:
            raise CacheError("another process changes the chunk map", path=path)
        for index in indexes:
            bits[index >> 3] |= 0x80 >> (index & 7)
        if os.pwrite(fd, bits, HEADER_BYTES) != len(bits):
            raise CacheError("short write to the chunk map", path=path)
        if int.from_bytes(bits).bit_count() >= chunk_count:
            os.pwrite(fd, _HEADER.pack(MAGIC, VERSION, MAGIC2, ALL_READY), 0)
        os.fdatasync(fd)
    finally:
        os.close(fd)


class Waiter(Protocol):
    """Somebody who waits for chunks that are pending."""

    def chunk_done(self, error: NydusError | None) -> None:
        """Take the news that one of the chunks is ready, or failed with `error`."""


class ChunkMap:
    """Readiness of the known chunks of one blob, by index; safe for many threads.

    Args:
        path: the map file.
        known: one byte for each chunk of the blob: whether some image told where it is.
            Unknown ones count as ready, as there is nothing to do for them.

    A claim is settled by `complete` or `fail`, which return the waiters to the caller, who
    tells them; exactly once.
    """

    def __init__(self, path: Path, known: bytes | bytearray) -> None:
        self._path = path
        self._chunk_count = len(known)
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._known = bytearray(known)
        self._ready = bytearray(1 - byte for byte in known)
        self._ready_count = 0
        self._pending: dict[int, list[Waiter]] = {}
        self._unsynced: list[int] = []

    def load(self, present: Sequence[int]) -> None:
        """Take over the bits of the map file, before the first claim and after `know`.

        Args:
            present: by index, whether the data file has data there; a bit that stands for
                a hole is not believed (a data file that was replaced, nydusd after a power
                failure).

        Raises `CacheError`.
        """
        try:
            bits = load_bits(self._path, self._chunk_count)
            if bits is None:
                return
            refused = 0
            with self._lock:
                for index, known in enumerate(self._known):
                    if not known or self._ready[index] or index in self._pending:
                        continue
                    if bits[index >> 3] & (0x80 >> (index & 7)):
                        if present[index]:
                            self._ready[index] = 1
                            self._ready_count += 1
                        else:
                            refused += 1
                if refused:
                    self._unsynced = [
                        index
                        for index, known in enumerate(self._known)
                        if known and self._ready[index]
                    ]
            if refused:
                logger.warning("%s: %d ready chunks are holes: now missing", self._path, refused)
                # The next sync writes a map without them.
                self._path.unlink(missing_ok=True)
        except OSError as error:
            raise CacheError.of("cannot read the chunk map", error, path=self._path) from error

    def know(self, known: bytes | bytearray) -> None:
        """Learn of further chunks, which are missing until `load` finds them on disk."""
        with self._lock:
            for index, byte in enumerate(known):
                if byte and not self._known[index]:
                    self._known[index] = 1
                    self._ready[index] = 0

    @property
    def ready_count(self) -> int:
        """How many known chunks are ready."""
        return self._ready_count

    @property
    def is_complete(self) -> bool:
        """Whether every known chunk is ready."""
        return self._ready.find(0) < 0

    @property
    def is_dirty(self) -> bool:
        """Whether some chunk is ready in memory and not yet on disk."""
        return bool(self._unsynced)

    def is_ready(self, position: int) -> bool:
        """Tell whether one chunk is ready, without the lock."""
        return bool(self._ready[position])

    def all_ready(self, positions: range) -> bool:
        """Tell whether every chunk of a range is ready, without the lock."""
        return self._ready.find(0, positions.start, positions.stop) < 0

    def first_missing(self, start: int) -> int:
        """Return the first index from one on that is not ready, without the lock; -1 for none."""
        return self._ready.find(0, start)

    def missing_until(self, start: int, stop: int) -> int:
        """Return where a stretch that nobody has or fetches ends: from `start`, before `stop`."""
        with self._lock:
            end = self._ready.find(1, start, stop)
            end = stop if end < 0 else end
            return next((index for index in range(start, end) if index in self._pending), end)

    def claim(
        self, positions: range, waiter: Waiter, around: range | None = None
    ) -> tuple[list[int], int]:
        """Make `waiter` wait for each chunk of the range that is not ready.

        Args:
            positions: what is wanted.
            waiter: told once for each chunk.
            around: a range around it, whose missing chunks are claimed as well because they
                are fetched together; nobody waits for those.

        Returns the positions which the caller now has to fetch, because nobody did so yet,
        and the number of chunks the waiter waits for.
        """
        mine = []
        waiting = 0
        with self._lock:
            for position in positions if around is None else around:
                if self._ready[position]:
                    continue
                waiters = self._pending.get(position)
                if waiters is None:
                    waiters = self._pending[position] = []
                    mine.append(position)
                if position in positions:
                    waiting += 1
                    waiters.append(waiter)
        return mine, waiting

    def complete(self, *positions: int) -> list[Waiter]:
        """Mark claimed chunks, whose data is written, as ready; return who waits for them."""
        waiters: list[Waiter] = []
        with self._lock:
            for position in positions:
                self._ready[position] = 1
                waiters += self._pending.pop(position)
            self._ready_count += len(positions)
            self._unsynced += positions
        return waiters

    def fail(self, position: int) -> list[Waiter]:
        """Give up the claim on a chunk, which stays missing; return who waits for it."""
        with self._lock:
            return self._pending.pop(position)

    def forget(self) -> None:
        """Make every chunk missing again, also on disk: what was written turned out wrong.

        Only when none is pending. Raises `CacheError`.
        """
        with self._sync_lock:
            with self._lock:
                self._ready = bytearray(1 - byte for byte in self._known)
                self._ready_count = 0
                self._unsynced = []
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:
                raise CacheError.of(
                    "cannot remove the chunk map", error, path=self._path
                ) from error

    def sync(self, data: CacheFile) -> bool:
        """Make the data durable, then the bits of the chunks that were ready before.

        Returns whether every known chunk is ready and durable now.

        Raises `CacheError`. When the data could not be synced the kernel may have dropped
        it, so those chunks become missing again. When only the map could not be written they
        stay ready and are tried again by the next call.
        """
        with self._sync_lock:
            with self._lock:
                fresh, self._unsynced = self._unsynced, []
            if fresh:
                self._store(data, fresh)
            with self._lock:
                return self.is_complete and not self._unsynced

    def _store(self, data: CacheFile, fresh: list[int]) -> None:
        try:
            data.sync()
        except CacheError:
            self._revert(fresh)
            raise
        try:
            # Bits belong to the file under that name, which must be the one just synced.
            data.check_place()
            merge_bits(self._path, self._chunk_count, fresh)
        except (CacheError, OSError) as error:
            with self._lock:
                self._unsynced += fresh
            if isinstance(error, CacheError):
                raise
            raise CacheError.of("cannot write the chunk map", error, path=self._path) from error

    def _revert(self, positions: list[int]) -> None:
        with self._lock:
            for position in positions:
                self._ready[position] = 0
            self._ready_count -= len(positions)
