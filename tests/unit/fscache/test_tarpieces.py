"""Tars as blobs: fetched in pieces without digests, verified as a whole when all is there."""

import hashlib
import random
import threading

import pytest
from fakes.layer_image import Stored
from fakes.memory_reader import MemoryReader

from erofs.errors import CorruptStructure, IntegrityError
from erofs.rafs import BlobEntry, BlobFeatures, Compressor, Digester
from fscache.cache.cachedblob import CachedBlob
from fscache.cache.tarpieces import PIECE_BYTES, in_pieces
from fscache.fetch.fetcher import Fetcher, FetcherOptions
from fscache.metrics import CacheMetrics

TAR = random.Random(1).randbytes(3 * PIECE_BYTES + 10240)
ID = hashlib.sha256(TAR).hexdigest()


def entry_of(size, blob_id=ID, **changes):
    fields = {
        "blob_id": blob_id.encode(), "blob_index": 0, "chunk_size": 1 << 20, "chunk_count": 7,
        "compressor": Compressor.NONE, "digester": Digester.SHA256,
        "features": BlobFeatures.TARFS | BlobFeatures.CAP_TAR_TOC,
        "compressed_size": size, "uncompressed_size": size, "blob_toc_size": 0,
        "ci_compressor": 1, "ci_offset": 0, "ci_compressed_size": 0, "ci_uncompressed_size": 0,
    }  # fmt: skip
    return BlobEntry(**fields | changes)


class Rig:
    def __init__(self, directory, stored=TAR, blob_id=ID):
        self.reader = MemoryReader(Stored(blob_id, stored))
        self.metrics = CacheMetrics(directory)
        self.completed = threading.Event()
        self.fetcher = Fetcher(FetcherOptions(negative_ttl=0.0, sync_interval=60.0))
        plan = in_pieces(entry_of(len(TAR), blob_id))
        self.cached = CachedBlob.open(
            directory, *plan, self.reader, self.metrics, self.completed.set
        )
        self.fetcher.attach(self.cached)


@pytest.fixture
def opened(tmp_path):
    rigs = []

    def open_rig(*arguments):
        rigs.append(Rig(tmp_path, *arguments))
        return rigs[-1]

    yield open_rig
    for rig in rigs:
        rig.fetcher.close(5)


def test_pieces_cover_the_tar():
    entry, chunks = in_pieces(entry_of(len(TAR)))
    assert entry.chunk_count == len(chunks) == 4
    assert [chunk.uncompressed_offset for chunk in chunks] == [
        number * PIECE_BYTES for number in range(4)
    ]
    assert sum(chunk.uncompressed_size for chunk in chunks) == len(TAR)


@pytest.mark.parametrize(
    ("stored", "plain"), [(0, 0), (512, 1024), (1 << 41, 1 << 41), (1 << 50, 1 << 50)]
)
def test_impossible_sizes(stored, plain):
    with pytest.raises(CorruptStructure, match="sizes of a tar"):
        in_pieces(entry_of(plain, compressed_size=stored))


def test_a_part_is_read_alone_and_the_whole_is_verified(opened):
    rig = opened()
    rig.fetcher.ensure(rig.cached, 2 * PIECE_BYTES + 512, 512)
    assert rig.reader.reads[0] == (2 * PIECE_BYTES, PIECE_BYTES)
    data = rig.cached.read_ready(2 * PIECE_BYTES + 512, 512)
    assert data == TAR[2 * PIECE_BYTES + 512 : 2 * PIECE_BYTES + 1024]
    rig.fetcher.fetch_all(rig.cached)
    assert rig.cached.path.read_bytes()[: len(TAR)] == TAR
    # Perhaps by the thread that syncs.
    assert rig.completed.wait(60)


def test_wrong_tar_is_never_complete(opened):
    """Nobody can tell before all of it is there; from then on nothing of it is given."""
    wrong = bytearray(TAR)
    wrong[1000] ^= 1
    rig = opened(bytes(wrong))
    rig.fetcher.ensure(rig.cached, 0, 4096)
    with pytest.raises(IntegrityError, match="digest that it is named by"):
        rig.fetcher.fetch_all(rig.cached)
    assert not rig.completed.is_set()
    assert not rig.cached.cache.map_path.exists()
    with pytest.raises(IntegrityError, match="digest that it is named by"):
        rig.fetcher.ensure(rig.cached, 0, 4096)
    assert rig.metrics.counts().chunks_ready == 0


def test_complete_tar_is_verified_again_by_the_next_process(opened):
    first = opened()
    first.fetcher.fetch_all(first.cached)
    with first.cached.path.open("r+b") as file:
        file.write(b"damage")
    second = opened(b"")
    assert second.cached.is_complete
    with pytest.raises(IntegrityError):
        second.cached.sync()
    assert not second.cached.is_complete
    third = opened()
    third.fetcher.fetch_all(third.cached)
    assert third.cached.path.read_bytes()[: len(TAR)] == TAR


def test_name_that_is_no_digest(opened, caplog):
    rig = opened(TAR, "layer-7")
    rig.fetcher.fetch_all(rig.cached)
    assert "layer-7 cannot be verified" in caplog.text
    # Perhaps by the thread that syncs.
    assert rig.completed.wait(60)
