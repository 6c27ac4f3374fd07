"""The background fetch: what it takes, in which order, and that readers come first."""

import io
import random
import threading
import time

import pytest
from fakes.built import built, member, tar_of
from fakes.memory_reader import MemoryReader

from builder import BuildOptions, PrefetchPolicy, SourceType, build
from erofs import open_bootstrap
from erofs.rafs import Compressor
from fscache.backend import Unavailable
from fscache.backend.retry import RetryPolicy
from fscache.cache.cachedblob import CachedBlob
from fscache.cache.plan import read_plan
from fscache.cache.tarpieces import PIECE_BYTES
from fscache.fetch.fetcher import Fetcher, FetcherOptions
from fscache.fetch.prefetch import MAX_FAILURES, Prefetch
from fscache.fetch.prefetchlist import (
    PrefetchListError,
    check_paths,
    chunks_below,
    listed_nids,
    read_prefetch_file,
)
from fscache.metrics import CacheMetrics
from fscache.settings import PrefetchConfig
from tests.leftovers import said

CHUNK = 0x1000
RANDOM = random.Random(3)
CONTENT = {name: RANDOM.randbytes(3 * CHUNK) for name in "abcf"} | {"e": b""}
TREE = tar_of(
    member("d", "dir"),
    *(member(name, data=data) for name, data in CONTENT.items()),
    member("d/x", data=RANDOM.randbytes(2 * CHUNK)),
    member("d/sub", "dir"),
    member("d/sub/y", data=b"y"),
    member("d/hard", "link", linkname="a"),
    member("soft", "symlink", linkname="a"),
)


class Stored:
    """A blob of a directory as `MemoryReader` wants it."""

    def __init__(self, directory, blob_id):
        self.id = blob_id
        self.stored = (directory / blob_id).read_bytes()


class Rig:
    """An image with one blob behind a fetcher, and the prefetches of a test."""

    def __init__(self, directory, **options):
        options.setdefault("compressor", Compressor.NONE)
        self.bootstrap = built(directory, TREE, **options)
        (plan,) = read_plan(self.bootstrap).blobs
        self.reader = MemoryReader(Stored(directory, plan.entry.id))
        self.metrics = CacheMetrics(directory)
        self.cached = CachedBlob.open(
            directory / "cache", plan.entry, plan.chunks, self.reader, self.metrics
        )
        self.cached.retry = RetryPolicy(attempts=1)
        self.fetcher = Fetcher(FetcherOptions(workers=4, negative_ttl=0, sync_interval=60))
        self.fetcher.attach(self.cached)
        self.runs = []

    def start(self, files=None, **config):
        config = {"threads": 1, "batch_size": CHUNK, **config}
        config = PrefetchConfig(enable=True, **config)
        run = Prefetch(self.fetcher, self.bootstrap, [self.cached], files, config)
        self.runs.append(run)
        return run

    def run(self, files=None, **config):
        """Prefetch to the end; return which chunks were read, in order."""
        self.start(files, **config)._thread.join(60)
        while self.fetcher._outstanding.requests:
            time.sleep(0.001)
        return self.read_chunks()

    def read_chunks(self):
        offsets = self.cached.map.compressed_offsets
        found = []
        for offset, length in list(self.reader.reads):
            found.append([i for i in range(len(offsets)) if offset <= offsets[i] < offset + length])
        return found

    def chunks(self, *paths):
        """Return the chunks of files, in this order."""
        with open_bootstrap(self.bootstrap) as image:
            return [
                info.chunk_index
                for path in paths
                for info in image.file_chunks(image.lookup(path.encode()))
            ]

    def close(self):
        self.reader.gate.set()
        for run in self.runs:
            run.stop()
        self.fetcher.close(5)


@pytest.fixture
def rig(tmp_path):
    (tmp_path / "cache").mkdir()
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def flat(groups):
    return [chunk for group in groups for chunk in group]


# Lists


