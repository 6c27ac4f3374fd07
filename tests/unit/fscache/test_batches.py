"""Blobs of batches: the table is asked for once, a batch is fetched and decompressed once."""

import os
import threading
import time

import pytest
from fakes.blob_image import CHUNK_SIZE, BatchBlob, Blob
from fakes.memory_reader import MemoryReader

from erofs import contexts
from erofs.citable import parse_cached
from erofs.codec import decompress
from erofs.errors import BadMagic, CodecError, CorruptStructure, IntegrityError, OutOfBounds
from erofs.rafs import BlobFeatures, Compressor
from fscache.backend import ShortRead, Unavailable
from fscache.backend.retry import RetryPolicy
from fscache.cache.cachedblob import CachedBlob
from fscache.fetch.fetcher import Fetcher, FetcherOptions
from fscache.fetch.streamprefetch import StreamPrefetch
from fscache.metrics import CacheMetrics
from fscache.settings import PrefetchConfig

LAYOUT = [[100, 431, 5000], CHUNK_SIZE, [7], 4096, [10, 20, 30]]
COUNT = 9


class Rig:
    """A fetcher with one blob of batches."""

    def __init__(self, directory, blob=None, chunks=None, **options):
        self.directory = directory
        self.blob = blob or BatchBlob(LAYOUT)
        self.reader = MemoryReader(self.blob)
        self.metrics = CacheMetrics(directory)
        options = {"workers": 8, "negative_ttl": 0.0, "sync_interval": 60.0} | options
        self.fetcher = Fetcher(FetcherOptions(**options))
        self.cached = self.open(chunks or self.blob.chunks)
        self.fetcher.attach(self.cached)

    def open(self, chunks):
        cached = CachedBlob.open(self.directory, self.blob.entry, chunks, self.reader, self.metrics)
        cached.retry = RetryPolicy(attempts=2, first_delay=0.001)
        return cached

    def place(self, index):
        chunk = self.blob.chunks[index]
        return chunk.uncompressed_offset, chunk.uncompressed_size

    def ensure(self, *indexes):
        for index in indexes or range(COUNT):
            self.fetcher.ensure(self.cached, *self.place(index))

    def request(self, index):
        """Return a list that gets the answer, and an event."""
        answers, called = [], threading.Event()

        def done(error):
            answers.append(error)
            called.set()

        self.fetcher.request(self.cached, *self.place(index), done)
        return answers, called

    def ready(self):
        """Return the ready chunks, whose data must be right, when nothing is under way."""
        while self.cached.chunks._pending:
            time.sleep(0.001)
        data = self.cached.path.read_bytes()
        found = [index for index in range(COUNT) if self.cached.chunks.is_ready(index)]
        for index in range(COUNT):
            start, size = self.place(index)
            expected = self.blob.plain[start : start + size] if index in found else bytes(size)
            assert data[start : start + size] == expected
        return found

    @property
    def table(self):
        return self.directory / f"{self.blob.id}.blob.meta"


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.reader.gate.set()
    rig.fetcher.close(5)


def test_one_chunk_brings_its_batch(rig, monkeypatch):
    decoded = []

    def count(*arguments):
        decoded.append(arguments)
        return decompress(*arguments)

    monkeypatch.setattr(contexts, "decompress", count)
    assert rig.reader.reads == []
    rig.ensure(1)
    assert rig.reader.reads == [rig.blob.table_range, rig.blob.places[0]]
    assert len(decoded) == 1
    assert rig.ready() == [0, 1, 2]
    rig.ensure(0, 2)
    assert len(rig.reader.reads) == 2
    rig.ensure(3)
    assert rig.ready() == [0, 1, 2, 3]
    rig.ensure()
    assert rig.ready() == list(range(COUNT))
    assert rig.cached.is_complete


@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD])
@pytest.mark.parametrize("toc", [False, True])
def test_everything_at_once(tmp_path, compressor, toc):
    rig = Rig(tmp_path, BatchBlob(LAYOUT, compressor=compressor, toc=toc))
    rig.fetcher.fetch_all(rig.cached)
    assert rig.cached.path.read_bytes() == rig.blob.plain
    assert rig.table.read_bytes() == rig.blob.cached
    rig.fetcher.close(5)


def test_what_is_read_is_one_range(tmp_path):
    rig = Rig(tmp_path)
    rig.cached.locate(threading.Event())
    rig.fetcher.fetch_all(rig.cached)
    assert rig.reader.reads == [rig.blob.table_range, (0, rig.blob.data_size)]
    rig.fetcher.close(5)


