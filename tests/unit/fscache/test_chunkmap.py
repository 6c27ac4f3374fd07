import errno
import os
import struct

import pytest

from fscache.cache.cachefile import CacheError, CacheFile
from fscache.cache.chunkmap import ChunkMap

COUNT = 12
# The chunks that images know; the tests count only these.
INDEXES = [0, 1, 7, 8, 11]
KNOWN = bytes(index in INDEXES for index in range(COUNT))
HEADER = struct.pack("<IIII", 0x424D4150, 1, 0x434D4150, 0)


class Waiter:
    def chunk_done(self, error):
        raise AssertionError("the map itself tells nobody")


@pytest.fixture
def data(tmp_path):
    data = CacheFile.open(tmp_path, "id", 1 << 20)
    yield data
    data.close()


def make(data, present=b"\1" * 5, count=COUNT):
    chunks = ChunkMap(data.map_path, KNOWN[:count].ljust(count, b"\0"))
    there = bytearray(count)
    for index, byte in zip(INDEXES, present, strict=True):
        if index < count:
            there[index] = byte
    chunks.load(there)
    return chunks


def complete(chunks, *positions):
    for position in positions:
        index = INDEXES[position]
        chunks.claim(range(index, index + 1), Waiter())
        chunks.complete(index)


def ready(chunks):
    return [position for position, index in enumerate(INDEXES) if chunks.is_ready(index)]


def test_what_is_fetched_together_is_claimed_together():
    chunks = ChunkMap(None, b"\1" * 6)
    first, second = Waiter(), Waiter()
    chunks.claim(range(1), first)
    chunks.complete(0)
    assert chunks.claim(range(2, 3), first, range(5)) == ([1, 2, 3, 4], 1)
    assert chunks.claim(range(3, 6), second, range(6)) == ([5], 3)
    assert [chunks.complete(index) for index in (1, 2, 3)] == [[], [first], [second]]
    assert chunks.fail(4) == [second]


def test_claims_are_exclusive():
    chunks = ChunkMap(None, b"\1" * 5)
    first, second = Waiter(), Waiter()
    assert chunks.claim(range(3), first) == ([0, 1, 2], 3)
    assert chunks.claim(range(1, 5), second) == ([3, 4], 4)
    assert chunks.complete(1) == [first, second]
    assert chunks.fail(2) == [first, second]
    assert chunks.claim(range(5), first) == ([2], 4)
    assert [index for index in range(5) if chunks.is_ready(index)] == [1]
    assert chunks.all_ready(range(1, 2))
    assert not chunks.all_ready(range(2))
    assert chunks.ready_count == 1
    assert not chunks.is_complete


def test_layout_on_disk(data):
    chunks = make(data)
    complete(chunks, 0, 2, 3)
    assert not data.map_path.exists()
    assert chunks.sync(data) is False
    content = data.map_path.read_bytes()
    assert len(content) == 4096 + 2
    assert content[:16] == HEADER
    assert content[16:4096] == bytes(4080)
    assert content[4096:] == bytes([0b10000001, 0b10000000])
    complete(chunks, 1, 4)
    assert chunks.is_dirty
    assert chunks.sync(data) is True
    assert data.map_path.read_bytes()[4096:] == bytes([0b11000001, 0b10010000])
    assert ready(make(data)) == [0, 1, 2, 3, 4]


def test_all_ready_is_set_with_the_last_bit(data):
    data.map_path.write_bytes(HEADER + bytes(4080) + bytes([0x3E, 0x60]))
    chunks = make(data)
    complete(chunks, 0, 1, 2, 3)
    chunks.sync(data)
    assert data.map_path.read_bytes()[12:16] == bytes(4)
    complete(chunks, 4)
    chunks.sync(data)
    assert data.map_path.read_bytes()[12:16] == struct.pack("<I", 0x4D4D4150)


