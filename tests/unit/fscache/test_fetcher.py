import errno
import os
import random
import threading

import pytest
from fakes.blob_image import CHUNK_SIZE, Blob
from fakes.blob_server import BlobServer
from fakes.memory_reader import MemoryReader

from erofs.errors import CodecError, IntegrityError, NydusError, OutOfBounds
from erofs.rafs import Compressor, Digester
from fscache.backend import BackendError, HttpProxyConfig, ShortRead, Unavailable, open_backend
from fscache.backend.retry import RetryPolicy
from fscache.cache.cachedblob import CachedBlob
from fscache.cache.cachefile import CacheError
from fscache.fetch.fetcher import Fetcher, FetcherOptions
from fscache.metrics import CacheMetrics

SIZES = [CHUNK_SIZE] * 6 + [100, 5000] + [CHUNK_SIZE] * 8
ALL = sum(-(-size // 4096) * 4096 for size in SIZES)
FAST = FetcherOptions(
    workers=8,
    negative_ttl=0.0,
    sync_interval=60.0,
)


class Rig:
    """A fetcher with one blob; collects the answers of requests."""

    def __init__(self, directory, blob=None, reader=None, options=FAST, on_complete=None):
        self.blob = blob or Blob(SIZES)
        self.reader = reader or MemoryReader(self.blob)
        self.metrics = CacheMetrics(directory)
        self.directory = directory
        self.fetcher = Fetcher(options)
        self.on_complete = on_complete
        self.cached = self.open()
        self.fetcher.attach(self.cached)

    def open(self):
        cached = CachedBlob.open(
            self.directory,
            self.blob.entry,
            self.blob.chunks,
            self.reader,
            self.metrics,
            self.on_complete,
        )
        cached.retry = RetryPolicy(attempts=2, first_delay=0.001)
        return cached

    def request(self, offset=0, length=ALL):
        answer = Answer()
        self.fetcher.request(self.cached, offset, length, answer)
        return answer

    def ensure(self, offset=0, length=ALL):
        self.fetcher.ensure(self.cached, offset, length)

    def data(self):
        return self.cached.path.read_bytes()

    def chunk(self, position):
        """Return offset and length of a chunk in the uncompressed space."""
        chunk = self.blob.chunks[position]
        return chunk.uncompressed_offset, chunk.uncompressed_size


class Answer:
    def __init__(self):
        self.errors = []
        self.called = threading.Event()

    def __call__(self, error):
        self.errors.append(error)
        self.called.set()

    def wait(self):
        assert self.called.wait(60)
        assert len(self.errors) == 1
        return self.errors[0]


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.reader.gate.set()
    rig.fetcher.close(5)


@pytest.mark.parametrize("digester", list(Digester))
@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD])
def test_everything_arrives(tmp_path, compressor, digester):
    rig = Rig(tmp_path, Blob(SIZES, compressor=compressor, digester=digester))
    rig.ensure()
    assert rig.data() == rig.blob.plain
    assert rig.reader.reads == [(0, len(rig.blob.stored))]
    rig.fetcher.close(5)


def test_only_what_is_asked_for(rig):
    rig.ensure(4096, 4096)
    assert rig.data() == rig.blob.plain[:CHUNK_SIZE] + bytes(ALL - CHUNK_SIZE)
    assert rig.metrics.chunks_fetched == 1
    assert not rig.cached.is_complete


def test_ready_ranges_are_answered_inline(rig):
    rig.ensure()
    reads = len(rig.reader.reads)
    answers = []
    rig.fetcher.request(rig.cached, 0, ALL, lambda error: answers.append(threading.get_ident()))
    assert answers == [threading.get_ident()]
    assert len(rig.reader.reads) == reads


def test_refused_ranges_are_answered_inline(rig):
    assert isinstance(rig.request(0, ALL + 1).wait(), OutOfBounds)
    assert rig.reader.reads == []


