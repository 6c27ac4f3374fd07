"""The mount point of a node daemon: what was there before, and what a dead daemon left."""

import os
import subprocess

import pytest

from builder import BuildOptions, build
from fscache.backend import LocalFsConfig
from fscache.config import DaemonConfig
from fscache.mounts.mount import mount_erofs
from fscache.mounts.nest import Nest
from fscache.mounts.place import PlainMount, is_our_overlay, mount_tmpfs, mounted_at
from fscache.mounts.skeleton import image_directories
from fscache.node import NodeDaemon, NodeOptions
from tests.capabilities import requires

pytestmark = requires("root", "fanotify")


@pytest.fixture
def top(tmp_path):
    directory = tmp_path / "top mount"
    directory.mkdir()
    yield directory
    while mounted_at(directory):
        PlainMount(directory).unmount()


@pytest.fixture
def image(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"content")
    build(source, BuildOptions(bootstrap=tmp_path / "boot", blob_dir=tmp_path))
    return tmp_path / "boot"


def run(options, check):
    daemon = NodeDaemon(options)
    daemon.start()
    try:
        check()
    finally:
        daemon.stop()


def with_image(tmp_path, image, top):
    config = DaemonConfig(LocalFsConfig(dir=tmp_path), tmp_path / "cache")
    return NodeOptions(top, bootstrap=image, config=config)


def test_what_others_mounted_stays(tmp_path, image, top):
    subprocess.run(["mount", "-t", "tmpfs", "mine", top], check=True)
    (top / "precious").write_text("mine")
    for options in (NodeOptions(top), with_image(tmp_path, image, top)):
        run(options, lambda: (top / "precious").exists() and pytest.fail("not covered"))
        assert (top / "precious").read_text() == "mine"
        assert mounted_at(top).source == "mine"


def test_what_a_dead_daemon_left_is_taken_away(tmp_path, image, top, caplog):
    mount_tmpfs(top)
    run(NodeOptions(top), lambda: None)
    assert "daemon that is gone" in caplog.text
    assert mounted_at(top) is None
    caplog.clear()
    data = tmp_path / "data"
    data.write_bytes(bytes(4096))
    mount_erofs(image, [data], top)
    assert mounted_at(top) == ("erofs", os.path.realpath(image))
    run(with_image(tmp_path, image, top), lambda: None)
    assert "daemon that is gone" in caplog.text
    assert mounted_at(top) is None


def test_cover_of_a_dead_daemon_is_taken_away(tmp_path, image, top, caplog):
    data = tmp_path / "data"
    data.write_bytes(bytes(4096))
    erofs = mount_erofs(image, [data], top)
    nest = Nest(top, lambda: None)
    nest.use(image_directories(image))
    with nest.place("/below", None) as directory:
        mount_tmpfs(directory)
    assert is_our_overlay(top)
    run(with_image(tmp_path, image, top), lambda: None)
    assert "daemon that is gone" in caplog.text
    assert mounted_at(top) is None
    os.close(nest._cover._lower)
    os.close(nest._cover._overlay)
    assert erofs.is_gone()


def test_another_image_below_stays(tmp_path, image, top):
    other, data = tmp_path / "other", tmp_path / "data"
    other.write_bytes(image.read_bytes())
    data.write_bytes(bytes(4096))
    mount_erofs(other, [data], top)
    run(with_image(tmp_path, image, top), lambda: None)
    assert mounted_at(top) == ("erofs", os.path.realpath(other))