def nids(rig, *paths):
    with open_bootstrap(rig.bootstrap) as image:
        return [image.lookup(path).nid for path in paths]


def test_paths_in_their_order_and_once(rig, caplog):
    with open_bootstrap(rig.bootstrap) as image:
        found = listed_nids(image, [b"/f", b"/nowhere/x", b"//d/./x", b"/d/hard", b"/a", b"/f"])
    assert found == nids(rig, b"/f", b"/d/x", b"/a")
    assert [record.getMessage() for record in said(caplog, "fscache.fetch.prefetchlist")] == [
        "file to prefetch is not in the image: b'/nowhere/x'"
    ]


def test_without_a_list_the_table_counts(tmp_path):
    (tmp_path / "cache").mkdir()
    rig = Rig(tmp_path, prefetch_policy=PrefetchPolicy.FS, prefetch_patterns=[b"/c", b"/d"])
    with open_bootstrap(rig.bootstrap) as image:
        assert listed_nids(image, None) == nids(rig, b"/c", b"/d")
        assert listed_nids(image, []) == []
    rig.close()


def test_directories_mean_all_below(rig):
    with open_bootstrap(rig.bootstrap) as image:
        named = [image.lookup(path).nid for path in (b"/b", b"/soft", b"/e", b"/d", b"/a")]
        found = [info.chunk_index for info in chunks_below(image, named)]
    # The hard link below `d` is `a`, which then is there already.
    assert found == rig.chunks("/b", "/d/hard", "/d/sub/y", "/d/x")


def test_list_files(tmp_path):
    path = tmp_path / "list"
    path.write_bytes(b"/a b\n\n  /name\xff \r\n/c")
    assert read_prefetch_file(path) == (b"/a b", b"/name\xff", b"/c")
    path.write_bytes(b"/a\nb\n")
    with pytest.raises(PrefetchListError, match="not absolute") as caught:
        read_prefetch_file(path)
    assert caught.value.where["path"] == path
    with pytest.raises(PrefetchListError, match="cannot be read"):
        read_prefetch_file(tmp_path)
    with pytest.raises(PrefetchListError):
        check_paths([b""])


# Runs


def test_listed_files_come_in_their_order(rig):
    wanted = rig.chunks("/f", "/b", "/d/x")
    assert flat(rig.run([b"/f", b"/b", b"/d/x"])) == wanted
    assert rig.cached.chunks.ready_count == len(wanted)


def test_neighbours_are_read_together(rig):
    groups = rig.run([b"/a", b"/b", b"/d/x"], batch_size=2 * CHUNK)
    # Six chunks of two files side by side, then two of another.
    assert [len(group) for group in groups] == [2, 2, 2, 2]
    assert flat(groups) == rig.chunks("/a", "/b", "/d/x")


def test_everything_after_the_list(rig):
    first = rig.chunks("/f")
    rest = [index for index in rig.cached.map.positions() if index not in first]
    assert flat(rig.run([b"/f"], prefetch_all=True)) == first + rest
    assert rig.cached.is_complete


def test_the_root_means_everything(rig):
    rig.run([b"/d/x", b"/"])
    assert flat(rig.read_chunks())[:2] == rig.chunks("/d/x")
    assert rig.cached.is_complete


def test_only_missing_names_fetch_nothing(rig):
    assert rig.run([b"/nowhere"]) == []


def test_a_broken_bootstrap_is_only_a_warning(rig, caplog):
    rig.bootstrap.write_bytes(b"broken")
    assert rig.run([b"/a"]) == []
    assert "prefetch ends early" in caplog.text


class Answer:
    def __init__(self):
        self.called = threading.Event()

    def __call__(self, error):
        self.error = error
        self.called.set()


