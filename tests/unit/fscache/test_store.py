import fcntl
import os
from pathlib import Path

import pytest

from fscache.store import ServeDirectory, StoreError, take_stale
from tests.leftovers import open_files


@pytest.fixture
def serve(tmp_path):
    serve = ServeDirectory.create(tmp_path)
    yield serve
    serve.remove()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "abc.blob.data"
    path.write_bytes(b"data")
    return path


def test_directory_is_private_and_named(serve, tmp_path):
    assert serve.directory.parent == tmp_path
    assert serve.directory.name.startswith("serve-")
    assert serve.directory.stat().st_mode & 0o7777 == 0o700
    assert not os.get_inheritable(serve.fd)


def test_link_is_the_same_file(serve, data):
    link = serve.link("abc", data)
    assert link == serve.path("abc") == serve.directory / "abc"
    assert link.samefile(data)
    assert serve.link("abc", data) == link
    serve.unlink("abc")
    serve.unlink("abc")
    assert not link.exists()
    assert data.read_bytes() == b"data"


@pytest.mark.parametrize("blob_id", ["", ".", "..", "a/b", "/etc", "../x", "a\0b"])
def test_ids_that_are_no_names_are_refused(serve, data, blob_id):
    with pytest.raises(StoreError, match="not a file name"):
        serve.link(blob_id, data)
    assert list(serve.directory.iterdir()) == []


def test_long_id_is_an_error_with_its_place(serve, data):
    with pytest.raises(StoreError, match="too long"):
        serve.link("a" * 300, data)


def test_other_file_under_the_same_id_is_refused(serve, data, tmp_path):
    serve.link("abc", data)
    other = tmp_path / "other"
    other.touch()
    with pytest.raises(StoreError, match="another file"):
        serve.link("abc", other)


@pytest.mark.parametrize("kind", ["symlink", "directory", "absent"])
def test_only_regular_files_are_linked(serve, data, tmp_path, kind):
    path = tmp_path / "odd"
    if kind == "symlink":
        path.symlink_to(data)
    elif kind == "directory":
        path.mkdir()
    with pytest.raises(StoreError):
        serve.link("abc", path)


def test_remove_deletes_links_only(tmp_path, data):
    serve = ServeDirectory.create(tmp_path)
    serve.link("abc", data)
    serve.remove()
    serve.remove()
    assert list(tmp_path.iterdir()) == [data]


def test_stale_directories_go_and_living_ones_stay(tmp_path, serve, data):
    serve.link("abc", data)
    dead = ServeDirectory.create(tmp_path)
    dead.link("abc", data)
    os.close(dead.fd)
    (tmp_path / "serve-file").touch()
    (tmp_path / "serve-link").symlink_to(tmp_path)
    (tmp_path / "other").mkdir()
    assert take_stale(tmp_path) == []
    assert not dead.directory.exists()
    assert serve.path("abc").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "abc.blob.data",
        "other",
        serve.directory.name,
        "serve-file",
        "serve-link",
    ]


def test_copy_of_the_descriptor_keeps_the_directory(tmp_path):
    serve = ServeDirectory.create(tmp_path)
    copy = os.dup(serve.fd)
    os.close(serve.fd)
    assert take_stale(tmp_path) == []
    assert serve.directory.exists()
    os.close(copy)
    assert take_stale(tmp_path) == []
    assert not serve.directory.exists()


def test_stale_directory_with_unexpected_content_is_left(tmp_path, caplog):
    path = tmp_path / "serve-odd"
    (path / "sub").mkdir(parents=True)
    assert take_stale(tmp_path) == []
    assert path.exists()
    assert "stays" in caplog.text


def test_create_avoids_a_directory_that_a_cleaner_holds(tmp_path, monkeypatch):
    real = fcntl.flock
    calls = []

    def busy_once(fd, how):
        calls.append(fd)
        if len(calls) == 1:
            raise BlockingIOError
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", busy_once)
    before = open_files()
    serve = ServeDirectory.create(tmp_path)
    assert len(calls) == 2
    ours = [file for file in open_files() - before if str(tmp_path) in file]
    assert len(ours) == 1
    serve.remove()


def test_create_below_nothing_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="No such file"):
        ServeDirectory.create(tmp_path / "absent")


def test_directory_whose_mounts_live_is_an_orphan(tmp_path, data, monkeypatch):
    """Daemon and holder were killed, and a container still has one of the images."""
    dead = ServeDirectory.create(tmp_path)
    dead.link("abc", data)
    dead.note_mount("erofs-1", Path("/mnt/gone"))
    dead.note_mount("erofs-2", Path("/mnt/in use"))
    with (dead.directory / ".mounts/list").open("a") as file:
        file.write('{"boot": "the last line of a kil')
    os.close(dead.fd)
    monkeypatch.setattr("fscache.store._is_alive", lambda name: name == "erofs-2")
    (orphan,) = take_stale(tmp_path)
    assert orphan.mounts == {"erofs-2": "/mnt/in use"}
    assert orphan.alive
    assert dead.path("abc").exists()
    # It is locked now: another daemon leaves it alone.
    assert take_stale(tmp_path) == []
    monkeypatch.setattr("fscache.store._is_alive", lambda name: False)
    os.close(orphan.store.fd)
    assert take_stale(tmp_path) == []
    assert sorted(tmp_path.iterdir()) == [data]


def test_mounts_of_an_earlier_boot_are_gone(tmp_path, monkeypatch):
    dead = ServeDirectory.create(tmp_path)
    monkeypatch.setattr("fscache.store._boot_id", lambda: "yesterday")
    dead.note_mount("erofs-1", Path("/mnt"))
    os.close(dead.fd)
    monkeypatch.setattr("fscache.store._boot_id", lambda: "today")
    monkeypatch.setattr("fscache.store._is_alive", lambda name: True)
    assert take_stale(tmp_path) == []
    assert not dead.directory.exists()


def test_deleted_data_file_gets_its_name_back(tmp_path, serve, data):
    inode = data.stat().st_ino
    serve.link("abc", data)
    data.unlink()
    serve.restore("abc", data)
    assert data.stat().st_ino == inode
    # A file of another image of this name is not touched.
    data.unlink()
    data.write_bytes(b"other")
    serve.restore("abc", data)
    assert data.read_bytes() == b"other"
    serve.restore("never linked", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
