"""Reads of channels that give the bytes themselves, and complaints about those that fail."""

import threading
import time
from types import SimpleNamespace

import pytest
from fakes.blob_image import CHUNK_SIZE, Blob
from fakes.memory_reader import MemoryReader

from fscache.backend import NotFound
from fscache.backend.retry import RetryPolicy
from fscache.cache.cachedblob import CachedBlob
from fscache.cache.cachefile import CacheError
from fscache.fetch import complaints as module
from fscache.fetch.complaints import Complaints
from fscache.fetch.demand import Demand, Piece
from fscache.fetch.fetcher import Fetcher, FetcherOptions
from fscache.metrics import CacheMetrics
from tests.leftovers import said


class Rig:
    """Two blobs of three chunks, attached to a fetcher."""

    def __init__(self, directory):
        self.fetcher = Fetcher(FetcherOptions(negative_ttl=0.0, sync_interval=60.0))
        self.demand = Demand(self.fetcher)
        self.metrics = CacheMetrics(directory)
        self.stored = [Blob([CHUNK_SIZE] * 3, blob_id=name * 64, seed=ord(name)) for name in "ab"]
        self.readers = [MemoryReader(blob) for blob in self.stored]
        self.blobs = []
        for blob, reader in zip(self.stored, self.readers, strict=True):
            cached = CachedBlob.open(directory, blob.entry, blob.chunks, reader, self.metrics)
            cached.retry = RetryPolicy(attempts=1)
            self.fetcher.attach(cached)
            self.blobs.append(cached)

    def pieces(self, *places):
        return [Piece(self.blobs[blob], offset, length) for blob, offset, length in places]

    def truth(self, *places):
        return b"".join(
            self.stored[blob].plain[offset : offset + length] for blob, offset, length in places
        )


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    for reader in rig.readers:
        reader.gate.set()
    rig.fetcher.close(10.0)


PLACES = [(1, 10, 100), (0, CHUNK_SIZE - 5, 10), (1, 2 * CHUNK_SIZE, CHUNK_SIZE), (0, 0, 1)]


def test_pieces_in_their_order(rig):
    for _ in range(2):
        assert rig.demand.read(rig.pieces(*PLACES)) == rig.truth(*PLACES)
    assert rig.demand.read([]) == b""
    # Each piece is a read, ready or not.
    counts = rig.metrics.reads.counts()
    assert sum(counts.sizes) == 2 * len(PLACES)
    assert counts.bytes_read == 2 * sum(length for _, _, length in PLACES)


def test_pieces_are_fetched_at_once(rig):
    for reader in rig.readers:
        reader.gate.clear()
    got = []
    thread = threading.Thread(target=lambda: got.append(rig.demand.read(rig.pieces(*PLACES))))
    thread.start()
    assert all(reader.entered.wait(60) for reader in rig.readers)
    assert not got
    # The first two are asked for already, and the others soon.
    end = time.monotonic() + 60
    while len(waiting := rig.metrics.reads.waiting()) < len(PLACES):
        assert time.monotonic() < end
        time.sleep(0.001)
    inodes = [rig.blobs[blob].cache.inode[1] for blob, _, _ in PLACES]
    assert [read.inode for read in waiting.values()] == inodes
    for reader in rig.readers:
        reader.gate.set()
    thread.join(60)
    assert got == [rig.truth(*PLACES)]
    assert rig.metrics.reads.waiting() == {}


def test_one_piece_that_cannot_be_had(rig, caplog):
    rig.readers[1].error = NotFound("gone", blob=rig.blobs[1].blob_id)
    with pytest.raises(NotFound):
        rig.demand.read(rig.pieces(*PLACES))
    assert caplog.text.count("reads fail: blob bbbb") == 1
    assert rig.metrics.reads.waiting() == {}
    # Hits are those that succeeded, as in the original.
    said_so = rig.metrics.reads.as_dict()
    hits, errors = said_so["fop_hits"][4], said_so["fop_errors"][4]
    assert (hits + errors, errors) == (len(PLACES), 2)
    assert rig.demand.read(rig.pieces(PLACES[1])) == rig.truth(PLACES[1])
    rig.readers[1].error = None
    assert rig.demand.read(rig.pieces(*PLACES)) == rig.truth(*PLACES)


def test_nothing_after_the_end(rig):
    rig.fetcher.close(10.0)
    with pytest.raises(CacheError, match="not attached"):
        rig.demand.read(rig.pieces((0, 0, 10)))


def test_complaints_are_told_once_in_a_while(monkeypatch, caplog):
    now = 100.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    complaints = Complaints()
    for _ in range(5):
        complaints.tell("a", "broken")
    complaints.tell("b", "broken")
    complaints.tell("a", "other")
    assert len(said(caplog, "fscache.fetch.complaints")) == 3
    now += 11
    complaints.tell("a", "broken")
    assert len(said(caplog, "fscache.fetch.complaints")) == 4
    # Texts of one reason are one.
    complaints.tell("c", "chunk 1: broken", "broken")
    complaints.tell("c", "chunk 2: broken", "broken")
    assert len(said(caplog, "fscache.fetch.complaints")) == 5
    for number in range(3000):
        complaints.tell(number, "x")
    assert len(complaints._told) <= 1000