def test_all_ready_without_bits_is_not_believed(data):
    data.map_path.write_bytes(HEADER[:12] + struct.pack("<I", 0x4D4D4150) + bytes(4082))
    assert ready(make(data)) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 4098,
        HEADER + bytes(4080) + b"\xff",
        HEADER + bytes(4080) + b"\xff" * 3,
        bytes(16) + bytes(4080) + b"\xff\xff",
        struct.pack("<IIII", 0x424D4150, 2, 0x434D4150, 0) + bytes(4080) + b"\xff\xff",
        struct.pack("<IIII", 0x424D4150, 1, 0, 0) + bytes(4080) + b"\xff\xff",
    ],
)
def test_foreign_maps_are_discarded(data, content, caplog):
    data.map_path.write_bytes(content)
    chunks = make(data)
    assert ready(chunks) == []
    assert "discarded" in caplog.text
    complete(chunks, 0)
    chunks.sync(data)
    assert data.map_path.read_bytes()[4096:] == b"\x80\0"


def test_bits_of_holes_are_not_believed(data, caplog):
    data.map_path.write_bytes(HEADER + bytes(4080) + b"\xff\xff")
    chunks = make(data, present=bytes([1, 0, 1, 1, 0]))
    assert ready(chunks) == [0, 2, 3]
    assert "holes" in caplog.text
    chunks.sync(data)
    assert ready(make(data)) == [0, 2, 3]


def test_bits_of_other_processes_stay(data):
    mine, other = make(data), make(data)
    complete(other, 1)
    other.sync(data)
    complete(mine, 3)
    mine.sync(data)
    assert ready(make(data)) == [1, 3]


def test_the_map_is_never_ahead_of_the_data(data, monkeypatch):
    chunks = make(data)
    seen = []
    real = os.fdatasync

    def fdatasync(fd):
        bits = data.map_path.read_bytes()[4096:] if data.map_path.exists() else b"\0\0"
        seen.append((fd == data.fileno(), bits))
        # This one becomes ready too late for the sync that is under way.
        if len(seen) == 1:
            complete(chunks, 1)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    complete(chunks, 0)
    chunks.sync(data)
    assert seen == [(True, b"\0\0"), (False, b"\x80\0")]
    assert chunks.is_dirty


def test_data_that_could_not_be_synced_is_missing(data, monkeypatch):
    chunks = make(data)
    complete(chunks, 0)
    chunks.sync(data)
    complete(chunks, 1)

    def fail(fd):
        raise OSError(errno.EIO, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(CacheError):
            chunks.sync(data)
    assert ready(chunks) == [0]
    chunks.sync(data)
    assert data.map_path.read_bytes()[4096:] == b"\x80\0"


def test_no_bits_for_a_file_that_was_replaced(data):
    chunks = make(data)
    complete(chunks, 0)
    # The daemon's other link keeps the file of the mounts alive.
    data.path.rename(data.path.with_name("served"))
    data.path.write_bytes(bytes(1 << 20))
    with pytest.raises(CacheError, match="replaced"):
        chunks.sync(data)
    assert not data.map_path.exists()
    assert ready(chunks) == [0]
    assert chunks.is_dirty


def test_unknown_chunks_are_nobodys_work(data):
    chunks = make(data)
    waiter = Waiter()
    assert chunks.claim(range(COUNT), waiter) == (INDEXES, 5)
    assert chunks.all_ready(range(2, 7))
    for index in INDEXES:
        chunks.complete(index)
    assert chunks.is_complete


def test_chunks_of_a_further_image(data):
    other = ChunkMap(data.map_path, b"\1" * COUNT)
    for index in (2, 3):
        other.claim(range(index, index + 1), Waiter())
        other.complete(index)
    other.sync(data)
    chunks = make(data)
    complete(chunks, 0, 1, 2, 3, 4)
    assert chunks.is_complete
    chunks.know(b"\1" * COUNT)
    assert not chunks.is_complete
    assert not chunks.all_ready(range(2, 4))
    # What is ready on disk is taken over, but only with its data.
    present = bytearray(b"\1" * COUNT)
    present[3] = 0
    chunks.load(present)
    assert chunks.all_ready(range(3))
    assert not chunks.is_ready(3)
    assert chunks.ready_count == 6
