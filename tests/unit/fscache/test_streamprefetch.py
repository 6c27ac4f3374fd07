"""Whole blobs by one request: chunks from a stream, its faults, its pace."""

import threading
import time

import pytest
from fakes.blob_image import CHUNK_SIZE, Blob
from fakes.blob_server import BlobServer
from fakes.memory_reader import MemoryReader

from erofs.rafs import Compressor
from fscache.backend import HttpProxyConfig, NotFound, open_backend
from fscache.backend.retry import RetryPolicy
from fscache.cache.cachedblob import CachedBlob
from fscache.fetch import streamprefetch
from fscache.fetch.fetcher import Fetcher, FetcherOptions
from fscache.fetch.streamprefetch import StreamPrefetch
from fscache.metrics import CacheMetrics
from fscache.settings import PrefetchConfig

SIZES = [CHUNK_SIZE] * 6 + [100, 5000] + [CHUNK_SIZE] * 8


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    policy = RetryPolicy(attempts=10, first_delay=0.001, max_delay=0.001)
    monkeypatch.setattr(streamprefetch, "RETRY", policy)


class Rig:
    """Blobs behind a fetcher, each with a reader."""

    def __init__(self, directory, *blobs, readers=None):
        self.blobs = blobs or (Blob(SIZES),)
        self.readers = readers or [MemoryReader(blob) for blob in self.blobs]
        self.metrics = CacheMetrics(directory)
        self.fetcher = Fetcher(FetcherOptions(workers=4, negative_ttl=0, sync_interval=60))
        self.cached = []
        for blob, reader in zip(self.blobs, self.readers, strict=True):
            cached = CachedBlob.open(directory, blob.entry, blob.chunks, reader, self.metrics)
            cached.retry = RetryPolicy(attempts=1)
            self.fetcher.attach(cached)
            self.cached.append(cached)
        self.runs = []

    def start(self, **config):
        config = PrefetchConfig(enable=True, stream_prefetch=True, **config)
        run = StreamPrefetch(
            self.fetcher, list(zip(self.cached, self.readers, strict=True)), config
        )
        self.runs.append(run)
        return run

    def run(self, **config):
        for thread in self.start(**config)._threads:
            thread.join(60)
            assert not thread.is_alive()
        while self.fetcher._outstanding.requests:
            time.sleep(0.001)

    def data(self, number=0):
        return self.cached[number].path.read_bytes()

    def close(self):
        for reader in self.readers:
            if isinstance(reader, MemoryReader):
                reader.gate.set()
        for run in self.runs:
            run.stop()
        self.fetcher.close(5)


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.mark.parametrize("piece", [1000, CHUNK_SIZE, 1 << 18])
@pytest.mark.parametrize("batch", [0x1000, 3 * CHUNK_SIZE, 1 << 30])
def test_everything_by_one_request(rig, piece, batch):
    rig.readers[0].piece = piece
    rig.run(batch_size=batch)
    assert rig.data() == rig.blobs[0].plain
    assert (rig.readers[0].streams, rig.readers[0].reads) == ([0], [])
    metrics = rig.metrics.as_dict()
    assert metrics["prefetch_data_amount"] == len(rig.blobs[0].stored)
    assert metrics["buffered_backend_size"] == 0


def test_many_blobs_with_few_threads(tmp_path):
    blobs = [
        Blob([CHUNK_SIZE, 100], blob_id=name * 64, compressor=kind, seed=number)
        for number, (name, kind) in enumerate(
            zip("abc", (Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD), strict=True)
        )
    ]
    rig = Rig(tmp_path, *blobs)
    rig.run(threads=2)
    assert [rig.data(number) for number in range(3)] == [blob.plain for blob in blobs]
    assert len(rig.runs[0]._threads) == 2
    rig.close()


def test_what_is_there_is_left_out(rig):
    (cached,), (blob,), (reader,) = rig.cached, rig.blobs, rig.readers
    for position in (0, 5):
        chunk = blob.chunks[position]
        rig.fetcher.ensure(cached, chunk.uncompressed_offset, 1)
    rig.run(batch_size=CHUNK_SIZE)
    assert rig.data() == blob.plain
    # Still the whole blob: a peer-to-peer proxy takes it as such.
    assert reader.streams == [0]
    assert rig.metrics.chunks_fetched == len(SIZES)
    rig.run()
    assert reader.streams == [0]


def test_a_blob_that_is_half_there_is_asked_for_the_rest(rig):
    (cached,), (blob,), (reader,) = rig.cached, rig.blobs, rig.readers
    last = blob.chunks[-3]
    rig.fetcher.ensure(cached, 0, last.uncompressed_offset)
    rig.run()
    assert reader.streams == [last.compressed_offset]
    assert rig.data() == blob.plain


