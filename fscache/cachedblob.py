"""One blob of an image with its cache: how a chunk gets from the backend into the data file.

No threads and no waiting here; who fetches what and when is `fscache.fetcher`'s business.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from erofs.codec import decompress
from erofs.digest import digest
from erofs.errors import CodecError, IntegrityError, error_context
from erofs.rafs import BlobEntry, ChunkInfo
from fscache.backend.base import BackendError, BlobReader
from fscache.backend.retry import RetryPolicy
from fscache.blobmap import BlobMap
from fscache.cachefile import CacheError, CacheFile
from fscache.chunkmap import ChunkMap
from fscache.metrics import CacheMetrics
from fscache.streams import Streams

__all__ = ["CachedBlob"]

logger = logging.getLogger(__name__)

# How far to be ahead of a sequential reader: enough to have requests under way all the time.
AHEAD_CHUNKS = 4
AHEAD_BYTES = 4 << 20


class CachedBlob:
    """Reader, map, data file and chunk map of one blob; made by `open`, used by one `Fetcher`.

    `map` and `chunks` are the tables, `cache` is the data file, which this object owns, `retry`
    says how reads of the backend are repeated.
    """

    def __init__(
        self,
        reader: BlobReader,
        blob_map: BlobMap,
        cache: CacheFile,
        chunks: ChunkMap,
        metrics: CacheMetrics,
        on_complete: Callable[[], None] | None,
    ) -> None:
        self.blob_id = reader.blob_id
        self.map = blob_map
        self.cache = cache
        self.chunks = chunks
        self.metrics = metrics
        self.retry = RetryPolicy()
        self.streams = Streams(max(AHEAD_CHUNKS, AHEAD_BYTES // blob_map.entry.chunk_size))
        self._readers: tuple[BlobReader, ...] = (reader,)
        self._on_complete = on_complete
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        self._completed = False
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
        cache = CacheFile.open(directory, reader.blob_id, blob_map.uncompressed_size)
        try:
            chunk_map = ChunkMap(cache.map_path, blob_map.known)
            chunk_map.load(blob_map.covered_by(cache.data_ranges()))
        except BaseException:
            cache.close()
            raise
        return cls(reader, blob_map, cache, chunk_map, metrics, on_complete)

    def learn(self, entry: BlobEntry, chunks: Iterable[ChunkInfo]) -> bool:
        """Take over the chunks of another image on the same blob; return whether some are new.

        Raises `FormatError` when the images contradict each other, and `CacheError`.
        """
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

    def read(self, positions: range) -> bytes:
        """Return the stored bytes of a run of `BlobMap.groups`, one attempt with each reader.

        Raises `BackendError`, that of the last reader.
        """
        start = self.map.compressed_offsets[positions[0]]
        length = self.map.compressed_end(positions[-1]) - start
        *others, last = self._readers
        for reader in others:
            try:
                return self._read(reader, start, length)
            except BackendError as error:
                logger.info("another image's backend is asked: %s", error)
        return self._read(last, start, length)

    def _read(self, reader: BlobReader, start: int, length: int) -> bytes:
        data = reader.read_at(start, length)
        if len(data) != length:
            raise IntegrityError(
                "backend gave the wrong length",
                blob=self.blob_id,
                offset=start,
                expected=length,
                got=len(data),
            )
        return data

    def store(self, position: int, stored: memoryview) -> None:
        """Decompress a chunk, verify its digest, and write it; nothing bad is ever written.

        Raises `CodecError`, `IntegrityError`, `CacheError`.
        """
        table = self.map
        with error_context(blob=self.blob_id, chunk=position):
            data: bytes | memoryview = stored
            if table.compressed[position]:
                try:
                    data = decompress(table.compressor, stored, table.uncompressed_sizes[position])
                except CodecError:
                    self.metrics.digest_failure()
                    raise
            expected = table.digest(position)
            got = digest(table.digester, data)
            if got != expected:
                self.metrics.digest_failure()
                raise IntegrityError(
                    "chunk has the wrong digest", expected=expected.hex(), got=got.hex()
                )
            self.cache.write(table.uncompressed_offsets[position], data)

    def sync(self) -> None:
        """Make ready chunks durable, and tell `on_complete` when those are all; once.

        Raises `CacheError`.
        """
        with self.in_use():
            if not self.chunks.sync(self.cache):
                return
            with self._lock:
                if self._completed:
                    return
                self._completed = True
            self.metrics.complete_file(self.cache.path.name)
            logger.info("blob %s is complete", self.blob_id)
            if self._on_complete is not None:
                self._on_complete()

    @property
    def wants_sync(self) -> bool:
        """Whether `sync` has something to do."""
        return self.chunks.is_dirty or (self.chunks.is_complete and not self._completed)
