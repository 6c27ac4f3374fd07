"""A backend in memory, one blob, that counts, waits and fails as told."""

from __future__ import annotations

import threading
from contextlib import contextmanager

from fscache.backend import ShortRead


class MemoryReader:
    """Reads `stored`; each read passes `gate` first and fails with `error`, if there is one."""

    def __init__(self, blob):
        self.blob_id = blob.id
        self.stored = bytearray(blob.stored)
        self.reads = []
        self.streams = []
        self.piece = 10_000
        self.stream_ends = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.error = None

    def size(self):
        return len(self.stored)

    def _pass(self):
        self.entered.set()
        self.gate.wait(30)
        if self.error is not None:
            raise self.error

    def read_at(self, offset, length):
        self.reads.append((offset, length))
        self._pass()
        data = bytes(self.stored[offset : offset + length])
        if len(data) != length:
            raise ShortRead("truncated")
        return data

    @contextmanager
    def stream(self, offset):
        """Give pieces of `piece` bytes; one of `stream_ends` for each stream that breaks."""
        self.streams.append(offset)
        self._pass()
        end = self.stream_ends.pop(0) if self.stream_ends else len(self.stored)
        yield self._pieces(offset, end)

    def _pieces(self, offset, end):
        while offset < end:
            piece = bytes(self.stored[offset : min(offset + self.piece, end)])
            offset += len(piece)
            yield piece
        if end < len(self.stored):
            raise ShortRead("broken", temporary=True)
