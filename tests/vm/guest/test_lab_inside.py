"""What every guest has: its kernel, the host's root, places to write, modules, block devices."""

import ctypes
import errno
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
SCRATCH = Path("/scratch")
MS_RDONLY = 1
ALL = ("ondemand", "6.12", "6.12-generic", "6.1")
pytestmark = pytest.mark.kernel(*ALL)


def run(*words):
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True).stdout


def filesystem(path):
    return run("findmnt", "--noheadings", "--output", "FSTYPE", "--target", path).strip()


def test_the_kernel_is_the_one_that_was_asked_for(kernel):
    release = os.uname().release
    series = {"ondemand": "6.12."}.get(kernel, kernel.removesuffix("-generic") + ".")
    assert release.startswith(series)
    assert ("-cloud-" in release) == (kernel != "6.12-generic")


def test_the_root_of_the_host_cannot_be_written(kernel):
    host = Path("/host") / Path(__file__).relative_to("/")
    assert host.read_bytes() == Path(__file__).read_bytes()
    with pytest.raises(OSError, match="Read-only") as caught:
        host.write_bytes(b"")
    assert caught.value.errno == errno.EROFS
    assert filesystem("/host") == ("9p" if kernel == "6.12-generic" else "virtiofs")


def test_the_guest_writes_where_it_likes():
    for directory in ("/", "/etc", "/tmp", "/run", "/var/tmp", "/dev/shm", Path(__file__).parent):
        path = Path(directory, "written-in-the-guest")
        path.write_bytes(b"data")
        assert path.read_bytes() == b"data"
        path.unlink()


def test_scratch_is_a_real_filesystem(tmp_path):
    assert filesystem(SCRATCH) == filesystem(tmp_path) == "ext4"
    file = tmp_path / "file"
    fd = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, 1 << 20)
        os.pwrite(fd, b"data", 1 << 19)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 19
    finally:
        os.close(fd)
    os.setxattr(file, "user.a", b"b")
    assert os.getxattr(file, "user.a") == b"b"


def test_the_loopback_network_is_up_and_there_is_no_other():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            client.sendall(b"x")
        assert server.accept()[0].recv(1) == b"x"
    assert os.listdir("/sys/class/net") == ["lo"]


def test_it_is_our_virtual_environment():
    assert Path(sys.prefix) == Path(__file__).resolve().parents[3] / ".venv"


@pytest.mark.parametrize(
    "module", ["erofs", "cachefiles", "nbd", "dm_verity", "fuse", "loop", "overlay", "ext4"]
)
def test_modules_load(module):
    run("modprobe", module)
    builtin = Path(f"/lib/modules/{os.uname().release}/modules.builtin").read_text()
    names = {Path(line).stem.replace("-", "_") for line in builtin.splitlines()}
    assert module in names or Path("/sys/module", module).is_dir()


def test_devices_of_channels_open():
    run("modprobe", "nbd")  # the others are loaded by being opened
    for path in ("/dev/nbd0", "/dev/mapper/control", "/dev/fuse", "/dev/loop-control"):
        os.close(os.open(path, os.O_RDWR))


def check_tree(place):
    assert (place / "small").read_bytes() == b"small content\n"
    assert (place / "linked").stat().st_ino == (place / "small").stat().st_ino
    assert (place / "two chunks").read_bytes() == bytes(range(256)) * 16 + b"tail"
    assert os.readlink(place / "dir" / "nested") == ".."
    assert os.getxattr(place / "marked", "user.a") == b"1"


@pytest.fixture
def disk(tmp_path):
    """The golden image `plain` as one file."""
    blob = GOLDEN / "plain.blob"
    identity = run("sha256sum", blob).split()[0]
    (tmp_path / identity).symlink_to(blob)
    tool = Path(sys.prefix, "bin", "nydus-image")
    target = tmp_path / "disk"
    run(tool, "export", "--block", "-B", GOLDEN / "plain.boot", "-D", tmp_path, "-O", target)
    return target


def test_a_golden_image_mounts_over_a_loop_device(mounted):
    place = mounted("-t", "erofs", "-o", "ro,loop", GOLDEN / "nodata.boot")
    assert os.readlink(place / "link") == "/target"


@pytest.mark.kernel("ondemand")
def test_a_golden_disk_mounts_over_a_loop_device(disk, mounted):
    check_tree(mounted("-t", "erofs", "-o", "ro,loop", disk))


@pytest.mark.kernel("6.1")
def test_linux_6_1_takes_no_disk_with_blobs_behind_the_metadata(disk, tmp_path):
    """It looks for a device called as the blob; Linux 6.4 takes one address space for all."""
    done = subprocess.run(
        ["mount", "-t", "erofs", "-o", "ro,loop", disk, tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 32
    assert "No such file or directory" in done.stderr


@pytest.mark.kernel("ondemand", "6.12", "6.12-generic")
def test_a_golden_image_mounts_from_a_file(tmp_path):
    # On a real filesystem, and by the system call: mount(8) would make a loop device of it.
    image = shutil.copy(GOLDEN / "nodata.boot", tmp_path)
    place = tmp_path / "mounted"
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    words = (os.fsencode(image), os.fsencode(place), b"erofs", MS_RDONLY, None)
    run("modprobe", "erofs")
    assert libc.mount(*words) == 0, os.strerror(ctypes.get_errno())
    try:
        assert os.readlink(place / "link") == "/target"
        assert run("findmnt", "--noheadings", "--output", "SOURCE", place).strip() == image
    finally:
        run("umount", place)
