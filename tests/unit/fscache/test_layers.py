"""Original layers: their tables come from another blob, chunks of a context come together."""

import threading
import time

import pytest
from fakes.layer_image import LayerBlob, content, gzipped, layer_tar
from fakes.memory_reader import MemoryReader

from erofs.errors import CodecError, CorruptStructure, IntegrityError, NydusError
from fscache.backend.retry import RetryPolicy
from fscache.cache.cachedblob import CachedBlob
from fscache.cache.layer import open_reader, tables_of
from fscache.cache.plan import read_plan
from fscache.fetch.fetcher import Fetcher, FetcherOptions
from fscache.fetch.streamprefetch import StreamPrefetch
from fscache.metrics import CacheMetrics
from fscache.settings import PrefetchConfig

SIZES = [10, 100_000, 700_000, 1, 2_500_000, 4096, 1_300_000]
FILES = [content(size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    return LayerBlob(tmp_path_factory.mktemp("layer"), FILES)


class Rig:
    """A fetcher with one layer."""

    def __init__(self, directory, blob):
        self.blob = blob
        self.reader = blob.reader()
        self.metrics = CacheMetrics(directory)
        self.fetcher = Fetcher(FetcherOptions(workers=4, negative_ttl=0, sync_interval=60))
        self.cached = CachedBlob.open(directory, blob.entry, blob.chunks, self.reader, self.metrics)
        self.cached.retry = RetryPolicy(attempts=1)
        self.fetcher.attach(self.cached)

    def ensure(self, chunk):
        self.fetcher.ensure(self.cached, chunk.uncompressed_offset, chunk.uncompressed_size)

    def data(self):
        while self.fetcher._outstanding.requests:
            time.sleep(0.001)
        return self.cached.path.read_bytes()


@pytest.fixture
def rig(tmp_path, layer):
    rig = Rig(tmp_path, layer)
    yield rig
    rig.fetcher.close(5)


def test_one_chunk_brings_its_context(rig):
    layer, tables = rig.reader._layer, rig.reader.tables
    table = rig.cached.locate(threading.Event())
    contexts = set(table.places.context_numbers)
    assert len(contexts) >= 4
    assert layer.reads == []
    assert len(tables.reads) == 1
    chunk = max(rig.blob.chunks, key=lambda info: info.chunk_index)
    rig.ensure(chunk)
    assert len(layer.reads) == 1
    rest = [
        index
        for index in range(len(table.places))
        if table.context(index) == table.context(chunk.chunk_index)
    ]
    assert len(rest) > 5
    assert all(rig.cached.chunks.is_ready(index) for index in rest)
    assert len(tables.reads) == 1


def test_everything(rig):
    rig.fetcher.fetch_all(rig.cached)
    assert rig.data() == rig.blob.plain
    # Neighbouring contexts have bytes in common; together they are one range.
    assert len(rig.reader._layer.reads) < 3


def test_small_runs(rig):
    table = rig.cached.locate(threading.Event())
    runs = list(table.runs(table.positions(), 1))
    assert len(runs) == len(set(table.places.context_numbers))
    for run in runs:
        rig.fetcher.prefetch(rig.cached, range(run[0], run[-1] + 1), lambda error: None)
    assert rig.data() == rig.blob.plain


@pytest.mark.parametrize("batch", [1, 1 << 20])
@pytest.mark.parametrize("piece", [1000, 1 << 18])
def test_streamed(rig, batch, piece):
    rig.reader._layer.piece = piece
    config = PrefetchConfig(enable=True, stream_prefetch=True, batch_size=batch)
    run = StreamPrefetch(rig.fetcher, [(rig.cached, rig.reader)], config)
    for thread in run._threads:
        thread.join(60)
    assert rig.data() == rig.blob.plain
    assert rig.cached.is_complete
    assert rig.reader._layer.streams == [0]


@pytest.mark.parametrize("members", [1, 7, 40])
@pytest.mark.parametrize("toc", [False, True])
def test_members_and_tables_of_contents(tmp_path, members, toc):
    layer = gzipped(layer_tar(*FILES[:3]), members)
    rig = Rig(tmp_path, LayerBlob(tmp_path / "made", FILES[:3], layer, toc=toc))
    rig.fetcher.fetch_all(rig.cached)
    assert rig.data() == rig.blob.plain
    rig.fetcher.close(5)


def test_layers_that_are_not_compressed(tmp_path):
    layer = layer_tar(*FILES)
    rig = Rig(tmp_path, LayerBlob(tmp_path / "made", FILES, layer))
    rig.fetcher.fetch_all(rig.cached)
    assert rig.data() == rig.blob.plain
    # Its bootstrap knows all places.
    assert rig.reader.tables.reads == []
    rig.fetcher.close(5)


def test_broken_layers_harm_what_is_broken(rig):
    table = rig.cached.locate(threading.Event())
    broken = table.places.context_numbers[-1] - 1
    index = next(i for i in range(len(table.places)) if table.context(i) == broken)
    start, length = table.stored_range([index])
    stored = bytearray(rig.blob.layer.stored)
    # In the middle, where no neighbour has its bytes.
    stored[start + length // 2 : start + length // 2 + 40] = bytes(40)
    rig.reader._layer.stored = bytes(stored)
    failed = []
    for chunk in rig.blob.chunks:
        try:
            rig.ensure(chunk)
        except (CodecError, IntegrityError):
            failed.append(table.context(chunk.chunk_index))
    assert {broken} <= set(failed) <= {broken, broken + 1}
    assert len(failed) < len(rig.blob.chunks) / 2
    data = rig.data()
    for chunk in rig.blob.chunks:
        place = slice(
            chunk.uncompressed_offset, chunk.uncompressed_offset + chunk.uncompressed_size
        )
        ready = rig.cached.chunks.is_ready(chunk.chunk_index)
        assert data[place] == (rig.blob.plain[place] if ready else bytes(len(data[place])))


def test_layer_that_is_another(rig):
    rig.reader._layer.stored = gzipped(layer_tar(*reversed(FILES)))
    for chunk in rig.blob.chunks[:3]:
        with pytest.raises(NydusError):
            rig.ensure(chunk)
    assert not any(rig.data())


def test_tables_that_are_broken(rig):
    stored = rig.blob.tables.stored
    rig.reader.tables.stored = bytes([stored[0] ^ 1]) + stored[1:]
    with pytest.raises((CodecError, CorruptStructure)):
        rig.ensure(rig.blob.chunks[0])
    assert rig.reader._layer.reads == []
    rig.reader.tables.stored = stored
    rig.ensure(rig.blob.chunks[0])


class Place:
    """A backend that remembers what is asked for."""

    def __init__(self):
        self.opened = []

    def open(self, blob_id):
        self.opened.append(blob_id)
        return MemoryReader(type("Blob", (), {"id": blob_id, "stored": b""}))


def test_what_is_opened(tmp_path, layer):
    """Layer and tables: by the digest in the bootstrap, or as the file with the bootstrap."""
    (plan,) = read_plan(layer.bootstrap).blobs
    place = Place()
    reader = open_reader(place, plan)
    assert place.opened == [layer.layer.id, layer.tables.id]
    assert reader.blob_id == layer.layer.id
    assert tables_of(reader).blob_id == layer.tables.id
    data = layer.bootstrap.read_bytes()
    digest = bytes.fromhex(layer.tables.id)
    assert data.count(digest) == 1
    unnamed = tmp_path / "unnamed.boot"
    unnamed.write_bytes(data.replace(digest, bytes(32)))
    (plan,) = read_plan(unnamed, tmp_path / "theblob.zran").blobs
    assert plan.tables_id == "theblob"


def test_other_blobs_are_one():
    reader = MemoryReader(type("Blob", (), {"id": "b" * 64, "stored": b""}))
    assert tables_of(reader) is reader
