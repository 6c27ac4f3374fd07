"""Cut files into chunks, and digest and compress them on all cores in a fixed order.

Content streams through: no more than `IN_FLIGHT_BYTES` of it is in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from builder.blob import BlobFormat, BlobWriter, Stored
from builder.blobtable import BlobTable
from builder.chunkdict import ChunkDictionary
from builder.packer import Packer
from erofs import Chunk, Node, digest

__all__ = ["Chunker", "ContentReader", "Deduplication", "Worked"]

# A hop to another thread costs about 25 µs, so little chunks are worked on in place.
INLINE_BYTES = 32 * 1024
IN_FLIGHT_BYTES = 32 * 1024 * 1024


class ContentReader(Protocol):
    """What gives a file's content, front to back."""

    def readinto(self, buffer: memoryview) -> int:
        """Fill as much of `buffer` as there is; raise when the source ends too early."""


class Worked(NamedTuple):
    """A chunk that a worker has looked at; `stored` is None where that is not needed yet."""

    data: bytearray
    digest: bytes
    crc32c: int
    stored: Stored | None


@dataclass(slots=True)
class Deduplication:
    """Which chunks need not be stored again.

    Args:
        table: numbers the blobs of the image.
        dictionary: is asked first.
        known: chunks of the image, by digest and uncompressed size; more are added.
    """

    table: BlobTable = field(default_factory=BlobTable)
    dictionary: ChunkDictionary | None = None
    known: dict[tuple[bytes, int], Chunk] = field(default_factory=dict)

    def find(self, key: tuple[bytes, int]) -> Chunk | None:
        """Return the chunk to refer to, None for a new one."""
        if self.dictionary is not None:
            found = self.dictionary.find(*key, self.table)
            if found is not None:
                return found
        return self.known.get(key)

    def new_chunk(self, digest: bytes, size: int, crc32c: int = 0) -> Chunk:
        """Return a chunk of the image's own blob that has no place yet."""
        return Chunk(
            digest=digest,
            blob_index=self.table.own(),
            flags=0,
            compressed_size=0,
            uncompressed_size=size,
            compressed_offset=0,
            uncompressed_offset=0,
            file_offset=0,
            chunk_index=0,
            crc32c=crc32c,
        )


@dataclass(slots=True)
class ChunkerStats:
    """What the chunker did with the content, in chunks and bytes before compression."""

    chunks: int = 0
    content_bytes: int = 0
    duplicate_chunks: int = 0
    duplicate_bytes: int = 0


class Chunker:
    """Feeds a blob with the distinct chunks of files, in the order in which files are added.

    Use as a context manager; `finish` must be called before the blob is sealed. Every
    `Node.chunks` is complete only then.

    Args:
        blob: takes the new chunks.
        form: how they are digested and stored.
        dedup: what is known before.
        progress: called with the number of bytes after each chunk.
        workers: threads; the output does not depend on it.
    """

    def __init__(
        self,
        blob: BlobWriter,
        form: BlobFormat,
        dedup: Deduplication | None = None,
        progress: Callable[[int], None] | None = None,
        workers: int | None = None,
    ) -> None:
        self._form = form
        self._dedup = dedup or Deduplication()
        self._progress = progress
        self._queue: deque[tuple[Node, int, Future[Worked] | Worked]] = deque()
        self._in_flight = 0
        self._pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, "chunker")
        self._packer = Packer(blob, form, self._pool)
        self.stats = ChunkerStats()

    def add_file(self, node: Node, content: ContentReader) -> None:
        """Cut `node.size` bytes of `content`; `node.chunks` fills up in order.

        Raises:
            BuildError: the content ends early or cannot be read.
        """
        rest, chunk_size = node.size, self._form.chunk_size
        is_small = rest < self._form.batch_size // 2
        while rest:
            size = min(rest, chunk_size)
            data = bytearray(size)
            content.readinto(memoryview(data))
            self._submit(node, data, partial(self._work, data, is_small))
            rest -= size

    def _submit(self, node: Node, data: bytearray, work: Callable[[], Worked]) -> None:
        job: Future[Worked] | Worked
        job = work() if len(data) <= INLINE_BYTES else self._pool.submit(work)
        self._queue.append((node, len(data), job))
        self._in_flight += len(data)
        while self._in_flight > IN_FLIGHT_BYTES or (self._queue and _is_done(self._queue[0][2])):
            self._consume()

    def _work(self, data: bytearray, is_small: bool) -> Worked:
        view = memoryview(data)
        name = digest.digest(self._form.digester, view)
        # Chunks only ever become known, so a hit here stays one; a miss is looked at again.
        if (name, len(data)) in self._dedup.known:
            return Worked(data, name, 0, None)
        # What goes into a batch is encoded with it.
        stored = None if is_small else self._form.encode(view)
        return Worked(data, name, digest.crc32c(view), stored)

    def _consume(self) -> None:
        node, size, job = self._queue.popleft()
        worked = job.result() if isinstance(job, Future) else job
        self._in_flight -= size
        self.stats.chunks += 1
        self.stats.content_bytes += size
        key = (worked.digest, size)
        chunk = self._dedup.find(key)
        if chunk is None:
            chunk = self._dedup.known[key] = self._new_chunk(worked)
        else:
            self.stats.duplicate_chunks += 1
            self.stats.duplicate_bytes += size
        node.chunks.append(chunk)
        if self._progress is not None:
            self._progress(size)

    def _new_chunk(self, worked: Worked) -> Chunk:
        chunk = self._dedup.new_chunk(worked.digest, len(worked.data), worked.crc32c)
        if worked.stored is None:
            self._packer.add_small(chunk, worked.data)
        else:
            self._packer.add(chunk, worked.data, worked.stored)
        return chunk

    def finish(self) -> None:
        """Wait for all chunks to be in the blob."""
        while self._queue:
            self._consume()
        self._packer.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _is_done(job: Future[Worked] | Worked) -> bool:
    return not isinstance(job, Future) or job.done()