def test_single_flight(rig):
    rig.reader.gate.clear()
    answers = [rig.request(index % 4 * 4096, CHUNK_SIZE) for index in range(16)]
    threads = [threading.Thread(target=rig.ensure, args=(0, 4096)) for _ in range(16)]
    for thread in threads:
        thread.start()
    rig.reader.gate.set()
    for thread in threads:
        thread.join()
    assert [answer.wait() for answer in answers] == [None] * 16
    assert len(rig.reader.reads) == 2  # the first chunk, then the second, once each
    assert rig.metrics.chunks_fetched == 2


def test_merged_ranges(tmp_path):
    blob = Blob([CHUNK_SIZE] * 8, compressor=Compressor.NONE)
    rig = Rig(tmp_path, blob, options=FetcherOptions(max_merge=3 * CHUNK_SIZE, sync_interval=60))
    rig.ensure(4 * CHUNK_SIZE, 4096)
    rig.ensure(0, len(blob.plain))
    size = CHUNK_SIZE
    assert sorted(rig.reader.reads) == [
        (0, 3 * size),
        (3 * size, size),
        (4 * size, size),
        (5 * size, 3 * size),
    ]
    assert rig.data() == blob.plain
    rig.fetcher.close(5)


def test_corrupted_chunk_harms_no_other_and_heals(rig):
    bad = rig.blob.chunks[2].compressed_offset + 20
    rig.reader.stored[bad] ^= 0xFF
    good, error = rig.request(*rig.chunk(3)), rig.request(0, 4 * CHUNK_SIZE).wait()
    assert isinstance(error, IntegrityError | CodecError)
    assert error.errno == errno.EIO
    assert (error.where["blob"], error.where["chunk"]) == (rig.blob.id, 2)
    assert good.wait() is None
    rig.ensure(0, 2 * CHUNK_SIZE)
    rig.ensure(*rig.chunk(3))
    expected = bytearray(rig.blob.plain[: 4 * CHUNK_SIZE]) + bytes(ALL - 4 * CHUNK_SIZE)
    expected[2 * CHUNK_SIZE : 3 * CHUNK_SIZE] = bytes(CHUNK_SIZE)
    assert rig.data() == expected
    assert rig.metrics.digest_failures == 1
    rig.reader.stored[bad] ^= 0xFF
    rig.ensure()
    assert rig.data() == rig.blob.plain


@pytest.mark.parametrize("compressor", [Compressor.ZSTD, Compressor.LZ4_BLOCK, Compressor.NONE])
def test_a_bad_one_of_many_small_chunks_harms_no_other(tmp_path, compressor):
    rig = Rig(tmp_path, Blob([3000 + number for number in range(200)], compressor=compressor))
    good = rig.blob.plain
    rig.reader.stored[rig.blob.chunks[77].compressed_offset + 30] ^= 0xFF
    error = rig.request(0, len(good)).wait()
    assert isinstance(error, IntegrityError | CodecError)
    assert error.where["chunk"] == 77
    for position in {*range(200)} - {77}:
        rig.ensure(*rig.chunk(position))
    start, end = 77 * 4096, 78 * 4096
    assert rig.data() == good[:start] + bytes(4096) + good[end:]
    assert (rig.metrics.digest_failures, rig.metrics.chunks_fetched) == (1, 199)
    rig.fetcher.close(5)


def test_wrong_digest_of_an_uncompressed_chunk(tmp_path):
    rig = Rig(tmp_path, Blob(SIZES, compressor=Compressor.NONE))
    rig.reader.stored[5] ^= 1
    with pytest.raises(IntegrityError, match="digest"):
        rig.ensure(0, 4096)
    assert rig.data() == bytes(ALL)
    rig.fetcher.close(5)


def test_truncated_blob_gives_what_it_has(rig):
    del rig.reader.stored[rig.blob.chunks[3].compressed_offset + 1 :]
    assert isinstance(rig.request().wait(), ShortRead)
    rig.ensure(0, 3 * CHUNK_SIZE)
    with pytest.raises(ShortRead):
        rig.ensure(*rig.chunk(3))
    assert rig.data() == rig.blob.plain[: 3 * CHUNK_SIZE] + bytes(ALL - 3 * CHUNK_SIZE)


