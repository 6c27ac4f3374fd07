"""Directories for mounts over an image, a shared directory, a tmpfs: skeletons and overlays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from capabilities import requires
from serving import ROOT, Child, build_image, unmount

from fscache import kernel
from fscache.mounts.mount import MountError, mount_erofs
from fscache.mounts.nest import Nest
from fscache.mounts.place import (
    MOUNT_SOURCE,
    PlainMount,
    create_tmpfs,
    mount_bind,
    mount_tmpfs,
    mounted_at,
    mounted_below,
)
from fscache.mounts.skeleton import host_directories, image_directories
from fscache.mounts.treepath import PathError

pytestmark = [pytest.mark.root, pytest.mark.erofs_mount, requires("root", "erofs_mount")]

OURS = ("overlay", MOUNT_SOURCE)
MOMENT = 1_600_000_000_123_456_789


class Place:
    """A mount point `top` with an image, and what is needed to mount more below it."""

    def __init__(self, directory):
        self.directory = directory
        self.top = directory / "top dir"
        self.top.mkdir()
        source = directory / "source"
        (source / "etc/conf").mkdir(parents=True)
        (source / "etc/passwd").write_bytes(b"root")
        (source / "bin").symlink_to("etc")
        (source / "etc").chmod(0o2751)
        os.chown(source / "etc", 7, 8)
        (source / "etc").chmod(0o2751)
        os.setxattr(source / "etc", "user.tag", b"value")
        for path in (source / "etc/conf", source / "etc", source):
            os.utime(path, ns=(MOMENT, MOMENT))
        self.image = build_image(source, directory / "image")
        # Flat metadata and no reads: zeros do for the data.
        self.data = directory / "data"
        self.data.write_bytes(bytes(1 << 20))
        self.source = source
        self.nest = self.new_nest()

    def new_nest(self):
        return Nest(self.top, lambda: mount_tmpfs(self.top))

    @property
    def look(self):
        return image_directories(self.image.bootstrap)

    def mount_image(self):
        mount = mount_erofs(self.image.bootstrap, [self.data], self.top)
        self.nest.use(self.look)
        return mount

    def mount(self, path):
        """Mount a tmpfs with a file `here` that names its place."""
        with self.nest.place(path, None) as directory:
            mount = create_tmpfs()
            try:
                (Path(f"/proc/self/fd/{mount}") / "here").write_text(path)
                kernel.move_mount(mount, directory)
            finally:
                os.close(mount)

    def die(self, *paths):
        """Have another process take over, with none of the descriptors of this one."""
        for fd in (self.nest._cover._overlay, self.nest._cover._lower):
            os.close(fd)
        self.nest = self.new_nest()
        self.nest.adopt(paths)
        self.nest.use(self.look)

    def unmount(self, path):
        with self.nest.leaving(path):
            PlainMount(self.top / path.lstrip("/")).unmount()

    def here(self, path):
        return (self.top / path.lstrip("/") / "here").read_text()

    def names(self, path=""):
        return sorted(os.listdir(self.top / path))


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    unmount(place.top)


def test_first_and_last_mount_bring_and_take_the_overlay(place):
    erofs = place.mount_image()
    place.mount("/a/b")
    assert mounted_at(place.top) == OURS
    assert place.here("/a/b") == "/a/b"
    assert place.names() == ["a", "bin", "etc"]
    assert (place.top / "etc/passwd").stat().st_size == 4
    with pytest.raises(OSError, match="Read-only"):
        (place.top / "new").mkdir()
    place.unmount("/a/b")
    assert mounted_at(place.top).kind == "erofs"
    assert place.names() == ["bin", "etc"]
    erofs.unmount()
    assert erofs.is_gone()


def test_directories_look_as_those_of_the_image(place):
    place.mount_image()
    before = {name: (place.top / name).stat() for name in ("", "etc", "etc/conf")}
    place.mount("/etc/conf/x")
    place.mount("/etc/y")
    for name, was in before.items():
        now = (place.top / name).stat()
        for field in ("st_mode", "st_uid", "st_gid", "st_mtime_ns"):
            assert getattr(now, field) == getattr(was, field), (name, field)
    assert before["etc"].st_mode & 0o7777 == 0o2751
    assert os.getxattr(place.top / "etc", "user.tag") == b"value"
    assert place.names("etc") == ["conf", "passwd", "y"]


def test_mount_on_a_directory_of_the_image(place):
    place.mount_image()
    place.mount("/etc")
    assert place.here("/etc") == "/etc"
    assert place.names("etc") == ["here"]
    place.unmount("/etc")
    assert place.names("etc") == ["conf", "passwd"]


def test_further_mounts_keep_those_that_are_there(place):
    place.mount_image()
    for path in ("/a", "/b/c", "/b/d", "/etc/e"):
        place.mount(path)
    assert [place.here(path) for path in ("/a", "/b/c", "/b/d", "/etc/e")] == [
        "/a", "/b/c", "/b/d", "/etc/e",
    ]  # fmt: skip
    place.unmount("/b/c")
    assert place.names("b") == ["d"]
    place.unmount("/b/d")
    assert place.names() == ["a", "bin", "etc"]
    assert [place.here(path) for path in ("/a", "/etc/e")] == ["/a", "/etc/e"]
    # No overlay of before is left.
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    ours = [line for line in mounts if str(place.top.parent) in line]
    assert sum(" overlay nydusd " in line for line in ours) == 1


def test_names_that_are_not_there_are_seen_when_they_come(place):
    """What a look-up has found missing, and a listing not named, must not be remembered."""
    place.mount_image()
    place.mount("/a")
    for path in ("late", "etc/late"):
        assert not (place.top / path).exists()
    assert "late" not in place.names() + place.names("etc")
    place.mount("/late")
    place.mount("/etc/late")
    assert place.here("/late") == "/late"
    assert "late" in place.names()
    assert "late" in place.names("etc")


_WALK = """
import os, sys
top = sys.argv[1]
print("ready", flush=True)
count = 0
while True:
    for _ in range(100):
        assert open(top + "/a/here").read() == "/a"
        assert os.stat(top + "/etc/passwd").st_size == 4
        assert "etc" in os.listdir(top)
    count += 1
    print(count, flush=True)
