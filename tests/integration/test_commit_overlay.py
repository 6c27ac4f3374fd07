"""`nydusify commit --upper`: what overlayfs has written, judged by overlayfs.

The lower directory is the image itself, mounted by our daemon; what the overlay of both shows has
to be what the committed image shows.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from builder.oci import media
from builder.oci.layout import LayoutSource
from builder.oci.records import Manifest
from tests.capabilities import requires
from tests.fakes.containerd import FakeContainer, FakeContainerd
from tests.fakes.oci_image import Image, layer, member
from tests.fakes.oci_registry import OciRegistry
from tests.nydusify_images import nydusify
from tests.treecompare import compare_trees

pytestmark = requires("root", "erofs_mount", "fanotify")

WAIT_SECONDS = 60
REPOSITORY = Path(__file__).resolve().parents[2]


def _base():
    """A layer with something of every kind to change."""
    folders = ("etc", "opaque", "opaque/deep", "renamed", "kept", "gone.d", "to-file", "sticky")
    names = (
        "etc/conf", "etc/mode", "etc/owner", "etc/gone", "opaque/a", "opaque/deep/b", "renamed/x",
        "kept/file", "gone.d/x", "to-dir", "to-link", "to-file/x", "to-pipe", "hard1", "attr",
    )  # fmt: skip
    files = [member(name, kind=tarfile.DIRTYPE) for name in folders]
    files += [member(name, name.encode() * 50) for name in names]
    files.append(member("big", os.urandom(3 << 20)))
    files.append(member("hard2", kind=tarfile.LNKTYPE, linkname="hard1"))
    files.append(member("link", kind=tarfile.SYMTYPE, linkname="etc/conf"))
    return layer(*files)


# What a container does; some of it to what it has done before.
CHANGES = r"""
set -e
echo changed > etc/conf
chmod 600 etc/mode; chown 12:34 etc/owner
rm etc/gone; rm -r gone.d
rm -r opaque; mkdir opaque; echo new > opaque/c; mkdir opaque/deep
mkdir renamed2; mv renamed/x renamed2/y; rmdir renamed
rm to-dir; mkdir to-dir; echo in > to-dir/file
rm to-link; ln -s /etc/conf to-link
rm -r to-file; echo now-a-file > to-file
rm to-pipe; mkfifo to-pipe
echo more >> hard1
chmod 640 big
setfattr -n user.color -v blue attr
setfattr -n user.with=equals -v 0x00ff80 kept
setfattr -n security.capability -v 0x0100000202200000000000000000000000000000 kept/file
chmod 1777 sticky
mkdir -p new/a/b; echo one > new/one; ln new/one new/two; ln new/one new/a/three
mknod new/null c 1 3; mknod new/block b 7 9
truncate -s 5000000 new/sparse; printf end >> new/sparse
printf x > "new/$(printf 'b\351\377ad')"; printf y > "new/$(printf '%0200d' 7)"
touch -d @1234567890.123456789 new/time; touch -d @-5.5 new/early; touch -h -d @99 to-link
chmod 4755 new/time
"""
MORE = r"""
set -e
rm new/two; echo again >> etc/conf; rm -r opaque; mkdir -m 711 gone.d; echo back > gone.d/x
rm to-link; mkdir to-link; rm -r to-dir; echo file > to-dir
mv new/a moved; rm -r sticky
"""


@pytest.fixture
def tmp_path(tmp_path_factory):
    """Short, because of the daemons' sockets."""
    return tmp_path_factory.mktemp("c")


@pytest.fixture
def base(tmp_path):
    """A Nydus image in a folder."""
    with OciRegistry() as registry:
        Image([_base()]).add(registry.repository("app"), "v1")
        done = nydusify(
            "convert", "--source", f"{registry.host}/app:v1", "--plain-http", "--target",
            f"oci:{tmp_path}/base:n", "--work-dir", tmp_path / "w",
        )  # fmt: skip
        assert done.status == 0, done.stderr
    return f"oci:{tmp_path}/base:n"


@contextlib.contextmanager
def _mounted(reference, directory):
    """Have an image mounted by a daemon of its own."""
    mountpoint = directory / "mnt"
    process = subprocess.Popen(
        [sys.executable, "-m", "builder.nydusify", "mount", "--target", reference,
         "--mount-path", mountpoint, "--work-dir", directory / "work"],
        cwd=REPOSITORY, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        end = time.monotonic() + WAIT_SECONDS
        while not mountpoint.is_mount():
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < end
            time.sleep(0.05)
        yield mountpoint
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_SECONDS)


