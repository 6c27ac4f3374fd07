"""How much is fetched with what a reader lacks, and ahead of a sweep."""

import pytest
from fakes.blob_image import Blob

from erofs.rafs import Compressor
from fscache.cache.blobmap import BlobMap
from fscache.cache.chunkmap import ChunkMap
from fscache.cache.window import Window
from fscache.fetch.outstanding import NOBODY

SIZE = 8192
COUNT = 2000


@pytest.fixture(scope="module")
def table():
    blob = Blob([SIZE] * COUNT, compressor=Compressor.NONE)
    return BlobMap(blob.entry, blob.chunks)


@pytest.fixture
def chunks(table, tmp_path):
    return ChunkMap(tmp_path / "map", table.known)


def make(limit=1 << 20, latency=0.0):
    window = Window()
    window.limit = limit
    window.answered(latency, 1)
    return window


def one(position):
    return range(position, position + 1)


def make_ready(chunks, positions):
    chunks.claim(positions, NOBODY)
    for position in positions:
        chunks.complete(position)


@pytest.mark.parametrize(
    ("latency", "size"), [(0, 1 << 20), (0.004, 5 << 18), (0.02, 9 << 18), (9, 4 << 20)]
)
def test_the_slower_the_answers_the_more(table, chunks, latency, size):
    found = make(limit=4 << 20, latency=latency).around(table, chunks, one(10))
    assert found.start == 10
    assert len(found) == pytest.approx(size // SIZE, rel=0.05)


def test_a_limit(table, chunks):
    assert len(make(limit=100_000, latency=1).around(table, chunks, one(10))) == 100_000 // SIZE
    assert make(limit=0, latency=1).around(table, chunks, one(10)) == one(10)
    # What somebody waits for is never cut.
    assert make(limit=1, latency=1).around(table, chunks, range(10, 90)) == range(10, 90)


def test_what_is_there_or_under_way_ends_it(table, chunks):
    make_ready(chunks, one(14))
    assert make(latency=1).around(table, chunks, one(10)) == range(10, 14)
    chunks.claim(one(12), NOBODY)
    assert make(latency=1).around(table, chunks, one(10)) == range(10, 12)
    # A reader who waits for others has its own at the front.
    assert make(latency=1).around(table, chunks, range(10, 15)) == range(10, 15)
    assert make(latency=1).around(table, chunks, one(COUNT - 1)) == one(COUNT - 1)


def test_gaps_in_the_blob_end_it(chunks):
    blob = Blob([SIZE] * 20, compressor=Compressor.NONE)
    known = [chunk for chunk in blob.chunks if chunk.chunk_index != 5]
    found = make(latency=1).around(BlobMap(blob.entry, known), chunks, one(2))
    assert found == range(2, 5)


def test_the_backend_is_measured(table, chunks):
    window = make(limit=4 << 20, latency=0.02)
    slow = len(window.around(table, chunks, one(0)))
    window.answered(0.001, 0)
    assert 128 < len(window.around(table, chunks, one(0))) < 140 < slow
    for _ in range(50):
        window.answered(0.02, 0)
    assert len(window.around(table, chunks, one(0))) == slow


def test_a_narrow_link_is_not_a_slow_backend(table, chunks):
    """What takes long because it is long does not get longer."""
    window = make(latency=0.005)
    before = len(window.around(table, chunks, one(0)))
    for _ in range(5):
        # 10 MB/s, and 5 ms until the answer begins.
        window.answered(0.005 + 0.0016, 16 << 10)
        window.answered(0.005 + 0.1, 1 << 20)
    # The time of the request itself: 16 ms.
    assert len(window.around(table, chunks, one(0))) < 230_000 // SIZE < before


def test_long_requests_alone_tell_nothing(table, chunks):
    window = make()
    for _ in range(50):
        window.answered(0.5, 1 << 20)
    assert len(window.around(table, chunks, one(0))) == (1 << 20) // SIZE - 1


def sweep(window, table, chunks, steps, step=1):
    return [window.ahead(table, chunks, one(number * step)) for number in range(steps)]


def test_a_sweep_is_fetched_ahead(table, chunks):
    window = make()
    *slow, first = sweep(window, table, chunks, 8)
    assert not any(slow)
    assert first.start == 8
    assert len(first) > 4
    # Not twice, and not before it comes near.
    assert not window.ahead(table, chunks, one(8))
    make_ready(chunks, range(first.stop))
    steps = (window.ahead(table, chunks, one(at)) for at in range(24, first.stop, 16))
    following = next(ahead for ahead in steps if ahead)
    assert following.start == first.stop
    assert len(following) >= len(first)


def test_sweeps_that_leave_files_out(table, chunks):
    assert any(sweep(make(), table, chunks, 9, step=3))


def test_who_jumps_is_not_followed(table, chunks):
    assert not any(sweep(make(), table, chunks, 40, step=40))
    window = make()
    sweep(window, table, chunks, 9)
    assert not window.ahead(table, chunks, one(500))


def test_who_reads_the_same_again_is_not_followed(table, chunks):
    window = make()
    assert not any(window.ahead(table, chunks, one(7)) for _ in range(50))


def test_without_a_limit_nothing_is_fetched_ahead(table, chunks):
    assert not any(sweep(make(limit=0), table, chunks, 40))
