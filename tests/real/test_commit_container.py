"""`nydusify commit` of containers that containerd runs from Nydus images, and runs again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.capabilities import requires
from tests.real.rig import CHECKOUT
from tests.real.settings import REGISTRY
from tests.treecompare import compare_trees

pytestmark = [
    requires("root", "erofs_mount", "fanotify"),
    pytest.mark.timeout(900, func_only=True),
]

# Done in the container's root by programs of this machine: the image has only a few.
CHANGES = r"""
set -e
rm data/small3; rm data/small4; mkdir data/small4; echo in > data/small4/file
rm -r usr/share 2>/dev/null || :
echo committed > etc/hostname; chmod 600 data/small5; chown 5:6 data/small6
mkdir -p new/deep; echo one > new/one; ln new/one new/deep/two; ln -s one new/link
mkfifo new/pipe; mknod new/null c 1 3; setfattr -n user.color -v blue new/one
chmod 640 data/big; echo more >> data/small7
"""


@pytest.fixture
def rig(make_rig):
    return make_rig("dedicated", "none")


def _root(rig, container):
    """The root of a container as the box sees it, without what is mounted in it."""
    inside = f"{rig.root}/state/io.containerd.runtime.v2.task/{rig.root.name}/{container}/rootfs"
    return Path(inside)


def _change(rig, container, script):
    rig.box.run("sh", "-c", f"cd {_root(rig, container)}\n{script}")


def _start(rig, reference, container, *words):
    rig.ctr("run", "-d", "--null-io", *words, reference, container, "sleep", "1000")


def _commit(rig, container, target, *words):
    rig.box.run(
        "env", f"PYTHONPATH={CHECKOUT}", sys.executable, "-m", "builder.nydusify", "commit",
        "--container", container, "--containerd-address", f"{rig.root}/containerd.sock",
        "--namespace", rig.root.name, "--target", target, "--work-dir", f"{rig.root}/w", *words,
    )  # fmt: skip
    status = next(line for line in rig.ctr("task", "ls").splitlines() if container in line)
    assert status.split()[2] == "RUNNING"
    rig.pull(target)


def _differences(rig, one, other):
    first, second = (Path(f"{rig.box.top}{_root(rig, container)}") for container in (one, other))
    return compare_trees(first, second)


def test_container_is_committed_and_run_again(rig, image, layers):
    reference = rig.push(image)
    rig.pull(reference)
    _start(rig, reference, "first")
    _change(rig, "first", CHANGES)
    target = f"{REGISTRY}/committed:one"
    _commit(rig, "first", target)
    _start(rig, target, "second")
    assert _differences(rig, "first", "second") == []
    assert rig.ctr("task", "exec", "--exec-id", "e", "second", "cat", "/etc/hostname") == (
        "committed\n"
    )
    _change(rig, "second", "rm -r data/small4 new/one; echo again > etc/hostname; mkdir new/one")
    _commit(rig, "sec", f"{REGISTRY}/committed:two")
    _start(rig, f"{REGISTRY}/committed:two", "third")
    assert _differences(rig, "second", "third") == []
    for container in ("first", "second", "third"):
        rig.ctr("task", "rm", "--force", container)
        rig.ctr("container", "rm", container)


def test_mount_is_committed_with_its_container(rig, image):
    reference = rig.push(image)
    rig.pull(reference)
    volume = rig.root / "volume"
    volume.mkdir()
    (volume / "file").write_text("mounted\n")
    (volume / "left-out").write_text("no\n")
    mount = f"type=bind,src={volume},dst=/data,options=rbind:rw"
    _start(rig, reference, "first", "--mount", mount)
    _change(rig, "first", "echo hidden > data/below")
    target = f"{REGISTRY}/committed:mount"
    _commit(rig, "first", target, "--with-path", "/data", "--with-path", "!/data/left-out")
    assert rig.run(target, "ls /data; cat /data/file") == "file\nmounted\n"
    rig.ctr("task", "rm", "--force", "first")
    rig.ctr("container", "rm", "first")
