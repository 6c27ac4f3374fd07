"""Forked processes make the same image as threads do, and their end is told in one line."""

import io
import os
import random
import signal
import sys

import pytest

import builder.rangechunker
from builder import BuildError, BuildOptions, SourceType, build
from builder.chunker import Chunker
from builder.forked import ForkedWorkers, Part
from erofs.cipher import BlobCipher
from erofs.errors import CodecError
from erofs.rafs import Compressor
from tests.unit.builder.test_tarsparse import old_form
from tests.unit.builder.test_tarstream import END, header, padded

FORMS = {
    "none": {"compressor": Compressor.NONE},
    "lz4": {"compressor": Compressor.LZ4_BLOCK},
    "zstd": {"compressor": Compressor.ZSTD},
    "batches": {"compressor": Compressor.ZSTD, "batch_size": 0x4000, "chunk_size": 0x4000},
    "encrypted": {
        "compressor": Compressor.ZSTD,
        "encryption": BlobCipher(bytes(range(32)), bytes(16)),
    },
}


def archive():
    """Pack files that are empty, small, equal, larger than a chunk, sparse, and many."""
    rng = random.Random(1)
    contents = [b"", b"x", rng.randbytes(5000), b"a" * 9000, rng.randbytes(0x1000) * 3]
    contents += [rng.randbytes(rng.randrange(2000)) for _ in range(700)]
    contents += [*contents[2:40], rng.randbytes(2 << 20)]
    parts = [
        header(b"f%d" % number, size=len(data)) + padded(data)
        for number, data in enumerate(contents)
    ]
    parts.insert(3, old_form())
    return b"".join(parts) + END


@pytest.fixture
def tar(tmp_path):
    path = tmp_path / "layer.tar"
    path.write_bytes(archive())
    return path


@pytest.fixture
def forks(monkeypatch):
    """Fork although the test runner has threads, which the processes do not need."""
    # As an attribute of its package, the module is hidden by the function.
    monkeypatch.setattr(sys.modules["builder.build"], "can_fork", lambda: True)


def made(folder, source, **options):
    """Build, and return what is there then: bytes by name."""
    folder.mkdir()
    options = {"chunk_size": 0x1000, **options}
    result = build(
        source,
        BuildOptions(
            source_type=SourceType.TAR, bootstrap=folder / "boot", blob_dir=folder, **options
        ),
    )
    stats = result.stats.chunks, result.stats.duplicate_chunks, result.stats.content_bytes
    return stats, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", FORMS)
def test_same_bytes_as_threads_make(tmp_path, tar, forks, form):
    expected = made(tmp_path / "threads", io.BytesIO(tar.read_bytes()), **FORMS[form])
    assert len(expected[1]) == 2
    for workers in (1, 3):
        assert made(tmp_path / str(workers), tar, workers=workers, **FORMS[form]) == expected


def test_large_chunks(tmp_path, tar, forks):
    options = {"chunk_size": 1 << 20, "compressor": Compressor.LZ4_BLOCK}
    expected = made(tmp_path / "threads", io.BytesIO(tar.read_bytes()), **options)
    assert made(tmp_path / "forked", tar, **options) == expected


def test_the_parent_reads_no_content(tmp_path, tar, forks, monkeypatch):
    """Else nothing above would have told forked processes from threads."""
    monkeypatch.setattr(Chunker, "add_piece", lambda *_: pytest.fail("content was read"))
    plain = tmp_path / "plain.tar"
    plain.write_bytes(header(size=5) + padded(b"abcde") + END)
    assert made(tmp_path / "forked", plain)[0] == (1, 0, 5)


def test_killed_process(tmp_path, tar, forks, monkeypatch):
    monkeypatch.setattr(
        builder.rangechunker.RangeChunker,
        "_work_in_child",
        lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    )
    with pytest.raises(BuildError, match="process that digests and compresses has ended"):
        made(tmp_path / "out", tar)
    assert not list((tmp_path / "out").iterdir())


def test_errors_of_processes_are_those_of_the_parent(tmp_path, tar, forks, monkeypatch):
    work = Chunker._work

    def refuse(self, pieces):
        # A piece alone is what libraries are loaded by, before there are processes.
        if len(pieces) == 1:
            return work(self, pieces)
        raise CodecError("the Python package zstandard is not installed")

    monkeypatch.setattr(Chunker, "_work", refuse)
    with pytest.raises(CodecError, match="zstandard is not installed"):
        made(tmp_path / "out", tar)
    assert not list((tmp_path / "out").iterdir())


def test_archive_that_ends_inside_of_content(tmp_path, tar, forks):
    tar.write_bytes(header(size=5000) + bytes(1000))
    with pytest.raises(BuildError, match=r"entry file.*archive ends inside content") as caught:
        made(tmp_path / "out", tar)
    assert caught.value.where["offset"] == 1512


def test_file_that_shrinks_meanwhile(tmp_path, tar):
    class Shrunk(Exception):
        pass

    def tell(offset, length, parts):
        raise Shrunk(offset, length, parts)

    part = Part(0, 100, False)
    with (
        tar.open("rb") as source,
        ForkedWorkers(1, source.fileno(), lambda pieces: [], 1 << 20, 8, tell) as workers,
    ):
        os.truncate(tar, 50)
        with pytest.raises(Shrunk) as caught:
            workers.submit(0, 100, [part]).result()
    assert caught.value.args == (0, 100, [part])


def test_processes_end_with_the_block(tar):
    with tar.open("rb") as source:
        workers = ForkedWorkers(3, source.fileno(), lambda pieces: [], 1 << 20, 8, pytest.fail)
        pids = [process.pid for process in workers._processes]
        with workers:
            assert len(pids) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