def test_many_readers_ask_for_the_table_once(rig):
    rig.reader.gate.clear()
    waiting = [rig.request(index) for index in (0, 1, 2, 1, 0, 3, 8)]
    assert rig.reader.entered.wait(60)
    rig.reader.gate.set()
    for answers, called in waiting:
        assert called.wait(60)
        assert answers == [None]
    assert sorted(rig.reader.reads) == sorted(
        [rig.blob.table_range, rig.blob.places[0], rig.blob.places[1], rig.blob.places[4]]
    )
    assert rig.ready() == [0, 1, 2, 3, 6, 7, 8]


def test_images_that_know_some_chunks_of_a_batch(tmp_path):
    blob = BatchBlob(LAYOUT)
    rig = Rig(tmp_path, chunks=[blob.chunks[0], blob.chunks[2], blob.chunks[8]])
    rig.ensure(2)
    assert rig.reader.reads == [blob.table_range, blob.places[0]]
    rig.ensure(0)
    rig.ensure(8)
    assert len(rig.reader.reads) == 3
    with pytest.raises(OutOfBounds):
        rig.ensure(1)
    assert rig.cached.is_complete
    # A further image knows the rest; the table is there.
    assert rig.cached.learn(blob.entry, blob.chunks)
    rig.ensure()
    assert blob.table_range not in rig.reader.reads[1:]
    assert rig.ready() == list(range(COUNT))
    rig.fetcher.close(5)


def test_the_table_of_the_cache_is_used(tmp_path):
    first = Rig(tmp_path)
    first.ensure(3)
    first.fetcher.close(5)
    second = Rig(tmp_path)
    second.ensure(0)
    assert second.reader.reads == [second.blob.places[0]]
    second.fetcher.close(5)


def _cut(blob):
    return blob.cached[:-1]


def _other_blob(blob):
    return BatchBlob(LAYOUT, compressor=Compressor.LZ4_BLOCK).cached


def _other_chunks(blob):
    return BatchBlob([[101, 430, 5000], *LAYOUT[1:]]).cached


@pytest.mark.parametrize("content", [_cut, _other_blob, _other_chunks, lambda blob: b""])
def test_a_wrong_table_in_the_cache_is_replaced(tmp_path, content):
    blob = BatchBlob(LAYOUT)
    rig = Rig(tmp_path, blob)
    rig.table.write_bytes(content(blob))
    rig.ensure(0)
    assert rig.ready() == [0, 1, 2]
    assert rig.table.read_bytes() == blob.cached
    rig.fetcher.close(5)


def test_a_table_that_gives_wrong_chunks_is_asked_for_again(tmp_path):
    rig = Rig(tmp_path, BatchBlob(LAYOUT, compressor=Compressor.NONE))
    # Batch 1 is shorter than it says: sound by itself, but it gives no chunk.
    wrong = bytearray(rig.blob.cached)
    wrong[24 * COUNT + 40 : 24 * COUNT + 44] = (1).to_bytes(4, "little")
    wrong[24 * COUNT + 44 : 24 * COUNT + 48] = (7).to_bytes(4, "little")
    assert parse_cached(wrong)
    rig.table.write_bytes(wrong)
    with pytest.raises(CodecError):
        rig.ensure(4)
    assert rig.ready() == []
    assert not rig.table.exists()
    rig.ensure(4)
    assert rig.ready() == [4]
    assert rig.table.read_bytes() == rig.blob.cached
    rig.fetcher.close(5)


@pytest.mark.parametrize(
    ("kind", "offset"),
    [
        (BadMagic, 4096 - 4),
        (BadMagic, 0),
        (CorruptStructure, 4),
        (CorruptStructure, 12),
        (CorruptStructure, 24),
        (OutOfBounds, 40),
        (OutOfBounds, 48),
        (OutOfBounds, 56),
    ],
)
def test_broken_headers(rig, kind, offset):
    start = rig.blob.entry.ci_offset + rig.blob.entry.ci_compressed_size + offset
    rig.reader.stored[start] ^= 0x40
    with pytest.raises(kind) as caught:
        rig.ensure(0)
    assert caught.value.where["blob"] == rig.blob.id
    assert rig.ready() == []
    assert not rig.table.exists()
    rig.reader.stored[start] ^= 0x40
    rig.ensure(0)
    assert rig.ready() == [0, 1, 2]


def test_broken_batch(rig):
    rig.reader.stored[rig.blob.places[0][0]] ^= 0xFF
    with pytest.raises(CodecError):
        rig.ensure(1)
    assert rig.ready() == []
    assert rig.metrics.digest_failures == 1
    # The others are not harmed, and this one is asked for anew.
    rig.ensure(3, 4, 5, 6)
    rig.reader.stored[rig.blob.places[0][0]] ^= 0xFF
    rig.ensure()
    assert rig.ready() == list(range(COUNT))


