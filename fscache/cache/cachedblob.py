"""One blob of an image with its cache: how a chunk gets from the backend into the data file.

No threads and no waiting here; who fetches what and when is `fscache.fetch.fetcher`'s business.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from erofs.citable import CompressionTable
from erofs.digest import digest
from erofs.errors import CodecError, IntegrityError, error_context
from erofs.rafs import BlobEntry, ChunkInfo
from fscache.backend.base import BackendError, BlobReader
from fscache.backend.retry import RetryPolicy
from fscache.cache.blobmap import BlobMap
from fscache.cache.cachefile import CacheError, CacheFile
from fscache.cache.chunkmap import ChunkMap
from fscache.cache.layer import tables_of
from fscache.cache.places import NO_CONTEXT, Places
from fscache.cache.streams import Streams
from fscache.cache.tablefile import TableFile
from fscache.cache.window import Window
from fscache.metrics import CacheMetrics
from fscache.trace import Trace

__all__ = ["CachedBlob", "Unpacker"]

logger = logging.getLogger(__name__)

_SHA256 = re.compile("[0-9a-f]{64}")
# How far to be ahead of a sequential reader: enough to have requests under way all the time,
# also when an answer takes 20 ms to begin.
AHEAD_CHUNKS = 4
AHEAD_BYTES = 16 << 20


class Unpacker:
    """Decrypts and decompresses the stored chunks of one run; a context once for all its chunks.

    Args:
        table: is located.
    """

    def __init__(self, table: BlobMap) -> None:
        self.table = table
        self._context = NO_CONTEXT
        self._buffer = memoryview(b"")

    def unpack(self, position: int, stored: memoryview) -> bytes | memoryview:
        """Return a chunk, not yet verified; raise `CodecError`."""
        table = self.table
        size = table.uncompressed_sizes[position]
        number = table.context(position)
        if number == NO_CONTEXT or table.places is None:
            return table.data.chunk(
                stored,
                size,
                compressed=bool(table.compressed[position]),
                encrypted=table.is_encrypted,
            )
        if number != self._context:
            self._buffer = memoryview(table.places.unpack(number, stored, table.data))
            self._context = number
        start = table.places.context_offsets[position]
        return self._buffer[start : start + size]

    def unpack_all(
        self, batch: range, stored: Sequence[memoryview]
    ) -> Sequence[bytes | memoryview]:
        """Return a batch of chunks, not yet verified; raise `CodecError`."""
        table = self.table
        packed = [number for number, at in enumerate(batch) if table.compressed[at]]
        found: list[bytes | memoryview] = list(stored)
        unpacked = table.data.chunks(
            [stored[number] for number in packed],
            [table.uncompressed_sizes[batch[number]] for number in packed],
        )
        for number, data in zip(packed, unpacked, strict=True):
            found[number] = data
        return found


def _check_digest(table: BlobMap, position: int, data: bytes | memoryview) -> None:
    if not table.has_digests:
        return
    expected = table.digest(position)
    got = digest(table.digester, data)
    if got != expected:
        raise IntegrityError("chunk has the wrong digest", expected=expected.hex(), got=got.hex())


class CachedBlob:
    """Reader, map, data file and chunk map of one blob; made by `open`, used by one `Fetcher`.

    `map` and `chunks` are the tables, `cache` is the data file, which this object owns, `retry`
    says how reads of the backend are repeated, `streams` and `window` what to fetch with and
    ahead of what is read, `traces` are told of every read, `listeners` of every chunk that has
    become ready, by its position; they must be short.
    """

    def __init__(
        self,
        reader: BlobReader,
        blob_map: BlobMap,
        cache: CacheFile,
        chunks: ChunkMap,
        metrics: CacheMetrics,
        on_complete: Callable[[], None] | None,
        table_file: TableFile,
    ) -> None:
        self.blob_id = reader.blob_id
        self.map = blob_map
        self.cache = cache
        self.chunks = chunks
        self.metrics = metrics
        self.retry = RetryPolicy()
        # Of the images whose reads are recorded.
        self.traces: tuple[Trace, ...] = ()
        self.listeners: tuple[Callable[[int], None], ...] = ()
        self.streams = Streams(max(AHEAD_CHUNKS, AHEAD_BYTES // blob_map.entry.chunk_size))
        self.window = Window()
        self._readers: tuple[BlobReader, ...] = (reader,)
        self._on_complete = on_complete
        self._table_file = table_file
        # Held while the blob is asked for its table, and while the map is changed.
        self._locate_lock = threading.Lock()
        self._map_lock = threading.Lock()
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        self._completed = False
        # Of a tar: whether it has the digest that it is named by; the map on disk does not tell.
        self._is_verified = blob_map.has_digests
        self._wrong_digest = ""
        metrics.add_file(cache.path.name, chunks.ready_count)

    @classmethod
    def open(
        cls,
        directory: Path,
        entry: BlobEntry,
        chunks: Iterable[ChunkInfo],
        reader: BlobReader,
        metrics: CacheMetrics,
        on_complete: Callable[[], None] | None = None,
    ) -> CachedBlob:
        """Check the tables, open or create the data file, and load the chunk map.

        Args:
            directory: the work directory, which must not be marked (ondemand 5.8).
            entry: the blob table entry.
            chunks: the chunk info table entries of this blob.
            reader: where the blob is stored; its id names the files.
            metrics: counters of the image.
            on_complete: called by a thread of the fetcher when the last known chunk is ready
                and durable, also when that was so from the start; again after `learn`.

        Raises `FormatError`, `CacheError`, and `BackendError` for a refused id.
        """
        blob_map = BlobMap(entry, chunks)
        table_file = TableFile(directory, reader.blob_id, entry)
        cache = CacheFile.open(directory, reader.blob_id, blob_map.uncompressed_size)
        try:
            chunk_map = ChunkMap(cache.map_path, blob_map.known)
            chunk_map.load(blob_map.covered_by(cache.data_ranges()))
        except BaseException:
            cache.close()
            raise
        return cls(reader, blob_map, cache, chunk_map, metrics, on_complete, table_file)

    def learn(self, entry: BlobEntry, chunks: Iterable[ChunkInfo]) -> bool:
        """Take over the chunks of another image on the same blob; return whether some are new.

        Raises `FormatError` when the images contradict each other, and `CacheError`.
        """
        with self._map_lock:
            wider = self.map.with_chunks(entry, chunks)
            if wider is self.map:
                return False
            with self.in_use(), self._lock:
                # In this order: whoever has the new map finds its chunks missing, not ready.
                self.chunks.know(wider.known)
                self.map = wider
                self._completed = False
        before = self.chunks.ready_count
        self.chunks.load(wider.covered_by(self.cache.data_ranges()))
        self.metrics.add_chunks(self.cache.path.name, self.chunks.ready_count - before)
        return True

    @property
    def path(self) -> Path:
        """The data file."""
        return self.cache.path

    @property
    def is_complete(self) -> bool:
        """Whether every known chunk is ready, perhaps not yet durable."""
        return self.chunks.is_complete

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the descriptor open during the block; raise `CacheError` after `close`."""
        with self._lock:
            if self._closed:
                raise CacheError("blob is closed", blob=self.blob_id)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                last = self._closed and self._users == 0
            if last:
                self.cache.close()

    def close(self) -> None:
        """Refuse further use; the descriptor is closed when its last user is done."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle = self._users == 0
        self.metrics.remove_file(self.cache.path.name, self.chunks.ready_count)
        if idle:
            self.cache.close()

    def use_readers(self, readers: Sequence[BlobReader]) -> None:
        """Read from these from now on: each image that holds the blob brings its own."""
        self._readers = tuple(readers)

    def locate(self, stop: threading.Event) -> BlobMap:
        """Return a map that knows where the chunks are stored; ask the blob itself if need be.

        One thread asks, others wait for it. What is in the cache is used when it goes with the
        bootstrap. Raises `NydusError`.
        """
        if self.map.is_located:
            return self.map
        with self._locate_lock:
            if self.map.is_located:
                return self.map
            return self._table_file.use(self._place, partial(self._ask_tables, stop))

    def load_table(self, stop: threading.Event) -> CompressionTable:
        """Return the blob's own table, which knows all of its chunks; raise `NydusError`."""
        with self._locate_lock:
            return self._table_file.use(lambda table: table, partial(self._ask_tables, stop))

    def read_stored(self, start: int, length: int, stop: threading.Event) -> bytes:
        """Return a range of the stored blob, with repetitions; raise `BackendError`."""
        return self.retry.run(lambda: self._ask(start, length, self._readers), stop)

    def _ask_tables(self, stop: threading.Event, start: int, length: int) -> bytes:
        readers = [tables_of(reader) for reader in self._readers]
        return self.retry.run(lambda: self._ask(start, length, readers), stop)

    def _place(self, table: CompressionTable) -> BlobMap:
        places = Places(table)
        with self._map_lock:
            self.map = self.map.with_places(places)
            return self.map

    def _distrust(self, table: BlobMap) -> None:
        """Forget the blob's own table, which gave a wrong chunk: the next read asks again."""
        with self._map_lock:
            if self.map.places is table.places:
                self.map = self.map.with_places(None)
                self._table_file.discard()

    def stored_range(self, positions: range) -> tuple[int, int]:
        """Return offset and length in the stored blob of a run of `BlobMap.groups`."""
        return self.map.stored_range(positions)

    def read(self, table: BlobMap, positions: Sequence[int]) -> bytes:
        """Return the stored bytes of a run of `table.groups`, one attempt with each reader.

        Raises `BackendError`, that of the last reader.
        """
        return self._ask(*table.stored_range(positions), self._readers)

    def _ask(self, start: int, length: int, readers: Sequence[BlobReader]) -> bytes:
        *others, last = readers
        for reader in others:
            try:
                return self._read(reader, start, length)
            except BackendError as error:
                logger.info("another image's backend is asked: %s", error)
        return self._read(last, start, length)

    def _read(self, reader: BlobReader, start: int, length: int) -> bytes:
        begin = time.monotonic()
        data = reader.read_at(start, length)
        self.window.answered(time.monotonic() - begin, length)
        if len(data) != length:
            raise IntegrityError(
                "backend gave the wrong length",
                blob=self.blob_id,
                offset=start,
                expected=length,
                got=len(data),
            )
        return data

    def store(self, position: int, stored: memoryview, unpacker: Unpacker) -> None:
        """Decompress a chunk, verify its digest, and write it; nothing bad is ever written.

        Args:
            position: of the chunk.
            stored: what has to be read for it.
            unpacker: of the run.

        Raises `CodecError`, `IntegrityError`, `CacheError`.
        """
        self._require_trust()
        table = unpacker.table
        with error_context(blob=self.blob_id, chunk=position):
            try:
                data = unpacker.unpack(position, stored)
                _check_digest(table, position, data)
            except (CodecError, IntegrityError):
                self.metrics.digest_failure()
                if table.context(position) != NO_CONTEXT:
                    self._distrust(table)
                raise
            self.cache.write(table.uncompressed_offsets[position], data)

    def store_all(self, batch: range, stored: Sequence[memoryview], unpacker: Unpacker) -> None:
        """Do what `store` does for a batch, all of it or nothing.

        Args:
            batch: of `BlobMap.batches`.
            stored: what has to be read for each of its chunks.
            unpacker: of the run.

        Raises `CodecError`, `IntegrityError`, `CacheError`; `store` tells which chunk is bad.
        """
        self._require_trust()
        table = unpacker.table
        contents = unpacker.unpack_all(batch, stored)
        for position, data in zip(batch, contents, strict=True):
            if len(data) != table.uncompressed_sizes[position]:
                raise CodecError("stored chunk of the wrong length", chunk=position)
            _check_digest(table, position, data)
        self.cache.write(table.uncompressed_offsets[batch[0]], *contents)

    def read_ready(self, offset: int, length: int) -> bytes:
        """Return bytes of chunks that are ready, from the data file; raise `CacheError`."""
        with self.in_use():
            return self.cache.read(offset, length)

    def copy_ready(self, offset: int, view: memoryview) -> None:
        """Fill a buffer from chunks that are ready; raise `CacheError`."""
        with self.in_use():
            self.cache.check()
            self.cache.read_into(offset, view)

    def sync(self) -> None:
        """Make ready chunks durable, and tell `on_complete` when those are all; once.

        Raises `CacheError`, and `IntegrityError` for a complete tar that is a wrong one.
        """
        with self.in_use():
            self._check_whole()
            if not self.chunks.sync(self.cache) or not self._is_verified:
                return
            with self._lock:
                if self._completed:
                    return
                self._completed = True
            self.metrics.complete_file(self.cache.path.name)
            logger.info("blob %s is complete", self.blob_id)
            if self._on_complete is not None:
                self._on_complete()

    def _check_whole(self) -> None:
        """Verify a complete blob whose chunks have no digests.

        When it is wrong nothing of it is ready any more, and no read of it succeeds.
        """
        self._require_trust()
        if self._is_verified or not self.chunks.is_complete:
            return
        if not _SHA256.fullmatch(self.blob_id):
            logger.warning("blob %s cannot be verified: it is not named by a digest", self.blob_id)
            self._is_verified = True
            return
        found = self.cache.sha256(self.map.entry.compressed_size)
        if found == self.blob_id:
            self._is_verified = True
            return
        self._wrong_digest = found
        self.metrics.digest_failure()
        self.metrics.add_chunks(self.cache.path.name, -self.chunks.ready_count)
        self.chunks.forget()
        self._require_trust()

    def _require_trust(self) -> None:
        """Raise `IntegrityError` when the blob turned out to be another one."""
        if self._wrong_digest:
            raise IntegrityError(
                "blob does not have the digest that it is named by",
                blob=self.blob_id,
                expected=self.blob_id,
                got=self._wrong_digest,
            )

    @property
    def wants_sync(self) -> bool:
        """Whether `sync` has something to do."""
        return self.chunks.is_dirty or (self.chunks.is_complete and not self._completed)
