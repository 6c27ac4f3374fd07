"""The commands of /dev/cachefiles before anything is mounted (spec ondemand 7.2, rows 1 to 11)."""

import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest

DEVICE = "/dev/cachefiles"
PAGE = 4096


class Device:
    """The device, to which text is sent."""

    def __init__(self):
        self.fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)

    def send(self, command):
        assert os.write(self.fd, command) == len(command)

    def refuses(self, command, number):
        with pytest.raises(OSError, match=r".") as caught:
            os.write(self.fd, command)
        assert errno.errorcode[caught.value.errno] == errno.errorcode[number], command

    def close(self):
        os.close(self.fd)


@pytest.fixture
def device():
    with contextlib.closing(Device()) as device:
        yield device


@pytest.fixture
def cache(tmp_path):
    return os.fsencode(tmp_path)


@pytest.fixture
def bound(device, cache):
    device.send(b"dir " + cache)
    device.send(b"bind ondemand")
    return device


def test_row_1_only_one_may_open_it(device):
    with pytest.raises(OSError, match="busy") as caught:
        os.open(DEVICE, os.O_RDWR)
    assert caught.value.errno == errno.EBUSY


def test_row_2_bind_before_dir(device):
    device.refuses(b"bind ondemand", errno.EINVAL)


def test_row_3_dir(device, cache):
    device.refuses(b"dir ", errno.EINVAL)
    device.refuses(b"dir", errno.EINVAL)
    device.send(b"dir " + cache)
    device.refuses(b"dir " + cache, errno.EEXIST)


def test_row_4_tag(device):
    device.refuses(b"tag ", errno.EINVAL)
    device.send(b"tag name")
    device.refuses(b"tag other", errno.EEXIST)


def test_row_5_bind(device, cache):
    device.send(b"dir " + cache)
    device.refuses(b"bind foo", errno.EINVAL)
    device.send(b"bind ondemand")
    device.refuses(b"bind ondemand", errno.EBUSY)


def test_row_6_places_that_are_no_cache(device, mounted):
    tmpfs = mounted("-t", "tmpfs", "none")
    device.send(b"dir " + os.fsencode(tmpfs))
    device.refuses(b"bind ondemand", errno.EOPNOTSUPP)


def test_row_6_missing_directory(device, cache):
    device.send(b"dir " + cache + b"/missing")
    device.refuses(b"bind ondemand", errno.ENOENT)


def test_row_6_read_only_filesystem(device, tmp_path, mounted):
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    device.send(b"dir " + os.fsencode(mounted("-o", "ro,loop", disk)))
    device.refuses(b"bind ondemand", errno.EROFS)


def test_row_7_limits(device):
    # Defaults: run 7, cull 5, stop 1.
    for command in (b"brun 3%", b"bcull 7%", b"bcull 7", b"bcull x%", b"frun 3%", b"fstop 5%"):
        device.refuses(command, errno.EINVAL)
    for command in (b"brun 20%", b"bcull 15%", b"bstop 10%", b"frun 20%", b"fcull 15%"):
        device.send(command)


def test_row_8_what_is_no_command(device):
    device.refuses(b"unknown", errno.EOPNOTSUPP)
    device.refuses(b" tag name", errno.EOPNOTSUPP)
    device.refuses(b"\ntag name", errno.EINVAL)
    device.refuses(b"tag na\0me", errno.EINVAL)
    device.refuses(b"tag " + b"n" * (PAGE - 4), errno.EOPNOTSUPP)


def test_row_9_a_newline_ends_it(device):
    device.send(b"tag name\n")
    device.refuses(b"tag name", errno.EEXIST)


def test_row_10_before_bind(device):
    device.refuses(b"copen 0,0", errno.EOPNOTSUPP)
    device.refuses(b"restore", errno.EOPNOTSUPP)
    device.refuses(b"cull name", errno.EIO)
    device.refuses(b"inuse name", errno.EIO)


def test_row_11_nothing_pending(bound, cache):
    assert os.read(bound.fd, 1024) == b""
    assert sorted(os.listdir(cache)) == [b"cache", b"graveyard"]


def test_a_second_cache_in_the_same_place(bound, cache):
    """The device is exclusive, so the first has to be gone, and takes its claim with it."""
    bound.close()
    second = Device()
    second.send(b"dir " + cache)
    second.send(b"bind ondemand")
    bound.fd = second.fd


def test_erofs_mounts_by_fsid(tmp_path):
    """ENOBUFS: no cache is bound. Without the option it would be ENOENT, for the source `none`."""
    done = subprocess.run(
        ["mount", "-t", "erofs", "none", "-o", "ro,fsid=missing", tmp_path],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 32
    assert "No buffer space" in done.stderr


@pytest.mark.kernel("6.12", "6.12-generic", "6.1")
def test_row_40_stock_kernels_ignore_fsid(tmp_path):
    done = subprocess.run(
        ["mount", "-t", "erofs", "none", "-o", "ro,fsid=missing", tmp_path],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 32
    assert "special device none does not exist" in done.stderr


@pytest.mark.kernel("6.12", "6.12-generic", "6.1")
def test_stock_kernels_bind_no_cache_on_demand(cache):
    subprocess.run(["modprobe", "cachefiles"], check=True)
    assert Path(DEVICE).exists()
    with contextlib.closing(Device()) as device:
        device.send(b"dir " + cache)
        device.refuses(b"bind ondemand", errno.EINVAL)