def test_a_wrong_chunk_harms_no_other_of_its_batch(tmp_path):
    rig = Rig(tmp_path, BatchBlob(LAYOUT, compressor=Compressor.NONE))
    rig.reader.stored[150] ^= 1
    with pytest.raises(IntegrityError):
        rig.ensure(1)
    rig.ensure(0, 2)
    assert rig.ready() == [0, 2]
    rig.fetcher.close(5)


def test_truncated_blobs(rig):
    stored = bytes(rig.reader.stored)
    rig.ensure(4)
    del rig.reader.stored[rig.blob.places[1][0] + 10 :]
    for index in (0, 1, 2):
        rig.ensure(index)
    for index in (3, 5, 8):
        with pytest.raises(ShortRead):
            rig.ensure(index)
    rig.reader.stored[:] = stored
    rig.ensure()


def test_no_table_is_an_error_for_all_who_wait(tmp_path):
    rig = Rig(tmp_path, negative_ttl=60.0)
    rig.reader.gate.clear()
    waiting = [rig.request(index) for index in range(COUNT)]
    rig.reader.error = Unavailable("gone", temporary=True)
    rig.reader.gate.set()
    for answers, called in waiting:
        assert called.wait(60)
        assert [type(error) for error in answers] == [Unavailable]
    assert len(rig.reader.reads) == 2
    # The second event of the same read does not ask again.
    with pytest.raises(Unavailable):
        rig.ensure(0)
    assert len(rig.reader.reads) == 2
    rig.fetcher.close(5)


def test_an_unwritable_cache_still_has_a_table(rig, monkeypatch, caplog):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fscache.cache.tablefile.replace", no_space)
    rig.ensure(0)
    assert rig.ready() == [0, 1, 2]
    assert not rig.table.exists()
    assert "table is not kept" in caplog.text
    assert not [name for name in os.listdir(rig.directory) if name.endswith(".tmp")]


@pytest.mark.parametrize("part", ["digest", "table", "header"])
def test_what_a_toc_promises(tmp_path, part):
    blob = BatchBlob(LAYOUT, toc=True, compressor=Compressor.NONE)
    rig = Rig(tmp_path, blob)
    end = len(rig.reader.stored)
    offset = {
        "digest": end - blob.entry.blob_toc_size + 24,
        # Reserved bytes, which nothing but the digest of the section knows.
        "table": blob.entry.ci_offset + 24 * COUNT + 20,
        "header": blob.entry.ci_offset + blob.entry.ci_compressed_size + 200,
    }[part]
    rig.reader.stored[offset] ^= 1
    with pytest.raises(IntegrityError, match="ToC" if part == "digest" else "section blob.meta"):
        rig.ensure(0)
    assert rig.ready() == []
    assert not rig.table.exists()
    rig.fetcher.close(5)


def test_streams_of_blobs_of_batches(tmp_path):
    rig = Rig(tmp_path)
    config = PrefetchConfig(enable=True, stream_prefetch=True, threads=1)
    run = StreamPrefetch(rig.fetcher, [(rig.cached, rig.reader)], config)
    for thread in run._threads:
        thread.join(60)
    rig.fetcher.fetch_all(rig.cached)
    assert rig.reader.streams == [0]
    assert rig.reader.reads == [rig.blob.table_range]
    assert rig.cached.path.read_bytes() == rig.blob.plain
    run.stop()
    rig.fetcher.close(5)


def test_closing_while_the_table_is_asked_for(tmp_path):
    rig = Rig(tmp_path)
    rig.reader.gate.clear()
    answers, called = rig.request(0)
    assert rig.reader.entered.wait(60)
    closer = threading.Thread(target=rig.fetcher.close, args=(0.2,))
    closer.start()
    assert called.wait(60)
    assert [type(error) for error in answers] == [Unavailable]
    rig.reader.gate.set()
    closer.join(60)
    assert len(answers) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"ci_uncompressed_size": (64 << 24) + 1},
        {"ci_compressed_size": 10_000_000, "ci_uncompressed_size": 9_000_000},
    ],
)
def test_tables_of_impossible_sizes_are_refused_at_once(tmp_path, change):
    blob = BatchBlob(LAYOUT)
    blob.entry = blob.entry._replace(**change)
    with pytest.raises(OutOfBounds, match="impossible size"):
        Rig(tmp_path, blob)


def test_plain_blobs_need_no_table(tmp_path):
    blob = Blob([100, 200])
    blob.entry = blob.entry._replace(features=blob.entry.features | BlobFeatures.CHUNK_INFO_V2)
    rig = Rig(tmp_path, blob)
    rig.fetcher.fetch_all(rig.cached)
    assert rig.reader.reads == [(0, len(blob.stored))]
    assert not rig.table.exists()
    rig.fetcher.close(5)