def test_little_is_begun_while_a_reader_waits(rig):
    """A reader that hangs leaves two of four workers to the prefetch, which may have more."""
    answer = Answer()
    rig.fetcher._most_background = 8
    rig.reader.gate.clear()
    x = rig.cached.map.uncompressed_offsets[rig.chunks("/d/sub/y")[0]]
    rig.fetcher.request(rig.cached, x, 1, answer)
    assert rig.reader.entered.wait(60)
    run = rig.start(prefetch_all=True, threads=8)
    while len(rig.reader.reads) < 3:
        time.sleep(0.005)
    # Far longer than it needs to begin more.
    run._thread.join(0.3)
    assert run._thread.is_alive()
    assert len(rig.reader.reads) == 3
    rig.reader.gate.set()
    assert answer.called.wait(60)
    run._thread.join(60)
    rig.fetcher.ensure(rig.cached, 0, rig.cached.map.uncompressed_size)
    assert rig.cached.is_complete


def test_half_of_the_workers_stay_free(rig):
    """Two of four workers hang in the prefetch, and a reader is served by another."""
    rig.reader.gate.clear()
    rig.start(prefetch_all=True, threads=100)
    while len(rig.reader.reads) < 2:
        time.sleep(0.005)
    time.sleep(0.1)
    assert len(rig.reader.reads) == 2
    last = rig.cached.map.positions()[-1]
    offset = rig.cached.map.compressed_offsets[last]
    answer = Answer()
    rig.fetcher.request(rig.cached, rig.cached.map.uncompressed_offsets[last], 1, answer)
    while len(rig.reader.reads) < 3:
        time.sleep(0.005)
    assert rig.reader.reads[-1][0] == offset


def test_a_backend_that_fails_is_left_alone(rig, caplog):
    rig.reader.error = Unavailable("gone")
    rig.run(prefetch_all=True)
    assert MAX_FAILURES <= len(rig.reader.reads) <= MAX_FAILURES + 1
    assert "the backend keeps failing" in caplog.text


def test_the_bandwidth_is_kept_and_stop_does_not_wait_for_it(rig):
    run = rig.start(prefetch_all=True, bandwidth_limit=1)
    while not rig.reader.reads:
        time.sleep(0.005)
    run._thread.join(0.2)
    assert run._thread.is_alive()
    run.stop()
    assert len(rig.reader.reads) == 1


def test_what_is_there_is_not_fetched_again(rig):
    rig.fetcher.ensure(rig.cached, 0, rig.cached.map.uncompressed_size)
    reads = len(rig.reader.reads)
    rig.run([b"/a"], prefetch_all=True)
    assert len(rig.reader.reads) == reads
    assert rig.metrics.as_dict()["prefetch_requests_count"] == 0


def test_files_in_one_piece_of_a_tar_are_one_request(tmp_path):
    """Pieces of a tar have nothing to do with the files in it."""
    small = tar_of(*(member(f"d/{number:03d}", data=b"x" * 700) for number in range(300)))
    bootstrap = tmp_path / "boot"
    result = build(
        io.BytesIO(small),
        BuildOptions(source_type=SourceType.TARFS, bootstrap=bootstrap, blob_dir=tmp_path),
    )
    (tmp_path / result.blobs[0]).write_bytes(small)
    (plan,) = read_plan(bootstrap).blobs
    reader = MemoryReader(Stored(tmp_path, plan.entry.id))
    metrics = CacheMetrics(tmp_path)
    cached = CachedBlob.open(tmp_path / "cache", plan.entry, plan.chunks, reader, metrics)
    fetcher = Fetcher(FetcherOptions(workers=16))
    fetcher.attach(cached)
    # While nothing is ready yet: more requests than these would have to wait for it.
    reader.gate.clear()
    config = PrefetchConfig(enable=True, threads=len(plan.chunks), batch_size=1, prefetch_all=False)
    run = Prefetch(fetcher, bootstrap, [cached], [b"/d"], config)
    run._thread.join(60)
    assert not run._thread.is_alive()
    reader.gate.set()
    fetcher.close(60)
    assert sorted(reader.reads) == [
        (start, min(PIECE_BYTES, len(small) - start)) for start in range(0, len(small), PIECE_BYTES)
    ]
