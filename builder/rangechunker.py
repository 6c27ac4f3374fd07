"""Cut the files of a tar that lies in a file: other processes read their content."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NoReturn

from builder.blob import BlobFormat, BlobWriter
from builder.chunker import (
    SPAN_BYTES,
    SPAN_PIECES,
    Chunker,
    ContentReader,
    Deduplication,
    Piece,
    Span,
)
from builder.errors import BuildError
from builder.forked import COMPRESSED, ForkedWorkers, Part, RangeJob, Worked, read_range
from builder.tarstream import TarStream
from erofs import Chunk, Node

__all__ = ["RangeChunker"]


class RangeChunker(Chunker):
    """Chunks content that is never read here, as long as it comes from a `TarStream` that seeks.

    Processes do what threads do otherwise; they are forked at once, so no other thread may run.

    Args:
        blob, form, dedup, progress: as for `Chunker`.
        workers: processes; the output does not depend on it.
        descriptor: of the file that has the tar.

    Raises:
        BuildError: there can be no processes.
    """

    def __init__(
        self,
        blob: BlobWriter,
        form: BlobFormat,
        dedup: Deduplication,
        progress: Callable[[int], None] | None,
        workers: int | None,
        descriptor: int,
    ) -> None:
        super().__init__(blob, form, dedup, progress, workers)
        self._descriptor = descriptor
        self._most_bytes = SPAN_BYTES + form.chunk_size
        # The range in the making.
        self._start = 0
        self._parts: list[Part] = []
        self._nodes: list[Node] = []
        # Libraries are loaded once, before there are processes.
        self._work([Piece(Node(0), b"\0")])
        self._workers = ForkedWorkers(
            workers or os.cpu_count() or 1,
            descriptor,
            self._work_in_child,
            self._most_bytes,
            SPAN_PIECES,
            self._fail,
        )

    def add_file(self, node: Node, content: ContentReader) -> None:
        """Cut `node.size` bytes of `content`; `node.chunks` fills up in order.

        Raises:
            BuildError: the content ends early or cannot be read.
        """
        if not node.size:
            return
        offset = content.take_range() if isinstance(content, TarStream) else None
        if offset is None:
            # A sparse file: one that is expanded while it is read.
            self._submit_range()
            super().add_file(node, content)
            if self._pieces:
                self._submit()
            return
        rest, chunk_size = node.size, self._form.chunk_size
        is_small = rest < self._form.batch_size // 2
        while rest:
            size = min(rest, chunk_size)
            self._add_part(node, offset, size, is_small)
            offset += size
            rest -= size

    def _add_part(self, node: Node, offset: int, size: int, is_small: bool) -> None:
        parts = self._parts
        if parts and offset + size - self._start > self._most_bytes:
            self._submit_range()
            parts = self._parts
        if not parts:
            self._start = offset
        start = offset - self._start
        parts.append(Part(start, size, is_small))
        self._nodes.append(node)
        if start + size >= SPAN_BYTES or len(parts) >= SPAN_PIECES:
            self._submit_range()

    def _submit_range(self) -> None:
        parts, nodes = self._parts, self._nodes
        if not parts:
            return
        self._parts, self._nodes = [], []
        # All others are being written.
        while len(self._queue) >= self._workers.slots // 2:
            self._consume()
        job = self._workers.submit(self._start, parts[-1].start + parts[-1].size, parts)
        sizes = [part.size for part in parts]
        self._enqueue(Span(nodes, sizes, sum(sizes), job))

    def _settle(self, span: Span) -> None:
        """Take the chunks of a span, without a copy where nothing waits for a batch."""
        job = span.job
        if not isinstance(job, RangeJob) or self._form.batch_size:
            super()._settle(span)
            return
        records, stored = job.take()
        find, known, blob, stats = self._dedup.find, self._dedup.known, self._blob, self.stats
        runs, begin, end = [], 0, 0
        for node, size, record in zip(span.nodes, span.sizes, records, strict=True):
            digest, crc, length, kind = record
            key = (digest, size)
            chunk = find(key)
            if chunk is None:
                chunk = known[key] = self._dedup.new_chunk(digest, size, crc)
                blob.place_chunk(chunk, length, kind == COMPRESSED)
            else:
                stats.duplicate_chunks += 1
                stats.duplicate_bytes += size
                runs.append(stored[begin:end])
                begin = end + length
            end += length
            node.chunks.append(chunk)
        runs.append(stored[begin:end])
        blob.write_placed([run for run in runs if run], job.release)

    def _work_in_child(self, contents: Sequence[tuple[memoryview, bool]]) -> list[Worked]:
        """Do what a thread does; what this process has seen before is known to the parent."""
        nobody = Node(0)
        result = self._work([Piece(nobody, data, is_small) for data, is_small in contents])
        for (data, _), worked in zip(contents, result, strict=True):
            key = worked.digest, len(data)
            if key not in self._dedup.known:
                self._dedup.known[key] = Chunk(worked.digest, 0, 0, 0, len(data), 0, 0, 0, 0, 0)
        return result

    def _fail(self, offset: int, length: int, parts: Sequence[Part]) -> NoReturn:
        """Raise what a child has met."""
        content = memoryview(bytearray(length))
        read_range(self._descriptor, content, offset)
        self._work_in_child(
            [(content[start : start + size], is_small) for start, size, is_small in parts]
        )
        raise BuildError("a process failed at digesting and compressing", offset=offset)

    def finish(self) -> None:
        """Wait for all chunks to be in the blob."""
        self._submit_range()
        super().finish()

    def __exit__(self, *exception: object) -> None:
        self._workers.close()
        super().__exit__(*exception)
