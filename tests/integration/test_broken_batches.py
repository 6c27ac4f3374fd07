"""Batches of the real nydus-image: what is fetched of them, and what broken data does.

Broken data is an error of those who read it, nothing of it is written, and the next read heals.
"""

import re
import struct

import pytest
from capabilities import requires
from fakes.blob_server import BlobServer
from fixtures_path import needs_fixtures
from made_images import Truth, check, file_in_batch, make_store, named_blob, place, wrong
from serving import http, wait_until

from erofs import open_bootstrap
from erofs.errors import NydusError
from erofs.framing import SECTION_BOOTSTRAP, read_toc
from erofs.view import View
from fscache.cache.tablefile import META_SUFFIX

pytestmark = [
    needs_fixtures,
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("blobs"))


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return Truth(tmp_path_factory.mktemp("truth"))


@pytest.fixture
def server(stack, tmp_path, store):
    def serve(image):
        server = BlobServer(image.blobs())
        stack.callback(server.stop)
        return server

    return serve


def test_a_batch_is_fetched_once(serving, store, server, tmp_path):
    image = place(tmp_path, store, "batch-64k-zstd/boot")
    served = server(image)
    mountpoint = serving.start(image, http(served), amplify=0).mountpoint
    entry, name = file_in_batch(image)
    serving.snapshot(mountpoint, content=False)
    assert served.ranges == []
    serving.read(f"{mountpoint}{name}")
    table = (entry.ci_offset, entry.ci_offset + entry.ci_compressed_size + 4096)
    batch = (0, 17586)
    assert [asked for _, asked in served.ranges] == [
        f"bytes={start}-{end - 1}" for start, end in (table, batch)
    ]
    with open_bootstrap(image.bootstrap) as bootstrap:
        for path, inode in bootstrap.walk():
            chunks = list(bootstrap.file_chunks(inode)) if inode.is_regular else []
            if chunks and chunks[0].chunk_index < 20:
                serving.read(f"{mountpoint}{path.decode()}")
    assert len(served.ranges) == 2
    # The rest, in order: no byte of it twice.
    serving.snapshot(mountpoint)
    assert sum(map(_length, served.ranges)) == table[1] - table[0] + entry.ci_offset


def _length(asked):
    start, end = re.fullmatch(r"bytes=(\d+)-(\d+)", asked[1]).groups()
    return int(end) - int(start) + 1


def flip(path, offset, length=1):
    with path.open("r+b") as file:
        file.seek(offset)
        data = file.read(length)
        file.seek(offset)
        file.write(bytes(byte ^ 0x55 for byte in data))


def data_file(tmp_path, entry):
    return tmp_path / "cache" / f"{entry.id}.blob.data"


@pytest.mark.parametrize("what", ["header magic", "header count", "table", "batch", "context"])
def test_broken_batches_are_errors_and_heal(serving, store, tmp_path, truth, caplog, what):
    image = place(tmp_path, store, "batch-64k-none/boot")
    entry, name = file_in_batch(image)
    path = image.blob_dir / entry.id
    whole = path.read_bytes()
    path.unlink()
    header = entry.ci_offset + entry.ci_compressed_size
    places = {
        "header magic": (header, 1),
        "header count": (header + 12, 1),
        "table": (entry.ci_offset + 20, 30),
        "batch": (5, 1),
        "context": (header + 40, 8),
    }
    path.write_bytes(whole)
    flip(path, *places[what])
    mountpoint = serving.start(image).mountpoint
    serving.read_fails(f"{mountpoint}{name}")
    written = data_file(tmp_path, entry)
    if what == "batch":
        # The others of the batch are whole: only the one with the bad byte is left out.
        assert written.read_bytes()[:4096] == bytes(4096)
    else:
        assert written.stat().st_blocks == 0
        assert not list((tmp_path / "cache").glob(f"*{META_SUFFIX}"))
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert errors
    assert all(entry.id in record.getMessage() for record in errors)
    path.write_bytes(whole)
    _wait_for_whole(serving, mountpoint, name)
    assert wrong(truth("batch"), serving.snapshot(mountpoint)) == []


def _wait_for_whole(serving, mountpoint, name):
    """Failures are remembered for a second."""

    def readable():
        try:
            serving.read(f"{mountpoint}{name}")
        except OSError:
            return False
        return True

    wait_until(readable)


@pytest.mark.parametrize("damage", ["nothing", "garbage", "other header", "contexts", "link"])
def test_broken_table_in_the_cache_is_replaced(serving, store, truth, tmp_path, damage):
    image = place(tmp_path, store, "batch-64k-zstd/boot")
    entry, _ = file_in_batch(image)
    check(serving, image, truth("batch")).stop()
    meta = tmp_path / "cache" / f"{entry.id}{META_SUFFIX}"
    whole = meta.read_bytes()
    for path in (tmp_path / "cache").glob("*.blob.data*"):
        path.unlink()
    if damage == "nothing":
        meta.unlink()
    elif damage == "garbage":
        meta.write_bytes(b"garbage" * 1000)
    elif damage == "other header":
        flip(meta, len(whole) - 4096 + 12)
    elif damage == "contexts":
        # Sound by itself: only the chunks show that it is wrong.
        with meta.open("r+b") as file:
            file.seek(24 * entry.chunk_count)
            (size,) = struct.unpack("<I", file.read(4))
            file.seek(24 * entry.chunk_count)
            file.write(struct.pack("<I", size - 1))
    else:
        meta.unlink()
        meta.symlink_to("/etc/passwd")
    daemon = serving.start(image)
    if damage == "contexts":
        with pytest.raises((AssertionError, OSError)):
            serving.snapshot(daemon.mountpoint)
        wait_until(lambda: _tree_is(serving, daemon.mountpoint, truth("batch")))
    else:
        assert wrong(truth("batch"), serving.snapshot(daemon.mountpoint)) == []
    assert meta.read_bytes() == whole
    assert not meta.is_symlink()


def _tree_is(serving, mountpoint, expected):
    try:
        return wrong(expected, serving.snapshot(mountpoint)) == []
    except AssertionError:
        return False


def test_broken_toc_of_a_batch_blob(serving, store, truth, tmp_path):
    image = place(tmp_path, store, "batch-l1-toc/boot")
    entry, name = file_in_batch(image)
    path = image.blob_dir / entry.id
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole)
    flip(path, len(whole) - 600)
    mountpoint = serving.start(image).mountpoint
    serving.read_fails(f"{mountpoint}{name}")
    assert data_file(tmp_path, entry).stat().st_blocks == 0
    path.write_bytes(whole)
    _wait_for_whole(serving, mountpoint, name)
    assert wrong(truth("l1"), serving.snapshot(mountpoint)) == []


@pytest.mark.parametrize("what", ["bootstrap", "toc"])
def test_broken_bootstraps_inside_of_a_blob(serving, store, tmp_path, what):
    image = named_blob(tmp_path, store, "tar-inline-toc/blob.nydus")
    entry = read_toc(View(image.bootstrap.read_bytes())).find(SECTION_BOOTSTRAP)
    size = image.bootstrap.stat().st_size
    flip(image.bootstrap, entry.offset + 100 if what == "bootstrap" else size - 600, 8)
    with pytest.raises(NydusError, match=r"digest|broken|wrong|ToC|section"):
        serving.start(image)
    assert not list((tmp_path / "cache").glob("*.image.boot"))
