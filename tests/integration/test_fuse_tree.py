"""What FUSE mounts show: the same as others, to the byte.

What is expected comes from others: sources, GNU tar, the kernel's own EROFS.
"""

import errno
import gzip
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from awkward import make_directory, make_layers
from capabilities import need_tool, requires
from fixtures_path import FIXTURES, needs_fixtures
from fuserig import ALL, assert_same, start
from judges import expected_layers, expected_tar
from serving import Built, build_image, build_layers
from treecompare import read_tree

from fscache.daemon import Transport

pytestmark = [pytest.mark.root, requires("root", "fuse")]

_STATUS = """
import os, sys, json
top = os.fsencode(sys.argv[1])
for directory, names, files in os.walk(top):
    for name in [b"."] + names + files:
        status = os.lstat(directory + b"/" + name)
        fields = [getattr(status, "st_" + field) for field in
            "mode ino nlink uid gid rdev size blksize blocks mtime_ns atime_ns ctime_ns".split()]
        print(os.fsdecode(directory[len(top):] + b"/" + name).encode(errors="surrogateescape"),
              *fields)
"""


def shown(serving, image):
    """Serve an image and return the whole tree as its mount shows it."""
    return serving.snapshot(start(serving, image).mountpoint)


def test_directory_with_what_only_directories_have(serving):
    need_tool("setfacl")
    top = serving.directory / "source"
    make_directory(top)
    expected = read_tree(top)
    expected[b"/"] = expected[b"/"]._replace(mtime_ns=0)
    assert_same(expected, shown(serving, build_image(top, serving.directory / "image")))


@needs_fixtures
def test_all_entry_types_of_the_fixture(serving):
    tar = FIXTURES / "nydus/tar/all-entry-type.tar"
    expected = expected_tar(tar, serving.directory / "expected")
    got = shown(serving, build_image(tar, serving.directory / "image"))
    assert_same(expected, got)
    assert len(got[b"/tar/dir2/hardlink3.txt"].links) == 4


def test_merged_layers(serving, tmp_path):
    for tool in ("setfacl", "setcap", "setfattr", "tar"):
        need_tool(tool)
    layers = make_layers(tmp_path)
    expected = expected_layers(layers, tmp_path)
    image = build_layers(layers, serving.directory / "image", chunk_size=0x1000)
    assert_same(expected, shown(serving, image))


def test_installed_software(serving):
    top = serving.directory / "source"
    top.mkdir()
    for part in ("usr/share/zoneinfo", "usr/lib/python3"):
        if (Path("/") / part).is_dir():
            (top / part).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", Path("/") / part, top / part], check=True)
    expected = read_tree(top)
    expected[b"/"] = expected[b"/"]._replace(mtime_ns=0)
    assert_same(expected, shown(serving, build_image(top, serving.directory / "image")))


def test_debian_minimal_system(serving, minbase):
    expected = expected_tar(minbase, serving.directory / "expected")
    got = shown(serving, build_image(minbase, serving.directory / "image"))
    assert len(got) > 3000
    assert_same(expected, got)


@requires("fanotify", "erofs_mount")
def test_status_is_that_of_the_kernels_erofs(serving, tmp_path):
    """Inode numbers and blocks, too."""
    layers = make_layers(tmp_path)
    image = build_layers(layers, serving.directory / "image")
    texts = []
    for transport in (Transport.FUSE, Transport.FANOTIFY):
        daemon = serving.start(image, transport=transport)
        texts.append(sorted(serving.child(_STATUS, daemon.mountpoint).finish().splitlines()))
        space = os.statvfs(daemon.mountpoint)
        texts[-1].append((space.f_bsize, space.f_frsize, space.f_blocks, space.f_namemax))
        assert space.f_flag & os.ST_RDONLY
        daemon.stop()
    assert texts[0] == texts[1]


def test_set_user_id_counts_and_devices_open(serving):
    """Containers run from such mounts."""
    top = serving.directory / "source"
    top.mkdir()
    subprocess.run(["cp", "/usr/bin/id", top / "id"], check=True)
    (top / "id").chmod(0o4755)
    os.mknod(top / "null", stat.S_IFCHR, os.makedev(1, 3))
    (top / "null").chmod(0o666)
    mountpoint = start(serving, build_image(top, serving.directory / "image")).mountpoint
    serving.directory.chmod(0o755)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    assert _allowed(serving.directory)
    done = subprocess.run(
        [*command, "sh", "-c", f"{mountpoint}/id -u; echo x > {mountpoint}/null"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "0\n", done.stderr
    assert "cannot create" not in done.stderr


def _allowed(path):
    """Let everybody through the directories above a path of a test."""
    for parent in [path, *path.parents]:
        if parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(parent.stat().st_mode | 0o055)
    return True


def test_permissions_are_the_kernels(serving):
    top = serving.directory / "source"
    top.mkdir()
    (top / "secret").write_bytes(b"secret")
    (top / "secret").chmod(0o600)
    mountpoint = start(serving, build_image(top, serving.directory / "image")).mountpoint
    assert _allowed(serving.directory)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = subprocess.run(
        [*command, "cat", mountpoint / "secret"], capture_output=True, text=True, check=False
    )
    assert "Permission denied" in done.stderr
    done = subprocess.run(
        ["touch", mountpoint / "new"], capture_output=True, text=True, check=False
    )
    assert os.strerror(errno.EROFS) in done.stderr


@needs_fixtures
@requires("fanotify", "erofs_mount")
@pytest.mark.parametrize("transport", ALL)
@pytest.mark.parametrize(
    ("case", "layer"), [("tar-v5", "l2"), ("tar-v5-none-sha256-aligned", "l3")]
)
def test_rafs_v5_in_every_way(serving, tmp_path, transport, case, layer):
    folder = FIXTURES / "made-by-nydus-image"
    tar = tmp_path / "layer.tar"
    tar.write_bytes(gzip.decompress((folder / "inputs" / f"{layer}.tar.gz").read_bytes()))
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in (folder / "cases" / case).iterdir():
        shutil.copy(path, blobs)
    expected = expected_tar(tar, tmp_path / "expected")
    # Of the times of the names of one inode, v5's first one counts.
    for name in {b"/own2", b"/own2-link"} & expected.keys():
        expected[name] = expected[name]._replace(mtime_ns=1700000022 * 10**9)
    image = Built(blobs / "boot", blobs)
    for _ in range(2):
        daemon = serving.start(image, transport=transport)
        assert_same(expected, serving.snapshot(daemon.mountpoint))
        daemon.stop()
