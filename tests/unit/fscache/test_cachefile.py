import errno
import os

import pytest

from fscache.backend import BackendError
from fscache.cache.cachefile import CacheError, CacheFile

SIZE = 1 << 20


@pytest.fixture
def cache(tmp_path):
    cache = CacheFile.open(tmp_path, "id", SIZE)
    yield cache
    cache.close()


def test_new_file_is_sparse_private_and_alone(cache, tmp_path):
    status = cache.path.stat()
    assert (status.st_size, status.st_blocks, status.st_mode & 0o777) == (SIZE, 0, 0o600)
    assert os.listdir(tmp_path) == ["id.blob.data"]
    assert cache.data_ranges() == []


def test_whole_pages_with_zeros(cache):
    with cache.path.open("r+b") as file:
        file.write(b"\xff" * 16384)
    cache.write(4096, b"x" * 5000)
    data = cache.path.read_bytes()
    assert data[:16384] == b"\xff" * 4096 + b"x" * 5000 + bytes(3192) + b"\xff" * 4096
    assert cache.data_ranges() == [(0, 16384)]


def test_short_writes_go_on(cache, monkeypatch):
    real = os.pwritev

    def short(fd, buffers, offset):
        return real(fd, [b"".join(buffers)[:1000]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    cache.write(0, bytes(range(250)) * 20)
    assert cache.path.read_bytes()[:8192] == bytes(range(250)) * 20 + bytes(3192)


@pytest.mark.parametrize(("offset", "length"), [(1, 1), (-4096, 1), (SIZE, 1), (SIZE - 4096, 4097)])
def test_writes_outside_are_refused(cache, offset, length):
    with pytest.raises(CacheError):
        cache.write(offset, bytes(length))
    assert cache.path.stat().st_size == SIZE


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_errors_carry_the_reason(cache, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwritev", fail)
    monkeypatch.setattr(os, "fdatasync", fail)
    for act in (lambda: cache.write(0, b"x"), cache.sync):
        with pytest.raises(CacheError) as caught:
            act()
        assert caught.value.errno == code


def test_reopening_keeps_the_data(tmp_path, cache):
    cache.write(0, b"kept")
    again = CacheFile.open(tmp_path, "id", SIZE)
    assert again.inode == cache.inode
    again.close()


@pytest.mark.parametrize("size", [0, 4096, SIZE + 4096])
def test_a_wrong_size_throws_data_and_map_away(tmp_path, size, caplog):
    (tmp_path / "id.blob.data").write_bytes(b"x" * size)
    (tmp_path / "id.blob.data.chunk_map").write_bytes(b"map")
    cache = CacheFile.open(tmp_path, "id", SIZE)
    assert cache.path.read_bytes() == bytes(SIZE)
    assert not cache.map_path.exists()
    assert "discarded" in caplog.text
    cache.close()


def test_a_new_data_file_never_meets_an_old_map(tmp_path):
    (tmp_path / "id.blob.data.chunk_map").write_bytes(b"map")
    cache = CacheFile.open(tmp_path, "id", SIZE)
    assert not cache.map_path.exists()
    cache.close()


def test_truncated_deleted_replaced(cache, tmp_path):
    cache.check_place()
    os.truncate(cache.path, 4096)
    with pytest.raises(CacheError, match="changed its size"):
        cache.write(0, b"x")
    os.truncate(cache.path, SIZE)
    cache.check()
    os.link(cache.path, tmp_path / "served")
    cache.path.unlink()
    cache.check()
    with pytest.raises(CacheError, match="gone"):
        cache.check_place()
    cache.path.write_bytes(b"")
    with pytest.raises(CacheError, match="replaced"):
        cache.check_place()
    (tmp_path / "served").unlink()
    with pytest.raises(CacheError, match="deleted"):
        cache.check()


def test_links_and_hostile_ids_are_refused(tmp_path):
    (tmp_path / "target").write_bytes(bytes(SIZE))
    (tmp_path / "id.blob.data").symlink_to("target")
    with pytest.raises(CacheError):
        CacheFile.open(tmp_path, "id", SIZE)
    with pytest.raises(BackendError):
        CacheFile.open(tmp_path, "../id", SIZE)


def test_closed(cache):
    cache.close()
    cache.close()
    with pytest.raises(CacheError):
        cache.check()
