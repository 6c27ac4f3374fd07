"""Cut files into chunks, and digest and compress them on all cores in a fixed order.

Content streams through: no more than `IN_FLIGHT_BYTES` of it is in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from builder.blob import BlobFormat, BlobWriter, Data, Place, Stored
from builder.blobtable import BlobTable
from builder.forked import Worked
from builder.packer import Packer
from erofs import Chunk, Node, digest

if TYPE_CHECKING:
    from builder.chunkdict import ChunkDictionary

__all__ = ["Chunker", "ContentReader", "Deduplication", "Piece", "Span"]

# A hop to another thread costs about 25 µs, so workers get this much of small pieces at once.
SPAN_BYTES = 1 << 20
SPAN_PIECES = 512
IN_FLIGHT_BYTES = 32 << 20


class ContentReader(Protocol):
    """What gives a file's content, front to back."""

    def read(self, length: int, /) -> bytes | bytearray:
        """Return as many bytes; raise when the source ends too early."""


class Piece(NamedTuple):
    """The content of a chunk, and the file that it is of.

    `is_small` is for those that go into a batch; `place` for what is in a layer already.
    """

    node: Node
    data: Data
    is_small: bool = False
    place: Place | None = None


class Span(NamedTuple):
    """Chunks that are worked on together: the file and the size of each, and of all."""

    nodes: Sequence[Node]
    sizes: Sequence[int]
    size: int
    job: Job


class Job(Protocol):
    """What is being found out; a `Future` is one."""

    def done(self) -> bool:
        """Tell whether it need not be waited for."""

    def result(self) -> list[Worked]:
        """Wait for it."""


class Deduplication:
    """Which chunks need not be stored again.

    `table` numbers the blobs of the image, `dictionary` is asked first, and `known` has the chunks
    of the image by digest and uncompressed size.
    """

    def __init__(self) -> None:
        self.table = BlobTable()
        self.dictionary: ChunkDictionary | None = None
        self.known: dict[tuple[bytes, int], Chunk] = {}

    def find(self, key: tuple[bytes, int]) -> Chunk | None:
        """Return the chunk to refer to, None for a new one."""
        if self.dictionary is not None:
            found = self.dictionary.find(*key, self.table)
            if found is not None:
                return found
        return self.known.get(key)

    def new_chunk(self, digest: bytes, size: int, crc32c: int = 0) -> Chunk:
        """Return a chunk of the image's own blob that has no place yet."""
        return Chunk(digest, self.table.own(), 0, 0, size, 0, 0, 0, 0, crc32c)


class ChunkerStats:
    """What the chunker did with the content, in chunks and bytes before compression."""

    def __init__(self) -> None:
        self.chunks = self.content_bytes = 0
        self.duplicate_chunks = self.duplicate_bytes = 0


class Chunker:
    """Feeds a blob with the distinct chunks of files, in the order in which files are added.

    Use as a context manager; `finish` must be called before the blob is sealed. Every
    `Node.chunks` is complete only then.

    Args:
        blob: takes the new chunks.
        form: how they are digested and stored.
        dedup: what is known before.
        progress: called with the number of bytes after each span of chunks.
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
        self._pieces: list[Piece] = []
        self._size = 0
        self._queue: deque[Span] = deque()
        self._in_flight = 0
        self._pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, "chunker")
        self._blob = blob
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
            self.add_piece(Piece(node, content.read(size), is_small))
            rest -= size

    def add_piece(self, piece: Piece) -> None:
        """Add the next chunk of a file; raise `BuildError`."""
        self._pieces.append(piece)
        self._size += len(piece.data)
        if self._size >= SPAN_BYTES or len(self._pieces) >= SPAN_PIECES:
            self._submit()

    def _submit(self) -> None:
        pieces, size = self._pieces, self._size
        self._pieces, self._size = [], 0
        nodes, sizes = [piece.node for piece in pieces], [len(piece.data) for piece in pieces]
        self._enqueue(Span(nodes, sizes, size, self._pool.submit(self._work, pieces)))

    def _enqueue(self, span: Span) -> None:
        """Add work that has begun, and consume what is done of that before it."""
        self._queue.append(span)
        self._in_flight += span.size
        while self._queue and (self._in_flight > IN_FLIGHT_BYTES or self._queue[0].job.done()):
            self._consume()

    def _work(self, pieces: Sequence[Piece]) -> list[Worked]:
        known, find_digest = self._dedup.known, digest.function(self._form.digester)
        keys = [(find_digest(piece.data), len(piece.data)) for piece in pieces]
        # Chunks only ever become known, so a hit here stays one; a miss is looked at again.
        # What goes into a batch is encoded with it.
        first: set[tuple[bytes, int]] = set()
        fresh = []
        for number, key in enumerate(keys):
            if key not in known and key not in first:
                first.add(key)
                fresh.append(number)
        found = self._store([pieces[number] for number in fresh])
        result = [Worked(name, 0, b"", None) for name, _ in keys]
        for number, stored in zip(fresh, found, strict=True):
            data = pieces[number].data
            result[number] = Worked(keys[number][0], digest.crc32c(data), data, stored)
        return result

    def _store(self, pieces: Sequence[Piece]) -> list[Stored | None]:
        """Return what is to be stored for pieces that may be new."""
        alone = [piece.data for piece in pieces if not piece.is_small]
        found = iter(self._form.encode_all(alone))
        return [None if piece.is_small else next(found) for piece in pieces]

    def _consume(self) -> None:
        span = self._queue.popleft()
        self._settle(span)
        self._in_flight -= span.size
        self.stats.chunks += len(span.nodes)
        self.stats.content_bytes += span.size
        if self._progress is not None:
            self._progress(span.size)

    def _settle(self, span: Span) -> None:
        """Give files their chunks, and what is new to the blob."""
        found, known, add_chunk = self._dedup.find, self._dedup.known, self._new_chunk
        stats = self.stats
        for node, length, worked in zip(span.nodes, span.sizes, span.job.result(), strict=True):
            key = (worked.digest, length)
            chunk = found(key)
            if chunk is None:
                chunk = known[key] = add_chunk(length, worked)
            else:
                stats.duplicate_chunks += 1
                stats.duplicate_bytes += length
            node.chunks.append(chunk)

    def _new_chunk(self, size: int, worked: Worked) -> Chunk:
        chunk = self._dedup.new_chunk(worked.digest, size, worked.crc32c)
        if worked.stored is None:
            self._packer.add_small(chunk, worked.data)
        else:
            self._packer.add(chunk, worked.data, worked.stored)
        return chunk

    def finish(self) -> None:
        """Wait for all chunks to be in the blob."""
        if self._pieces:
            self._submit()
        while self._queue:
            self._consume()
        self._packer.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
