"""NBD under a kernel that has it: whole trees, faults, kills, successors (spec ondemand 5.15)."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import time

import pytest
from cachefiles_node import CHUNK, Image, wait_until
from nbd_node import (
    CONNECTIONS,
    SYSFS,
    Node,
    Readers,
    attached,
    digest,
    forget_pages,
    is_mounted,
    launched,
    read,
    same_tree,
)

from builder.backends import blob_directory
from builder.export import export_block

pytestmark = pytest.mark.kernel("6.12")

TRANSPORTS = ("nbd", "fuse", "eager")
KILLS = 25
# A second for each on an idle machine.
KILL_SECONDS = 900


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    subprocess.run(["modprobe", "nbd"], check=True)
    modules = ("nbd.domain", "nbd.daemon", "nbd.netlink", "fusedomain")
    with launched(tmp_path_factory, *(f"fscache.{name}" for name in modules)) as launcher:
        yield launcher


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return Image(tmp_path_factory.mktemp("image"), 1, extra=(60 * CHUNK,))


@pytest.fixture(scope="module")
def disk(image, tmp_path_factory):
    path = tmp_path_factory.mktemp("disk") / "disk"
    export_block(image.boot, path, blob_directory(image.boot.parent / "blobs"))
    return path


@pytest.fixture
def node(tmp_path, launcher, image):
    with contextlib.ExitStack() as stack:
        yield Node(tmp_path, launcher, stack, image)


def pieces(image, mountpoint, count=60, seed=1):
    """Return places in the largest file, and what is there."""
    content = (image.tree / "dir/f6").read_bytes()
    rng = random.Random(seed)
    offsets = [rng.randrange(len(content) - CHUNK) for _ in range(count)]
    return [(mountpoint / "dir/f6", at, content[at : at + 20_000]) for at in offsets]


# A mount


def test_tree_is_the_same_entry_by_entry(node, image):
    pid = node.mount()
    (name,) = attached()
    assert (SYSFS / name / "backend").read_text().startswith("nydusd-")
    assert (SYSFS / name / "ro").read_text() == "1\n"
    # A queue for each processor, as far as there are connections.
    assert len(list((SYSFS / name / "mq").iterdir())) == min(CONNECTIONS, os.cpu_count())
    assert node.requests() == 0
    same_tree(image.snapshot, node.mountpoint)
    requests = node.requests()
    forget_pages()
    same_tree(image.snapshot, node.mountpoint)
    assert node.requests() == requests
    node.stop(pid)
    assert not is_mounted(node.mountpoint)
    assert attached() == []


def test_the_best_way_is_found(node, image):
    """This kernel has no pre-content events, which `auto` would take."""
    pid = node.mount("auto")
    assert len(attached()) == 1
    assert "transport nbd for" in node.said
    same_tree(image.snapshot, node.mountpoint)
    node.stop(pid)


@pytest.mark.parametrize("first", TRANSPORTS)
def test_the_others_find_the_cache_warm(node, image, first):
    """One transport reads everything; the others then show the same and ask nobody."""
    requests = 0
    for transport in sorted(TRANSPORTS, key=lambda name: name != first):
        pid = node.mount(transport)
        same_tree(image.snapshot, node.mountpoint)
        # From here on nothing may be fetched any more.
        requests = requests or node.requests()
        assert node.requests() == requests > 0
        node.stop(pid)
        forget_pages()
    assert "using loop devices" not in node.said


def test_failures_are_io_errors_and_pass(node, image):
    node.backend["config"]["retry_limit"] = 1
    node.write_config()
    pid = node.mount()
    path, offset, expected = pieces(image, node.mountpoint)[0]
    node.server.fault = 404
    with pytest.raises(OSError, match=r".") as failure:
        read(path, offset, 4096)
    assert failure.value.errno == errno.EIO
    node.server.fault = None
    time.sleep(1.5)
    assert read(path, offset, len(expected)) == expected
    node.stop(pid)


def test_a_slow_backend_costs_connections_and_no_error(node, image):
    """The kernel gives up on a connection after some seconds, and gets another one."""
    pid = node.mount()
    path, offset, expected = pieces(image, node.mountpoint)[0]
    node.server.fault, node.server.fault_count = "stall", 1
    reader = Readers([(path, offset, expected)], count=1)
    wait_until(lambda: "a connection was replaced" in node.said)
    node.server.released.set()
    wait_until(lambda: reader.done)
    reader.stop()
    same_tree(image.snapshot, node.mountpoint)
    node.stop(pid)


def test_users_of_an_unmounted_image_are_served_on(node, image):
    pid = node.mount()
    path, offset, expected = pieces(image, node.mountpoint)[0]
    fd = os.open(path, os.O_RDONLY)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_mounted(node.mountpoint))
    assert os.pread(fd, len(expected), offset) == expected
    assert len(attached()) == 1
    os.close(fd)
    assert node.wait(pid) == 0
    assert attached() == []


def test_several_images_at_once(node, image, tmp_path):
    first = node.mount()
    node.mountpoint = tmp_path / "second"
    node.mountpoint.mkdir()
    second = node.mount()
    assert len(attached()) == 2
    same_tree(image.snapshot, tmp_path / "mnt")
    same_tree(image.snapshot, node.mountpoint)
    node.stop(second)
    node.mountpoint = tmp_path / "mnt"
    same_tree(image.snapshot, node.mountpoint)
    node.stop(first)
    assert attached() == []


# A device


def test_device_is_the_exported_disk(node, disk, mounted, image):
    pid = node.disk("/dev/nbd3")
    assert attached() == ["nbd3"]
    assert digest("/dev/nbd3") == digest(disk)
    same_tree(image.snapshot, mounted("-t", "erofs", "-o", "ro", "/dev/nbd3"))
    with open("/dev/nbd3", "r+b", buffering=0) as device, pytest.raises(PermissionError):
        device.write(bytes(4096))
    assert node.running == [pid]


def test_the_end_waits_for_users(node, image, tmp_path):
    pid = node.disk("/dev/nbd3", "--threads", 2)
    subprocess.run(["mount", "-t", "erofs", "-o", "ro", "/dev/nbd3", node.mountpoint], check=True)
    os.kill(pid, signal.SIGTERM)
    same_tree(image.snapshot, node.mountpoint)
    assert attached() == ["nbd3"]
    subprocess.run(["umount", node.mountpoint], check=True)
    assert node.wait(pid) == 0
    assert attached() == []


def test_who_detaches_the_device_ends_the_daemon(node):
    pid = node.disk("/dev/nbd3")
    subprocess.run(["nbd-client", "-d", "/dev/nbd3"], check=True)
    assert node.wait(pid) == 0
    assert "detached by somebody else" in node.said


def test_a_detached_device_that_is_still_open(node):
    node.disk("/dev/nbd3")
    with open("/dev/nbd3", "rb", buffering=0):
        subprocess.run(["nbd-client", "-d", "/dev/nbd3"], check=True)
        again = node.begin("nbd", "/dev/nbd3", "-C", node.entry())
        assert node.wait(again) == 1
        assert "was detached, and somebody still has it open" in node.said
    node.disk("/dev/nbd3")


def test_devices_that_are_taken(node, image, tmp_path, tmp_path_factory):
    node.disk("/dev/nbd3")
    again = node.begin("nbd", "/dev/nbd3", "-C", node.entry())
    assert node.wait(again) == 1
    assert "another process serves it" in node.said
    other = Image(tmp_path_factory.mktemp("other"), 2)
    node.server.blobs.update(other.blobs)
    third = node.begin("nbd", "/dev/nbd3", "-C", node.entry(other.boot))
    assert node.wait(third) == 1
    assert "device has something else on it" in node.said
    # A mount takes another one.
    pid = node.mount()
    assert len(attached()) == 2
    node.stop(pid)
    assert attached() == ["nbd3"]


# Killed daemons


def kills(node, image, pid, begin, mountpoint):
    """Kill a daemon in the middle of READs, and start its successor, again and again.

    The kernel sends a lost READ again after some seconds, so others read meanwhile.
    """
    names, jobs = attached(), pieces(image, mountpoint)
    lost = []
    for _ in range(KILLS):
        readers = Readers(jobs, count=2)
        wait_until(lambda readers=readers: readers.done)
        # From here on nothing is answered: whoever reads has a READ under way.
        os.kill(pid, signal.SIGSTOP)
        wait_until(readers.are_stuck)
        assert node.kill(pid) == -signal.SIGKILL
        readers.enough()
        lost.append(readers)
        pid = begin()
    for readers in lost:
        readers.stop()
    assert attached() == names
    forget_pages()
    same_tree(image.snapshot, mountpoint)
    assert node.said.count("took over /dev/nbd") == KILLS
    return pid


@pytest.mark.timeout(KILL_SECONDS)
def test_a_mount_survives_killed_daemons(node, image):
    def begin():
        return node.start(*node.words(), said="took over /dev/nbd")

    node.stop(kills(node, image, node.mount(), begin, node.mountpoint))
    assert attached() == []


@pytest.mark.timeout(KILL_SECONDS)
def test_a_device_survives_killed_daemons(node, image, mounted):
    pid = node.disk("/dev/nbd3")
    mountpoint = mounted("-t", "erofs", "-o", "ro", "/dev/nbd3")
    kills(node, image, pid, lambda: node.disk("/dev/nbd3"), mountpoint)


def test_readers_that_wait_for_a_backend_when_it_is_killed(node, image):
    pid = node.mount()
    jobs = pieces(image, node.mountpoint)
    node.server.fault = "stall"
    readers = Readers(jobs)
    wait_until(lambda: node.requests() > 2)
    assert node.kill(pid) == -signal.SIGKILL
    node.server.fault = None
    pid = node.start(*node.words(), said="took over")
    wait_until(lambda: readers.done > len(readers.threads))
    readers.stop()
    same_tree(image.snapshot, node.mountpoint)
    node.stop(pid)


def test_an_unmounted_image_survives_too(node, image):
    pid = node.mount()
    path, offset, expected = pieces(image, node.mountpoint)[0]
    fd = os.open(path, os.O_RDONLY)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_mounted(node.mountpoint))
    assert node.kill(pid) == -signal.SIGKILL
    # Whoever serves the mount point next serves those, too.
    pid = node.start(*node.words())
    assert os.pread(fd, len(expected), offset) == expected
    same_tree(image.snapshot, node.mountpoint)
    os.close(fd)
    node.stop(pid)
    assert attached() == []
