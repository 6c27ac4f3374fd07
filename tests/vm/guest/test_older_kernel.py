"""Debian 12's kernel: complete files over loop devices, FUSE, and why there is no NBD."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cachefiles_node import CHUNK, Image, wait_until
from nbd_node import SYSFS, Node, attached, forget_pages, is_mounted, launched, same_tree

from builder.merge import MergeOptions, merge
from tests.treecompare import read_tree

pytestmark = pytest.mark.kernel("6.1")


class Layers:
    """Two layers and what was merged of them: an image with a device for each."""

    def __init__(self, top):
        layers = [Image(self._place(top, str(number)), number) for number in range(2)]
        self.tree = top / "source"
        for layer in layers:
            command = ["cp", "-a", "--no-target-directory", layer.tree, self.tree]
            subprocess.run(command, check=True)
        os.utime(self.tree, (0, 0))
        self.snapshot = read_tree(self.tree)
        self.blobs = layers[0].blobs | layers[1].blobs
        self.boot = top / "boot"
        named = [layer.boot.rename(top / f"{layer.blob_id}.boot") for layer in layers]
        merge(named, MergeOptions(bootstrap=self.boot))

    @staticmethod
    def _place(top, name):
        place = top / name
        place.mkdir()
        (place / "source" / name).mkdir(parents=True)
        (place / "source" / name / "own").write_bytes(name.encode() * CHUNK)
        return place


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    subprocess.run(["modprobe", "-a", "loop", "nbd"], check=True)
    with launched(tmp_path_factory, "fscache.fusedomain", "fscache.nbd.netlink") as launcher:
        yield launcher


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return Layers(tmp_path_factory.mktemp("image"))


@pytest.fixture
def node(tmp_path, launcher, image):
    with contextlib.ExitStack() as stack:
        yield Node(tmp_path, launcher, stack, image)


def loop_files():
    """Return the files that loop devices lie over."""
    return {Path(path.read_text().strip()) for path in SYSFS.glob("loop*/loop/backing_file")}


def test_complete_files_are_mounted_over_loop_devices(node, image):
    pid = node.mount("eager")
    assert "using loop devices" in node.said
    data = {node.work / f"{blob}.blob.data" for blob in image.blobs}
    assert loop_files() == {image.boot, *data}
    same_tree(image.snapshot, node.mountpoint)
    # Nobody is needed any more.
    node.kill(pid)
    forget_pages()
    same_tree(image.snapshot, node.mountpoint)
    subprocess.run(["umount", node.mountpoint], check=True)
    wait_until(lambda: not loop_files())


def test_what_cannot_be_had_leaves_no_mount(node):
    node.backend["config"]["retry_limit"] = 0
    node.write_config()
    node.server.fault = 404
    pid = node.begin(*node.words("eager"))
    assert node.wait(pid) == 1
    assert "404" in node.said
    assert not is_mounted(node.mountpoint)
    assert not loop_files()


def test_another_transport_finds_the_cache_warm(node, image):
    for first, second in (("eager", "fuse"), ("fuse", "eager")):
        shutil.rmtree(node.work, ignore_errors=True)
        pid = node.mount(first)
        same_tree(image.snapshot, node.mountpoint)
        node.stop(pid)
        requests = node.requests()
        for transport in (second, first):
            forget_pages()
            pid = node.mount(transport)
            same_tree(image.snapshot, node.mountpoint)
            node.stop(pid)
        assert node.requests() == requests > 0


def test_there_is_no_nbd(node):
    """Before Linux 6.4 EROFS finds no blobs in a flat address space."""
    pid = node.begin(*node.words("nbd"))
    assert node.wait(pid) == 1
    assert "no NBD:" in node.said
    assert "Linux 6.4 is needed" in node.said
    assert attached() == []
    assert not is_mounted(node.mountpoint)