def test_broken_streams_are_tried_again_and_go_on(rig):
    stored = len(rig.blobs[0].stored)
    # The third try begins behind the half.
    rig.readers[0].stream_ends = [stored // 4, stored * 3 // 4]
    rig.run(batch_size=CHUNK_SIZE)
    first, second, third = rig.readers[0].streams
    assert (first, second) == (0, 0)
    assert stored // 2 < third <= stored * 3 // 4
    assert rig.data() == rig.blobs[0].plain
    assert rig.metrics.chunks_fetched == len(SIZES)


def test_ten_tries(rig, caplog):
    rig.readers[0].stream_ends = [10] * 20
    rig.run()
    assert rig.readers[0].streams == [0] * 10
    assert "not prefetched to its end: broken" in caplog.text


def test_a_stream_that_ends_early_without_an_error(rig, caplog):
    del rig.readers[0].stored[-10:]
    rig.run(batch_size=CHUNK_SIZE)
    assert len(rig.readers[0].streams) == 10
    assert "stream ends too early" in caplog.text
    assert rig.cached[0].chunks.ready_count == len(SIZES) - 1


def test_lasting_errors_end_at_once(rig, caplog):
    rig.readers[0].error = NotFound("no such blob")
    rig.run()
    assert len(rig.readers[0].streams) == 1
    assert "no such blob" in caplog.text


def test_a_bad_chunk_harms_no_other(rig):
    reader, blob = rig.readers[0], rig.blobs[0]
    bad = blob.chunks[9]
    reader.stored[bad.compressed_offset + 5] ^= 0xFF
    rig.run(batch_size=1 << 30)
    assert len(reader.streams) == 1
    # The chunks behind it are under way still: a request ends with its first error.
    for chunk in blob.chunks[10:]:
        rig.fetcher.ensure(rig.cached[0], chunk.uncompressed_offset, 1)
    assert rig.cached[0].chunks.ready_count == len(SIZES) - 1
    assert reader.reads == []
    reader.stored[bad.compressed_offset + 5] ^= 0xFF
    rig.fetcher.ensure(rig.cached[0], bad.uncompressed_offset, 1)
    assert rig.data() == blob.plain


class Answer:
    def __init__(self):
        self.called = threading.Event()

    def __call__(self, error):
        self.called.set()


def test_nothing_is_taken_while_a_reader_waits(rig):
    reader, cached = rig.readers[0], rig.cached[0]
    reader.gate.clear()
    answer = Answer()
    rig.fetcher.request(cached, 0, 1, answer)
    assert reader.entered.wait(60)
    (thread,) = rig.start()._threads
    thread.join(0.2)
    assert reader.streams == []
    reader.gate.set()
    assert answer.called.wait(60)
    thread.join(60)
    assert reader.streams == [0]


def test_a_stream_stands_still_for_a_reader(rig):
    reader, cached = rig.readers[0], rig.cached[0]
    taken, waiting, release = [], threading.Event(), threading.Event()
    pieces = reader._pieces

    def slow(offset, end):
        for number, piece in enumerate(pieces(offset, end)):
            taken.append(number)
            if number == 3:
                rig.fetcher.request(cached, rig.blobs[0].chunks[-1].uncompressed_offset, 1, answer)
                waiting.set()
            yield piece

    def hang(offset, length):
        release.wait(30)
        return bytes(reader.stored[offset : offset + length])

    answer = Answer()
    reader._pieces, reader.read_at = slow, hang
    (thread,) = rig.start()._threads
    assert waiting.wait(60)
    thread.join(0.2)
    assert taken == [0, 1, 2, 3]
    release.set()
    thread.join(60)
    assert answer.called.wait(60)
    while rig.fetcher._outstanding.requests:
        time.sleep(0.001)
    assert rig.data() == rig.blobs[0].plain


def test_bandwidth_and_stop(rig):
    rig.readers[0].piece = 100
    run = rig.start(bandwidth_limit=1000)
    (thread,) = run._threads
    thread.join(0.2)
    assert thread.is_alive()
    run.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert not rig.cached[0].is_complete


def test_stop_does_not_wait_for_a_backend_that_hangs(rig):
    rig.readers[0].gate.clear()
    run = rig.start()
    assert rig.readers[0].entered.wait(60)
    run.stop()
    (thread,) = run._threads
    assert thread.is_alive()
    rig.readers[0].gate.set()
    thread.join(60)
    assert rig.cached[0].chunks.ready_count == 0


def test_detach_under_a_stream(rig):
    run = rig.start(bandwidth_limit=100_000)
    while not rig.readers[0].streams:
        time.sleep(0.001)
    rig.fetcher.detach(rig.cached[0])
    run.stop()
    assert not rig.cached[0].is_complete


def test_over_http(tmp_path):
    blob = Blob(SIZES)
    with BlobServer({blob.id: blob.stored}) as server:
        server.fault, server.fault_count = "truncate", 1
        backend = open_backend(HttpProxyConfig(server.address))
        rig = Rig(tmp_path, blob, readers=[backend.open(blob.id)])
        rig.run(batch_size=CHUNK_SIZE)
        assert rig.data() == blob.plain
        (_, first), (_, second) = server.ranges
        assert first is None
        assert second is None or second.endswith("-")
        rig.close()
        backend.close()
