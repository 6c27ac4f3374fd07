"""From reads of blobs to files: order, counters, shared chunks, what is off."""

import random
import threading

import pytest
from fakes.built import built, member, tar_of

from erofs import FormatError, open_bootstrap
from fscache import trace as module
from fscache.settings import RafsConfig
from fscache.trace import Trace, open_trace

CHUNK = 0x1000
RANDOM = random.Random(9)
SHARED = RANDOM.randbytes(CHUNK)
FILES = {
    b"/big": SHARED + RANDOM.randbytes(3 * CHUNK + 5),
    b"/small": SHARED,
    b"/d/one": RANDOM.randbytes(100),
    b"/d/name\xff": RANDOM.randbytes(CHUNK),
    b"/empty": b"",
}


@pytest.fixture(scope="module")
def bootstrap(tmp_path_factory):
    names = {path: path[1:].decode("utf-8", "surrogateescape") for path in FILES}
    tar = tar_of(
        member("d", "dir"),
        *(member(names[path], data=data) for path, data in FILES.items()),
        member("d/again", "link", linkname="big"),
        member("soft", "symlink", linkname="big"),
    )
    return built(tmp_path_factory.mktemp("trace"), tar)


class Reader:
    """Reads files of the image, as the kernel would ask for them."""

    def __init__(self, bootstrap, **flags):
        self.image = bootstrap
        self.trace = Trace(bootstrap, **{"files": True, "pattern": True, "latest": True, **flags})
        self.now = 1000.0

    def nid(self, path):
        with open_bootstrap(self.image) as image:
            return image.lookup(path).nid

    def read(self, path, chunk=0, *, failed=False):
        with open_bootstrap(self.image) as image:
            info = list(image.file_chunks(image.lookup(path)))[chunk]
            blob_id = image.blobs[info.blob_index].id
        # Whole pages.
        self.trace.record(blob_id, info.uncompressed_offset, CHUNK, self.now, failed)
        self.now += 1.25


@pytest.fixture
def reader(bootstrap):
    return Reader(bootstrap)


def test_files_in_the_order_of_their_first_read(reader):
    reader.read(b"/d/one")
    reader.read(b"/big", 3)
    reader.read(b"/d/one")
    reader.read(b"/big", 4)
    assert reader.trace.pattern_as_list() == [
        {
            "ino": reader.nid(b"/d/one"),
            "nr_read": 2,
            "first_access_time_secs": 1000,
            "first_access_time_nanos": 0,
        },
        {
            "ino": reader.nid(b"/big"),
            "nr_read": 2,
            "first_access_time_secs": 1001,
            "first_access_time_nanos": 250_000_000,
        },
    ]
    # Answers come in any order; what counts is when a read began.
    reader.now = 7.0
    reader.read(b"/big", 2)
    assert [item["ino"] for item in reader.trace.pattern_as_list()] == [
        reader.nid(b"/big"),
        reader.nid(b"/d/one"),
    ]


def test_paths_and_bytes(reader):
    reader.read(b"/d/name\xff")
    reader.read(b"/big", 4)
    items = reader.trace.pattern_as_list(paths=True)
    assert [(item["path"], item["data_read"]) for item in items] == [
        ("/d/name\udcff", CHUNK),
        # One of two names of this inode, and not more than the file has.
        ("/big", 5),
    ]


def test_counters_by_file(reader):
    reader.read(b"/d/one")
    reader.read(b"/d/one", failed=True)
    reader.read(b"/d/name\xff")
    files = reader.trace.files_as_dict()
    assert list(files) == [str(reader.nid(path)) for path in (b"/d/one", b"/d/name\xff")]
    assert files[str(reader.nid(b"/d/one"))] == {
        "total_fops": 2,
        "data_read": 100,
        "block_count_read": [2, 0, 0, 0, 0, 0, 0, 0],
        "fop_hits": [0, 0, 0, 0, 1, *[0] * 10],
        "fop_errors": [0, 0, 0, 0, 1, *[0] * 10],
    }


