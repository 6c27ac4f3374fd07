"""FUSE operations without a kernel: what libfuse's binding asks, and the errno of each answer."""

import ctypes.util
import errno
import logging
import os
import sys
import types

import pytest
from fakes.built import built, member, tar_of
from fakes.image_files import OpenImage

from fscache.channel import fuse
from fscache.channel.fuseops import Operations
from fscache.sharing import LazyUnsupported

needs_libfuse = pytest.mark.skipif(
    ctypes.util.find_library("fuse3") is None, reason="libfuse 3 is not installed"
)
CONTENT = b"0123456789" * 1000
ODD = "name\udcff"


@pytest.fixture
def image(tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    tar = tar_of(
        member("d", "dir"),
        member("d/file", data=CONTENT),
        member(f"d/{ODD}", data=b"odd"),
        member("soft", "symlink", linkname=f"d/{ODD}"),
        member("noted", data=b"x", xattrs={"user.note": "text", "trusted.t": "secret"}),
    )
    bootstrap = built(blobs, tar)
    image = OpenImage(bootstrap, blobs, tmp_path / "cache")
    yield image
    image.close()


class Kernel:
    """Asks as the binding does."""

    def __init__(self, image):
        self.user = 0
        self.is_ready = False
        self.operations = Operations(
            image.files, has_acls=True, caller=lambda: (self.user, 0, 1), ready=self._ready
        )

    def _ready(self):
        self.is_ready = True

    def list(self, path, offset=0, room=100):
        taken = []

        def take(name, attributes, following):
            if len(taken) == room:
                return False
            taken.append((name, attributes["st_ino"], following))
            return True

        self.operations.readdir(self.operations.opendir(path), offset, take)
        return taken


@pytest.fixture
def kernel(image):
    return Kernel(image)


def fails(code, operation, *arguments):
    with pytest.raises(OSError) as caught:
        operation(*arguments)
    assert caught.value.errno == code


def test_paths_and_handles(kernel):
    operations = kernel.operations
    handle = operations.open("/d/file", os.O_RDONLY)
    assert operations.getattr("/d/file") == operations.getattr(None, handle)
    assert operations.getattr("/d/file")["st_ino"] == handle
    assert operations.read(None, 4096, 100, handle) == CONTENT[100:4196]
    assert operations.read("/d/file", 1 << 20, 0, handle) == CONTENT
    assert operations.read(None, 10, len(CONTENT), handle) == b""
    odd = operations.open(f"/d/{ODD}", os.O_RDONLY)
    assert operations.read(None, 10, 0, odd) == b"odd"
    assert operations.readlink("/soft") == f"d/{ODD}"
    assert operations.statfs("/")["f_bsize"] == 4096
    fails(errno.ENOENT, operations.getattr, "/nothing")
    fails(errno.ENOTDIR, operations.getattr, "/d/file/x")
    fails(errno.EINVAL, operations.getattr, None)
    fails(errno.EINVAL, operations.readlink, "/d/file")
    fails(errno.ENOENT, operations.open, "/nothing", os.O_RDONLY)


def test_directories_go_on_where_there_was_no_more_room(kernel):
    whole = kernel.list("/d")
    assert [name for name, _, _ in whole] == [b".", b"..", b"file", b"name\xff"]
    assert [following for _, _, following in whole] == [1, 2, 3, 4]
    pieces, offset = [], 0
    while piece := kernel.list("/d", offset, room=1):
        pieces += piece
        offset = piece[-1][2]
    assert pieces == whole
    assert kernel.list("/d", 4) == kernel.list("/d", 1000) == []
    fails(errno.ENOTDIR, kernel.list, "/d/file")


def test_xattrs(kernel):
    operations = kernel.operations
    assert set(operations.listxattr("/noted")) == {"user.note", "trusted.t"}
    assert operations.getxattr("/noted", "user.note") == b"text"
    assert operations.listxattr("/d/file") == []
    fails(errno.ENODATA, operations.getxattr, "/noted", "user.other")
    fails(errno.ENODATA, operations.getxattr, "/noted", "user.\udcff")
    kernel.user = 1000
    assert operations.listxattr("/noted") == ["user.note"]


def test_failures_are_io_errors(kernel, image, tmp_path, caplog):
    handle = kernel.operations.open("/d/file", os.O_RDONLY)
    blobs = {path: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}
    for path in blobs:
        path.unlink()
    for _ in range(5):
        fails(errno.EIO, kernel.operations.read, None, 100, 0, handle)
    told = [record for record in caplog.records if "reads fail" in record.getMessage()]
    # By the demand and by the channel, once each.
    assert 1 <= len(told) <= 2
    for path, content in blobs.items():
        path.write_bytes(content)
    assert kernel.operations.read(None, 100, 0, handle) == CONTENT[:100]


def test_a_mistake_of_ours_is_an_answer_too(kernel, image, monkeypatch, caplog):
    def broken(path):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(image.files, "find", broken)
    with caplog.at_level(logging.ERROR):
        fails(errno.EIO, kernel.operations.getattr, "/d")
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("capable", [0, -1])
def test_agreement(kernel, capable):
    connection = types.SimpleNamespace(capable=capable & 0xFFFFFFFF, want=5, max_background=0)
    config = types.SimpleNamespace()
    kernel.operations.init_with_config(connection, config)
    assert kernel.is_ready
    assert connection.want & 5 == 5
    wanted = (1 << 19) | (1 << 23)
    assert connection.want & wanted == (wanted if capable else 0)
    assert connection.max_background > 12
    assert config.use_ino == config.kernel_cache == config.nullpath_ok == 1
    for name in ("entry", "attr", "negative"):
        assert getattr(config, f"{name}_timeout") >= 86400


class TestWhatFuseTakes:
    """Each reason is told, with what helps."""

    @pytest.fixture(autouse=True)
    def device(self, monkeypatch):
        monkeypatch.setattr(fuse, "_DEVICE", "/dev/null")
        monkeypatch.setattr(fuse, "is_root", lambda: True)

    def refused(self, text):
        with pytest.raises(LazyUnsupported, match=text):
            fuse.require_fuse()

    def test_library(self, monkeypatch):
        monkeypatch.setattr(fuse, "_LIBRARIES", ("libnothing.so.3",))
        self.refused("no FUSE: libfuse 3 is not installed .Debian: apt install fuse3")

    def test_binding(self, monkeypatch):
        monkeypatch.setattr(fuse, "_LIBRARIES", ("libc.so.6",))
        monkeypatch.setenv("FUSE_LIBRARY_PATH", "/nothing")
        monkeypatch.setitem(sys.modules, "mfusepy", None)
        self.refused("mfusepy cannot be loaded")

    @needs_libfuse
    def test_device(self, monkeypatch, tmp_path):
        fuse.require_fuse()
        monkeypatch.setattr(fuse, "_DEVICE", str(tmp_path / "fuse"))
        self.refused("No such file or directory: .*fuse .modprobe fuse")

    @needs_libfuse
    def test_helper_of_users(self, monkeypatch):
        monkeypatch.setattr(fuse, "is_root", lambda: False)
        monkeypatch.setenv("PATH", "/nothing")
        self.refused("fusermount3 is not installed")
