"""Read the chunks of an image ahead of who writes them, in order, with bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Self

from builder.chunkreader import ChunkReader
from erofs import Chunk
from erofs.errors import NydusError

__all__ = ["ReadAhead"]

# What a thread takes at once, and how much may wait for its turn.
SPAN_BYTES = 1 << 20
AHEAD_BYTES = 16 << 20
# More would wait for the interpreter's lock.
MAX_THREADS = 4
_Content = bytes | memoryview | NydusError


class ReadAhead:
    """Reads chunks in the order in which they will be asked for, by threads of its own.

    Use as a context manager. What fails is raised when that chunk's turn has come.

    Args:
        reader: nobody else uses it meanwhile.
        chunks: all that will be asked for, in order.
    """

    def __init__(self, reader: ChunkReader, chunks: Iterable[Chunk]) -> None:
        self._reader = reader
        self._chunks = iter(chunks)
        threads = 1 if reader.is_tabled else min(len(os.sched_getaffinity(0)), MAX_THREADS)
        self._pool = ThreadPoolExecutor(threads, "read-ahead")
        self._spans: deque[tuple[int, Future[list[_Content]]]] = deque()
        self._in_flight = 0
        self._current: Iterator[_Content] = iter(())

    def _submit(self) -> None:
        """Ask for spans of chunks, as many as may be in memory."""
        while self._in_flight < AHEAD_BYTES:
            span: list[Chunk] = []
            size = 0
            for chunk in self._chunks:
                span.append(chunk)
                size += chunk.uncompressed_size
                if size >= SPAN_BYTES:
                    break
            if not span:
                return
            self._spans.append((size, self._pool.submit(self._read, span)))
            self._in_flight += size

    def _read(self, chunks: Sequence[Chunk]) -> list[_Content]:
        with suppress(NydusError):
            return [*self._reader.read_all(chunks)]
        # Again, one by one: what was read before what fails is good.
        found: list[_Content] = []
        for chunk in chunks:
            try:
                found.append(self._reader.read(chunk))
            except NydusError as error:
                found.append(error)
                break
        return found

    def read(self) -> bytes | memoryview:
        """Return the verified content of the next chunk; raise as `ChunkReader.read` does."""
        content = next(self._current, None)
        if content is None:
            self._submit()
            size, job = self._spans.popleft()
            self._current = iter(job.result())
            self._in_flight -= size
            self._submit()
            content = next(self._current)
        if isinstance(content, NydusError):
            raise content
        return content

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