def test_negative_cache_is_short_and_not_sticky(tmp_path):
    options = FetcherOptions(negative_ttl=60, sync_interval=60)
    rig = Rig(tmp_path, options=options)
    rig.reader.error = BackendError("gone")
    first = rig.request(0, 4096).wait()
    assert rig.request(0, 4096).errors == [first]
    assert len(rig.reader.reads) == 1
    rig.reader.error = None
    rig.ensure(*rig.chunk(1))
    rig.fetcher.close(5)


def test_temporary_errors_are_retried(rig):
    real = rig.reader.read_at

    def once(offset, length):
        rig.reader.read_at = real
        raise Unavailable("busy", temporary=True)

    rig.reader.read_at = once
    rig.ensure()
    assert rig.data() == rig.blob.plain


def test_a_worker_that_breaks_answers(rig, caplog):
    rig.reader.error = ZeroDivisionError("bug")
    error = rig.request().wait()
    assert isinstance(error, CacheError)
    assert "ZeroDivisionError" in str(error)
    assert "Traceback" in caplog.text
    rig.reader.error = None
    rig.ensure()


def test_a_wrong_length_of_a_backend(rig):
    rig.reader.read_at = lambda offset, length: bytes(length + 1)
    with pytest.raises(IntegrityError, match="wrong length"):
        rig.ensure()
    assert rig.data() == bytes(ALL)