def test_latest_is_told_once(reader):
    nids = {path: reader.nid(path) for path in (b"/small", b"/d/one", b"/d/name\xff")}
    for path in nids:
        reader.read(path)
    reader.read(b"/big", 1, failed=True)
    told = reader.trace.take_latest()
    expected = sorted(nids.values())
    assert [nid for item in told for nid in range(item[0], item[-1] + 1)] == expected
    assert all(len(item) in (1, 2) for item in told)
    assert reader.trace.take_latest() == []
    reader.read(b"/small")
    assert reader.trace.take_latest() == [[nids[b"/small"]]]


def test_ranges_of_neighbours(bootstrap):
    trace = Trace(bootstrap, files=False, pattern=False, latest=True)
    trace._latest = {5, 6, 7, 9, 11, 12}
    assert trace.take_latest() == [[5, 7], [9], [11, 12]]


def test_what_files_share_belongs_to_the_smallest(reader):
    reader.read(b"/big", 0)
    (item,) = reader.trace.pattern_as_list(paths=True)
    assert (item["path"], item["data_read"]) == ("/small", CHUNK)


def test_a_read_over_several_files_counts_for_each(reader, bootstrap):
    with open_bootstrap(bootstrap) as image:
        size = image.blobs[0].uncompressed_size
        blob_id = image.blobs[0].id
    reader.trace.record(blob_id, 0, size, 1.0, False)
    counted = {item["path"]: item["data_read"] for item in reader.trace.pattern_as_list(paths=True)}
    assert counted == {
        "/big": len(FILES[b"/big"]) - CHUNK,
        "/small": CHUNK,
        "/d/one": 100,
        "/d/name\udcff": CHUNK,
    }


def test_reads_of_other_blobs_and_of_gaps_are_nobodys(reader, bootstrap):
    reader.trace.record("f" * 64, 0, CHUNK, 1.0, False)
    reader.trace.record(open_bootstrap(bootstrap).blobs[0].id, 1 << 40, CHUNK, 1.0, False)
    assert reader.trace.pattern_as_list() == []


@pytest.mark.parametrize("flag", ["files", "pattern", "latest"])
def test_what_is_off_is_empty(bootstrap, flag):
    flags = dict.fromkeys(("files", "pattern", "latest"), False) | {flag: True}
    reader = Reader(bootstrap, **flags)
    reader.read(b"/d/one")
    answers = {
        "files": reader.trace.files_as_dict(),
        "pattern": reader.trace.pattern_as_list(paths=True),
        "latest": reader.trace.take_latest(),
    }
    assert [name for name, value in answers.items() if value] == [flag]


def test_flags_of_the_configuration(bootstrap):
    assert open_trace(bootstrap, RafsConfig()) is None
    trace = open_trace(bootstrap, RafsConfig(access_pattern=True))
    assert (trace.files, trace.pattern, trace.latest) == (False, True, False)


def test_nothing_is_opened_before_somebody_asks(tmp_path, reader):
    trace = Trace(tmp_path / "absent", files=True, pattern=True, latest=True)
    assert trace.pattern_as_list() == []
    trace.record("f" * 64, 0, 1, 1.0, False)
    with pytest.raises(FileNotFoundError):
        trace.pattern_as_list()


def test_many_reads_stay_bounded(bootstrap, monkeypatch):
    monkeypatch.setattr(module, "PENDING_MAX", 50)
    reader = Reader(bootstrap)
    with open_bootstrap(bootstrap) as image:
        blob_id = image.blobs[0].id

    def read():
        for _ in range(500):
            reader.trace.record(blob_id, 0, CHUNK, 1.0, False)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in [*threads, *(t for t in threading.enumerate() if t.name == "trace")]:
        thread.join(60)
    assert len(reader.trace._pending) < 2000
    (item,) = reader.trace.pattern_as_list()
    assert item["nr_read"] == 2000


def test_a_broken_bootstrap_costs_no_memory(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "PENDING_MAX", 5)
    (tmp_path / "broken").write_bytes(b"broken")
    trace = Trace(tmp_path / "broken", files=True, pattern=True, latest=True)
    for _ in range(5):
        trace.record("f" * 64, 0, 1, 1.0, False)
    for thread in threading.enumerate():
        if thread.name == "trace":
            thread.join(60)
    assert not trace._pending
    assert "not counted by file" in caplog.text
    trace.record("f" * 64, 0, 1, 1.0, False)
    with pytest.raises(FormatError):
        trace.files_as_dict()