@contextlib.contextmanager
def _overlay(lower, directory, options=""):
    """Have an overlay mounted; yield its view and its upper directory."""
    upper, view = directory / "upper", directory / "view"
    for path in (upper, view, directory / "overlay-work"):
        path.mkdir(parents=True)
    words = f"lowerdir={lower},upperdir={upper},workdir={directory / 'overlay-work'}{options}"
    subprocess.run(["mount", "-t", "overlay", "-o", words, "overlay", view], check=True)
    try:
        yield view, upper
    finally:
        subprocess.run(["umount", view], check=True)


def _change(view, script):
    # The shell must not have its program from what our own process serves.
    subprocess.run(["sh", "-c", script], cwd=view, check=True, timeout=WAIT_SECONDS)


def _commit(upper, source, target, tmp_path, *words):
    return nydusify(
        "commit", "--upper", upper, "--source", source, "--target", target, "--work-dir",
        tmp_path / "work", *words,
    )  # fmt: skip


def _manifest(reference):
    folder, _, tag = reference.removeprefix("oci:").rpartition(":")
    place = LayoutSource(Path(folder), tag)
    return Manifest.parse(place.document(place.resolve()))


def test_committed_image_is_what_the_container_saw(base, tmp_path):
    first, second = f"oci:{tmp_path}/first:n", f"oci:{tmp_path}/second:n"
    with (
        _mounted(base, tmp_path / "m0") as lower,
        _overlay(lower, tmp_path / "c0") as (view, upper),
    ):
        _change(view, CHANGES)
        done = _commit(upper, base, first, tmp_path)
        assert done.status == 0, done.stderr
        with _mounted(first, tmp_path / "m1") as mounted:
            assert compare_trees(view, mounted) == []
            with _overlay(mounted, tmp_path / "c1") as (view, upper):
                _change(view, MORE)
                done = _commit(upper, first, second, tmp_path)
                assert done.status == 0, done.stderr
                with _mounted(second, tmp_path / "m2") as result:
                    assert compare_trees(view, result) == []
    assert not list((tmp_path / "work").iterdir())
    layers = [_manifest(one).layers for one in (base, first, second)]
    assert [len(one) for one in layers] == [2, 3, 4]
    # Content that the image has already is not stored again: of the large file only the mode.
    assert layers[1][1].size < 1 << 20
    commits = [one[-1].annotations.get(media.COMMIT_BLOBS) for one in layers]
    added = [one.digest for one in layers[2][1:3]]
    assert commits == [None, added[0], ",".join(added)]
    assert nydusify("check", "--target", second, "--work-dir", tmp_path / "out").status == 0


RENAMES = r"""
set -e
mv opaque elsewhere; echo new > elsewhere/new; rm elsewhere/a; mkdir opaque; echo own > opaque/own
mv kept elsewhere/kept; chmod 600 big etc/conf; setfattr -n user.color -v blue etc/mode
mkdir plain; echo x > plain/x; mv plain plain2
"""


@contextlib.contextmanager
def _process_in(view):
    """Have a process whose root is a directory."""
    code = "import os, sys, time; os.chroot(sys.argv[1]); print(flush=True); time.sleep(1000)"
    process = subprocess.Popen([sys.executable, "-c", code, view], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def test_renamed_directories_and_metadata_by_reference(base, tmp_path):
    """What `redirect_dir` and `metacopy` leave in the upper directory is not all there is."""
    target = f"oci:{tmp_path}/renamed:n"
    options = ",redirect_dir=on,metacopy=on"
    with (
        _mounted(base, tmp_path / "m0") as lower,
        _overlay(lower, tmp_path / "c0", options) as (view, upper),
        _process_in(view) as pid,
    ):
        _change(view, RENAMES)
        assert os.getxattr(upper / "elsewhere", "trusted.overlay.redirect")
        done = _commit(upper, base, target, tmp_path)
        assert done.status == 1
        assert "only the container's own view has its content" in done.last
        container = FakeContainer("c", base, str(upper), pid=pid)
        containerd = FakeContainerd(tmp_path / "s", [container])
        try:
            done = nydusify(
                "commit", "--container", "c", "--containerd-address", tmp_path / "s", "--target",
                target, "--work-dir", tmp_path / "work",
            )  # fmt: skip
        finally:
            containerd.close()
        assert done.status == 0, done.stderr
        assert containerd.calls == ["pause", "resume"]
        with _mounted(target, tmp_path / "m1") as mounted:
            assert compare_trees(view, mounted) == []