def test_an_answer_that_raises_harms_nobody(rig):
    def broken(error):
        raise ValueError("owner of the reply")

    rig.fetcher.request(rig.cached, 0, 4096, broken)
    rig.ensure()
    assert rig.data() == rig.blob.plain


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_full_disk_heals(rig, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        error = rig.request(0, 4096).wait()
    assert isinstance(error, CacheError)
    assert error.errno == code
    assert not rig.cached.chunks.is_dirty
    rig.ensure()
    assert rig.data() == rig.blob.plain


def test_truncated_cache_file_is_an_error_not_zeros(rig):
    rig.ensure()
    os.truncate(rig.cached.path, 4096)
    with pytest.raises(CacheError, match="size"):
        rig.ensure(0, 4096)


def test_restart_keeps_only_what_is_durable(tmp_path):
    rig = Rig(tmp_path)
    rig.ensure(0, 2 * CHUNK_SIZE)
    rig.fetcher.close(5)
    reader = MemoryReader(rig.blob)
    again = Rig(tmp_path, rig.blob, reader)
    assert again.cached.chunks.ready_count == 2
    again.ensure(2 * CHUNK_SIZE, CHUNK_SIZE)
    assert reader.reads == [
        (rig.blob.chunks[2].compressed_offset, rig.blob.chunks[2].compressed_size)
    ]
    # A crash: nothing is synced, since the blob is not complete and no time has passed.
    crashed = again.open()
    assert crashed.chunks.ready_count == 2
    crashed.close()
    again.ensure()
    assert again.data() == rig.blob.plain
    again.fetcher.close(5)


def test_a_map_without_its_data_is_not_believed(tmp_path):
    rig = Rig(tmp_path)
    rig.ensure()
    rig.fetcher.close(5)
    rig.cached.path.unlink()
    rig.cached.path.touch()
    os.truncate(rig.cached.path, ALL)
    again = Rig(tmp_path, rig.blob)
    assert again.cached.chunks.ready_count == 0
    again.ensure()
    assert again.data() == rig.blob.plain
    again.fetcher.close(5)


def test_completion_is_told_once_and_after_the_sync(tmp_path):
    told = threading.Event()
    states = []

    def on_complete():
        map_file = tmp_path / f"{'b' * 64}.blob.data.chunk_map"
        states.append(map_file.read_bytes()[4096:])
        told.set()

    rig = Rig(tmp_path, on_complete=on_complete)
    rig.ensure()
    assert told.wait(60)
    rig.ensure()
    rig.fetcher.close(5)
    assert states == [b"\xff\xff"]
    assert rig.cached.is_complete
    told.clear()
    again = Rig(tmp_path, rig.blob, on_complete=on_complete)
    assert told.wait(60)
    again.fetcher.close(5)
    assert len(states) == 2


def test_fetch_all(tmp_path):
    seen = []
    rig = Rig(tmp_path)
    rig.ensure(*rig.chunk(4))
    rig.fetcher.fetch_all(rig.cached, lambda done, total: seen.append((done, total)))
    assert rig.data() == rig.blob.plain
    assert seen[-1] == (sum(SIZES), sum(SIZES))
    assert not rig.cached.chunks.is_dirty
    metrics = rig.metrics.as_dict()
    assert metrics["data_all_ready"] is True
    assert metrics["prefetch_data_amount"] == sum(SIZES)
    rig.fetcher.close(5)


def test_fetch_all_reports_the_first_error(rig):
    rig.reader.stored[rig.blob.chunks[9].compressed_offset + 9] ^= 0x55
    with pytest.raises(NydusError) as caught:
        rig.fetcher.fetch_all(rig.cached)
    assert caught.value.where["chunk"] == 9


def test_close_fails_what_hangs_exactly_once(tmp_path):
    rig = Rig(tmp_path)
    rig.reader.gate.clear()
    answers = [rig.request(), rig.request(0, 4096)]
    assert rig.reader.entered.wait(60)
    closer = threading.Thread(target=rig.fetcher.close, args=(0.05,))
    closer.start()
    errors = [answer.wait() for answer in answers]
    assert all(isinstance(error, Unavailable) for error in errors)
    closer.join()
    assert isinstance(rig.request().wait(), NydusError)
    rig.reader.gate.set()
    for thread in rig.fetcher._pool._threads:
        thread.join()
    assert all(len(answer.errors) == 1 for answer in answers)
    with pytest.raises(CacheError, match="closed"):
        rig.cached.cache.check()


def test_close_waits_for_what_is_under_way(tmp_path):
    rig = Rig(tmp_path)
    rig.reader.gate.clear()
    answer = rig.request()
    closer = threading.Thread(target=rig.fetcher.close, args=(30,))
    closer.start()
    rig.reader.gate.set()
    closer.join()
    assert answer.wait() is None


def test_detach_under_a_fetch_writes_nowhere_else(rig):
    rig.reader.gate.clear()
    answer = rig.request()
    assert rig.reader.entered.wait(60)
    rig.fetcher.detach(rig.cached)
    assert isinstance(answer.wait(), Unavailable)
    assert isinstance(rig.request().wait(), CacheError)
    # The worker still owns the descriptor: its number is not free for another file.
    assert os.fstat(rig.cached.cache.fileno()).st_size == ALL
    rig.reader.gate.set()


def test_deadline_of_a_request(tmp_path):
    rig = Rig(tmp_path, options=FetcherOptions(request_deadline=0.05))
    rig.reader.gate.clear()
    answer = rig.request()
    assert "too long" in str(answer.wait())
    # Late is better than never; the next one gets the time that it takes.
    rig.fetcher._options = FAST
    rig.reader.gate.set()
    rig.ensure()
    rig.fetcher.close(5)
    assert len(answer.errors) == 1


def test_a_slow_blob_leaves_workers_to_others(rig, tmp_path):
    other = Blob([4096], blob_id="c" * 64)
    slow = [4096 * index for index in range(0, 96, 16)]
    fetcher = Fetcher(FetcherOptions(workers=2, workers_per_blob=1))
    cached = [
        CachedBlob.open(tmp_path / "x", rig.blob.entry, rig.blob.chunks, rig.reader, rig.metrics),
        CachedBlob.open(
            tmp_path / "x", other.entry, other.chunks, MemoryReader(other), rig.metrics
        ),
    ]
    for blob in cached:
        fetcher.attach(blob)
    rig.reader.gate.clear()
    answers = [Answer() for _ in slow]
    for offset, answer in zip(slow, answers, strict=True):
        fetcher.request(cached[0], offset, 4096, answer)
    fetcher.ensure(cached[1], 0, 4096)
    assert not any(answer.errors for answer in answers)
    rig.reader.gate.set()
    assert [answer.wait() for answer in answers] == [None] * len(slow)
    fetcher.close(5)


def test_metrics(rig):
    rig.ensure(0, 4096)
    rig.ensure(0, 2 * CHUNK_SIZE)
    rig.ensure(0, CHUNK_SIZE)
    metrics = rig.metrics.as_dict()
    assert list(metrics) == [
        "underlying_files",
        "store_path",
        "partial_hits",
        "whole_hits",
        "total",
        "entries_count",
        "prefetch_data_amount",
        "prefetch_requests_count",
        "prefetch_workers",
        "prefetch_unmerged_chunks",
        "prefetch_cumulative_time_millis",
        "prefetch_begin_time_secs",
        "prefetch_begin_time_millis",
        "prefetch_end_time_secs",
        "prefetch_end_time_millis",
        "buffered_backend_size",
        "data_all_ready",
    ]
    assert metrics["underlying_files"] == [f"{'b' * 64}.blob.data"]
    assert (metrics["total"], metrics["whole_hits"], metrics["partial_hits"]) == (3, 1, 1)
    assert metrics["entries_count"] == 2
    assert metrics["data_all_ready"] is False


def test_storm_of_readers_with_a_failing_backend(rig):
    real = rig.reader.read_at
    rng = random.Random(7)

    def moody(offset, length):
        if rng.random() < 0.3:
            raise Unavailable("busy", temporary=False)
        return real(offset, length)

    rig.reader.read_at = moody
    answers = []

    def read(seed):
        own = random.Random(seed)
        for _ in range(40):
            start = own.randrange(ALL // 4096) * 4096
            length = min(own.choice((4096, CHUNK_SIZE, 4 * CHUNK_SIZE)), ALL - start)
            answers.append((start, length, rig.request(start, length)))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for start, length, answer in answers:
        if answer.wait() is None:
            data = rig.data()
            assert data[start : start + length] == rig.blob.plain[start : start + length]
    assert len(answers) == 16 * 40
    rig.reader.read_at = real
    rig.ensure()
    assert rig.data() == rig.blob.plain
    assert rig.metrics.chunks_fetched == len(SIZES)
    assert rig.metrics.as_dict()["buffered_backend_size"] == 0
    assert not rig.fetcher._outstanding.requests


# With a real server


def test_over_http_with_every_fault(tmp_path):
    blob = Blob(SIZES)
    with BlobServer({blob.id: blob.stored}) as server:
        backend = open_backend(HttpProxyConfig(server.address, timeout=60))
        rig = Rig(tmp_path, blob, backend.open(blob.id))
        faults = (404, 401, 416, 429, 500, "truncate", "reset", "ignore-range", "wrong-range")
        for position, fault in enumerate((*faults, "long")):
            server.fault = fault
            error = rig.request(*rig.chunk(position)).wait()
            assert isinstance(error, BackendError), fault
        assert rig.data() == bytes(ALL)
        server.fault = None
        server.stop()
        assert isinstance(rig.request().wait(), Unavailable)
        server.start()
        server.requests.clear()
        rig.ensure()
        assert rig.data() == blob.plain
        assert server.requests[blob.id] == 1
        rig.fetcher.close(5)
        backend.close()


def test_over_http_that_stalls(tmp_path):
    blob = Blob(SIZES)
    with BlobServer({blob.id: blob.stored}) as server:
        backend = open_backend(HttpProxyConfig(server.address, timeout=0.1))
        rig = Rig(tmp_path, blob, backend.open(blob.id))
        server.fault = "stall"
        assert isinstance(rig.request(*rig.chunk(0)).wait(), Unavailable)
        assert rig.data() == bytes(ALL)
        rig.fetcher.close(5)
        backend.close()


def test_one_stumble_of_the_server_is_not_seen(tmp_path):
    blob = Blob(SIZES)
    with BlobServer({blob.id: blob.stored}) as server:
        backend = open_backend(HttpProxyConfig(server.address, timeout=60))
        rig = Rig(tmp_path, blob, backend.open(blob.id))
        for position, fault in enumerate((503, "truncate", "reset")):
            server.fault, server.fault_count = fault, 1
            rig.ensure(*rig.chunk(position))
        assert server.requests[blob.id] == 6
        rig.fetcher.close(5)
        backend.close()
