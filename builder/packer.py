"""Bring new chunks into a blob in order, alone or in batches (spec rafs-v6 4.9).

A batch is compressed by a worker as soon as it is full; what comes behind it waits in a
queue, so that the blob has everything in the order in which it was added.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from builder.blob import BlobFormat, BlobWriter, Data, Stored
from erofs import Chunk
from erofs.cipher import UNIT

__all__ = ["Packer"]

# Of what waits behind a batch that is being compressed.
IN_FLIGHT_BYTES = 32 * 1024 * 1024


class _Batch:
    """A batch in the making, or with `job` one that is being compressed."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.data = bytearray()
        self.job: Future[Stored] | None = None

    @property
    def is_done(self) -> bool:
        return self.job is None or self.job.done()


class _Alone(NamedTuple):
    chunk: Chunk
    data: Data
    stored: Stored

    @property
    def is_done(self) -> bool:
        return True


class Packer:
    """Adds chunks to a blob; `finish` must be called before the blob is sealed.

    Args:
        blob: takes the chunks.
        form: how they are encoded, and how large a batch is.
        pool: compresses batches.
    """

    def __init__(self, blob: BlobWriter, form: BlobFormat, pool: ThreadPoolExecutor) -> None:
        self._blob = blob
        self._form = form
        self._pool = pool
        self._batch = _Batch()
        self._queue: deque[_Batch | _Alone] = deque()
        self._in_flight = 0

    def add(self, chunk: Chunk, data: Data, stored: Stored) -> None:
        """Add a chunk that is stored by itself; raise `BuildError`."""
        if self._batch.chunks:
            self._end_batch()
        if self._queue:
            self._add_alone(chunk, data, stored)
        else:
            self._blob.add_chunk(chunk, data, stored)

    def _add_alone(self, chunk: Chunk, data: Data, stored: Stored) -> None:
        if self._queue:
            self._wait_for_room(len(data))
            self._queue.append(_Alone(chunk, data, stored))
        else:
            self._blob.add_chunk(chunk, data, stored)

    def add_small(self, chunk: Chunk, data: Data) -> None:
        """Add a chunk of less than half a batch to the current one; raise `BuildError`."""
        if len(self._batch.data) + len(data) >= self._form.batch_size:
            self._end_batch()
        self._batch.chunks.append(chunk)
        self._batch.data += data

    def _end_batch(self) -> None:
        batch = self._batch
        if not batch.chunks:
            return
        self._batch = _Batch()
        if self._form.cipher is not None and len(batch.data) < UNIT:
            # Padding makes it larger than its content, which nydusd takes for damage.
            self._split(batch)
            return
        self._wait_for_room(len(batch.data))
        batch.job = self._pool.submit(self._form.encode, batch.data)
        self._queue.append(batch)

    def _split(self, batch: _Batch) -> None:
        """Add the chunks of a batch by themselves."""
        start = 0
        for chunk in batch.chunks:
            data = batch.data[start : start + chunk.uncompressed_size]
            start += chunk.uncompressed_size
            self._add_alone(chunk, data, self._form.encode(data))

    def _wait_for_room(self, size: int) -> None:
        """Write what can be written, and so much that what is waiting stays small."""
        self._in_flight += size
        while self._queue and (self._queue[0].is_done or self._in_flight > IN_FLIGHT_BYTES):
            self._write()

    def _write(self) -> None:
        unit = self._queue.popleft()
        self._in_flight -= len(unit.data)
        if isinstance(unit, _Alone):
            self._blob.add_chunk(unit.chunk, unit.data, unit.stored)
        elif unit.job is not None:
            self._blob.add_batch(unit.chunks, unit.data, unit.job.result())

    def finish(self) -> None:
        """Wait for everything to be in the blob; raise `BuildError`."""
        self._end_batch()
        while self._queue:
            self._write()
