"""Cut files into chunks, and digest and compress them on all cores in a fixed order.

Content streams through: no more than `IN_FLIGHT_BYTES` of it is in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from builder.blob import BlobWriter
from erofs import Chunk, Node, codec, digest
from erofs.rafs import Compressor, Digester

__all__ = ["Chunker", "ContentReader"]

# A hop to another thread costs about 25 µs, so little chunks are worked on in place.
INLINE_BYTES = 32 * 1024
IN_FLIGHT_BYTES = 32 * 1024 * 1024


class ContentReader(Protocol):
    """What gives a file's content, front to back."""

    def readinto(self, buffer: memoryview) -> int:
        """Fill as much of `buffer` as there is; raise when the source ends too early."""


class _Worked(NamedTuple):
    """A chunk that a worker has looked at; `compressed` None means "store it as it is"."""

    data: bytearray
    digest: bytes
    crc32c: int
    compressed: bytes | None


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
        progress: called with the number of bytes after each chunk.
        workers: threads; the output does not depend on it.
    """

    def __init__(
        self,
        blob: BlobWriter,
        compressor: Compressor,
        digester: Digester,
        chunk_size: int,
        progress: Callable[[int], None] | None = None,
        workers: int | None = None,
    ) -> None:
        self._blob = blob
        self._compressor = compressor
        self._digester = digester
        self._chunk_size = chunk_size
        self._progress = progress
        self._known: dict[tuple[bytes, int], Chunk] = {}
        self._queue: deque[tuple[Node, int, Future[_Worked] | _Worked]] = deque()
        self._in_flight = 0
        self._pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, "chunker")
        self.stats = ChunkerStats()

    def add_file(self, node: Node, content: ContentReader) -> None:
        """Cut `node.size` bytes of `content`; `node.chunks` fills up in order.

        Raises:
            BuildError: the content ends early or cannot be read.
        """
        rest = node.size
        while rest:
            size = min(rest, self._chunk_size)
            data = bytearray(size)
            content.readinto(memoryview(data))
            self._submit(node, data)
            rest -= size

    def _submit(self, node: Node, data: bytearray) -> None:
        job: Future[_Worked] | _Worked
        if len(data) <= INLINE_BYTES:
            job = self._work(data)
        else:
            job = self._pool.submit(self._work, data)
        self._queue.append((node, len(data), job))
        self._in_flight += len(data)
        while self._in_flight > IN_FLIGHT_BYTES or (self._queue and _is_done(self._queue[0][2])):
            self._consume()

    def _work(self, data: bytearray) -> _Worked:
        view = memoryview(data)
        name = digest.digest(self._digester, view)
        # Chunks only ever become known, so a hit here stays one; a miss is looked at again.
        if (name, len(data)) in self._known:
            return _Worked(data, name, 0, None)
        return _Worked(data, name, digest.crc32c(view), codec.compress(self._compressor, view))

    def _consume(self) -> None:
        node, size, job = self._queue.popleft()
        worked = job.result() if isinstance(job, Future) else job
        self._in_flight -= size
        self.stats.chunks += 1
        self.stats.content_bytes += size
        key = (worked.digest, size)
        chunk = self._known.get(key)
        if chunk is None:
            chunk = self._blob.append_chunk(
                worked.data, worked.compressed, worked.digest, worked.crc32c
            )
            self._known[key] = chunk
        else:
            self.stats.duplicate_chunks += 1
            self.stats.duplicate_bytes += size
        node.chunks.append(chunk)
        if self._progress is not None:
            self._progress(size)

    def finish(self) -> None:
        """Wait for all chunks to be in the blob."""
        while self._queue:
            self._consume()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _is_done(job: Future[_Worked] | _Worked) -> bool:
    return not isinstance(job, Future) or job.done()