"""


def test_no_moment_without_the_mounts_that_are_there(place, stack):
    place.mount_image()
    place.mount("/a")
    child = Child(_WALK, place.top)
    stack.callback(child.close)
    child.line()
    for number in range(20):
        place.mount(f"/b{number % 3}/{number}")
        child.line()
        if number >= 5:
            place.unmount(f"/b{(number - 5) % 3}/{number - 5}")
    assert child.process.poll() is None
    child.close()


def test_users_of_the_old_tree_go_on(place):
    erofs = place.mount_image()
    place.mount("/a")
    inside = os.open(place.top / "a", os.O_RDONLY | os.O_DIRECTORY)
    above = os.open(place.top / "etc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        place.mount("/b")
        place.unmount("/a")
        place.unmount("/b")
        assert os.listdir(inside) == ["here"]
        assert sorted(os.listdir(above)) == ["conf", "passwd"]
        erofs.unmount()
        assert place.names() == []
        # Whoever waits for the end of the image waits for the users of the overlay.
        assert not erofs.is_gone()
    finally:
        os.close(inside)
        os.close(above)
    assert erofs.is_gone()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/etc/passwd", "no directory in the image"),
        ("/etc/passwd/x", "no directory in the image"),
        ("/bin/x", "no directory in the image"),
        ("rel", "not an absolute path"),
        ("/a/../b", "not an absolute path"),
        ("/a\0", "not an absolute path"),
        ("/here/below", "mount point is in that of /here"),
        ("/deep", "mount point is above that of /deep/er"),
        ("//here/.", "mount point is above that of /here"),
        ("/" + "x" * 300, "File name too long"),
    ],
)
def test_places_that_cannot_be(place, path, text):
    place.mount_image()
    place.mount("/here")
    place.mount("/deep/er")
    with pytest.raises((PathError, MountError), match=text):
        place.mount(path)
    assert place.here("/here") == "/here"
    assert place.names() == ["bin", "deep", "etc", "here"]


def test_failed_mount_leaves_no_directory(place):
    place.mount_image()
    for _ in range(2):
        with pytest.raises(RuntimeError), place.nest.place("/a/b", None):
            raise RuntimeError
        assert mounted_at(place.top).kind == "erofs"
    place.mount("/c")
    with pytest.raises(RuntimeError), place.nest.place("/a/b", None):
        raise RuntimeError
    assert place.names() == ["bin", "c", "etc"]


def test_mounts_of_others_are_carried_along(place):
    place.mount_image()
    subprocess.run(["mount", "--bind", __file__, place.top / "etc/passwd"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "mine", place.top / "etc/conf"], check=True)
    (place.top / "etc/conf/precious").touch()
    place.mount("/a")
    place.mount("/b")
    place.unmount("/a")
    assert place.names("etc/conf") == ["precious"]
    assert (place.top / "etc/passwd").read_text() == Path(__file__).read_text()
    assert set(mounted_below(place.top)) == {(b"b",), (b"etc", b"conf"), (b"etc", b"passwd")}


def test_nothing_is_done_below_what_others_mounted_over_it(place):
    place.mount_image()
    place.mount("/a")
    subprocess.run(["mount", "-t", "tmpfs", "mine", place.top], check=True)
    for path in ("/b", "/a/b"):
        with pytest.raises(PathError):
            place.mount(path)
    with pytest.raises(MountError, match="something else is mounted"), place.nest.leaving("/"):
        pytest.fail("not refused")
    assert mounted_at(place.top).source == "mine"
    assert place.names() == []
    subprocess.run(["umount", place.top], check=True)
    assert place.here("/a") == "/a"
    place.mount("/b")
    assert place.here("/b") == "/b"


def test_shared_directory_as_the_top(place, tmp_path):
    shared = tmp_path / "shared"
    (shared / "sub").mkdir(parents=True)
    (shared / "sub").chmod(0o700)
    (shared / "file").touch()
    mount_bind(shared, place.top, read_only=True)
    place.nest.use(host_directories(shared))
    place.mount("/sub/a")
    assert place.names("sub") == ["a"]
    assert (place.top / "sub").stat().st_mode & 0o7777 == 0o700
    with pytest.raises(PathError, match="no directory in the shared directory"):
        place.mount("/file/x")
    assert sorted(os.listdir(shared)) == ["file", "sub"]
    assert os.listdir(shared / "sub") == []
    place.unmount("/sub/a")
    with pytest.raises(OSError, match="Read-only"):
        (place.top / "new").touch()
    assert place.names("sub") == []


def test_tmpfs_comes_when_it_is_needed(place):
    place.mount("/a/b")
    place.mount("/a/c")
    assert mounted_at(place.top) == ("tmpfs", MOUNT_SOURCE)
    place.unmount("/a/b")
    assert place.names("a") == ["c"]
    place.unmount("/a/c")
    assert place.names() == []


def test_mounts_below_stay_when_the_top_comes_and_goes(place):
    place.mount("/a/b")
    place.mount("/etc/x")
    with place.nest.place("/", place.look) as top:
        assert place.names() == []
        erofs = mount_erofs(place.image.bootstrap, [place.data], top)
    assert mounted_at(place.top) == OURS
    assert place.names() == ["a", "bin", "etc"]
    assert place.names("etc") == ["conf", "passwd", "x"]
    with place.nest.replacing("/", place.look):
        erofs.unmount()
        assert erofs.is_gone()
        erofs = mount_erofs(place.image.bootstrap, [place.data], top)
    assert (place.here("/a/b"), place.here("/etc/x")) == ("/a/b", "/etc/x")
    with place.nest.leaving("/"):
        erofs.unmount()
    assert erofs.is_gone()
    assert place.names() == ["a", "etc"]
    assert place.names("etc") == ["x"]
    assert (place.here("/a/b"), place.here("/etc/x")) == ("/a/b", "/etc/x")
    place.unmount("/a/b")
    place.unmount("/etc/x")
    assert place.names() == []


def test_top_without_room_for_the_mounts_is_refused(place):
    place.mount("/bin/x")
    with pytest.raises(PathError, match="no directory"), place.nest.place("/", place.look):
        pytest.fail("not refused")
    assert place.here("/bin/x") == "/bin/x"


def test_failed_change_of_the_top_brings_the_mounts_back(place):
    erofs = place.mount_image()
    place.mount("/a")
    with pytest.raises(RuntimeError), place.nest.replacing("/", place.look):
        raise RuntimeError
    assert place.names() == ["a", "bin", "etc"]

    def fail():
        erofs.unmount()
        raise RuntimeError

    with pytest.raises(RuntimeError), place.nest.replacing("/", place.look):
        fail()
    assert mounted_at(place.top) == ("tmpfs", MOUNT_SOURCE)
    assert place.here("/a") == "/a"


def test_what_others_unmounted_does_not_hold_the_image(place):
    erofs = place.mount_image()
    place.mount("/a")
    subprocess.run(["umount", place.top / "a"], check=True)
    with place.nest.leaving("/"):
        erofs.unmount()
    assert erofs.is_gone()


def test_another_process_goes_on(place):
    erofs = place.mount_image()
    place.mount("/a")
    place.mount("/b")
    place.die("/", "/a", "/b")
    place.mount("/c")
    assert [place.here(path) for path in ("/a", "/b", "/c")] == ["/a", "/b", "/c"]
    for path in ("/a", "/b", "/c"):
        place.unmount(path)
    assert mounted_at(place.top).kind == "erofs"
    erofs.unmount()


def test_another_process_goes_on_after_a_kill_in_a_change(place, monkeypatch):
    place.mount_image()
    place.mount("/a")

    def killed(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr("fscache.mounts.skeleton.umount_fd", killed)
    with pytest.raises(KeyboardInterrupt):
        place.mount("/b")
    monkeypatch.undo()
    place.die("/", "/a")
    place.mount("/c")
    assert place.here("/a") == "/a"
    place.unmount("/a")
    place.unmount("/c")
    assert mounted_at(place.top).kind == "erofs"


_SHARED = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests", sys.argv[2] + "/tests/integration"]
from test_nest import *
place = Place(Path(sys.argv[1]))
test_further_mounts_keep_those_that_are_there(place)
unmount(place.top)
place.nest = place.new_nest()
test_mounts_below_stay_when_the_top_comes_and_goes(place)
"""


@pytest.mark.parametrize("propagation", ["private", "shared", "slave"])
def test_any_propagation_of_mounts(tmp_path, propagation):
    command = ["unshare", "--mount", "--propagation", propagation, sys.executable, "-c", _SHARED]
    subprocess.run([*command, tmp_path, ROOT], check=True, timeout=60)


def test_bind_does_not_show_at_its_source_what_is_mounted_on_it(tmp_path, stack):
    code = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fscache.mounts.place import mount_bind
from fscache.mounts.nest import Nest
source, top = Path(sys.argv[1]) / "source", Path(sys.argv[1]) / "top"
for path in (source / "sub", top):
    path.mkdir(parents=True)
mount_bind(source, top)
subprocess.run(["mount", "-t", "tmpfs", "mine", top / "sub"], check=True)
assert (top / "sub").is_mount()
assert not (source / "sub").is_mount()
"""
    command = ["unshare", "--mount", "--propagation", "shared", sys.executable, "-c", code]
    subprocess.run([*command, tmp_path, ROOT], check=True, timeout=60)
