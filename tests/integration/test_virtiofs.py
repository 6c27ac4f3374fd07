"""`nydusd virtiofs` as Kata starts it: what it is asked, its private tree, and its end.

A guest at its socket is in tests/vm/test_kata_chain.py.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from capabilities import CI, requires
from fakes.kata_runtime import CHECKOUT, SECONDS, Exported, image_request, passthrough_request

from fscache.cli.virtiofs import TREE
from fscache.virtiofs import VirtiofsError, find_virtiofsd
from kata.guest import PASSTHROUGH_MOUNTPOINT, image_mountpoint

pytestmark = [pytest.mark.root, requires("root", "erofs_mount", "fanotify")]

FILE = b"of the image\n" * 1000
# What Kata's configuration has for its own virtiofsd.
EXTRA = ("--thread-pool-size=1", "--announce-submounts")


@pytest.fixture(autouse=True)
def virtiofsd():
    """The system's, which is in no PATH."""
    try:
        find_virtiofsd()
    except VirtiofsError as error:
        (pytest.fail if CI else pytest.skip)(str(error))


@pytest.fixture
def image(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(FILE)
    return image_request(source, tmp_path)


@pytest.fixture
def shared(tmp_path):
    (tmp_path / "shared/c1").mkdir(parents=True)
    return tmp_path / "shared"


@pytest.fixture
def start(tmp_path):
    daemons = []

    def start(*words, **options):
        daemons.append(Exported(tmp_path, *words, **options))
        daemons[-1].wait()
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.process.kill()
        daemon.process.wait(SECONDS)


def read(path):
    """Read in another process: this one may be asked for the very data."""
    return subprocess.run(["cat", path], capture_output=True, check=True, timeout=SECONDS).stdout


def until(condition, what):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def exists(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize(
    ("words", "encode"),
    [((), str), (("--hybrid-mode",), lambda path: quote(path, safe="")), (EXTRA, str)],
    ids=["go", "rs", "with-virtiofsd-arguments"],
)
def test_k3_the_requests_of_both_runtimes(start, image, shared, words, encode):
    daemon = start(*words)
    # The monitor connects now.
    assert daemon.socket.is_socket()
    daemon.mount(encode(PASSTHROUGH_MOUNTPOINT), passthrough_request(shared))
    daemon.mount(encode(image_mountpoint("c1")), image)
    assert read(daemon.tree / "rafs/c1/lowerdir/file") == FILE
    (shared / "c1/new").write_text("later")
    assert (daemon.tree / "containers/c1/new").read_text() == "later"
    daemon.umount(encode(image_mountpoint("c1")))
    assert not (daemon.tree / "rafs/c1/lowerdir/file").exists()
    daemon.umount(encode(PASSTHROUGH_MOUNTPOINT))
    child = daemon.virtiofsd()
    assert daemon.end() == 0, daemon.log.read_text()
    assert not exists(child)
    assert not daemon.socket.exists()
    assert not daemon.sock.exists()


def test_nobody_else_sees_the_tree(start, image):
    daemon = start()
    daemon.mount("/a", image)
    assert read(daemon.tree / "a/file") == FILE
    assert not (TREE / "a").exists()
    assert str(TREE) not in Path("/proc/self/mountinfo").read_text()


def test_mounts_that_the_runtime_makes_later_appear(start, shared, tmp_path):
    """Kata binds the snapshot's directory into the shared one when the daemon runs already."""
    script = 'mount -t tmpfs shared "$0" && mount --make-shared "$0" && mkdir "$0/c2" && exec "$@"'
    unshare = ["unshare", "--mount", "--propagation=private", "sh", "-c", script, str(shared)]
    with subprocess.Popen([*unshare, "sleep", "1000"]) as holder:
        try:
            until(lambda: Path(f"/proc/{holder.pid}/root{shared}/c2").exists(), "no namespace")
            enter = ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", "--"]
            daemon = start(before=[*enter])
            daemon.mount("/containers", passthrough_request(shared))
            words = ["mount", "--bind", str(tmp_path / "source"), f"{shared}/c2"]
            (tmp_path / "source").mkdir()
            (tmp_path / "source/upper").mkdir()
            subprocess.run([*enter, *words], check=True)
            assert (daemon.tree / "containers/c2/upper").is_dir()
            subprocess.run([*enter, "umount", f"{shared}/c2"], check=True)
            assert list((daemon.tree / "containers/c2").iterdir()) == []
            daemon.umount("/containers")
            assert not (daemon.tree / "containers").exists()
        finally:
            holder.kill()


def test_an_image_of_the_command_line(start, image, tmp_path):
    boot, blobs = image["source"], tmp_path / "blobs"
    daemon = start("-B", boot, "-D", blobs)
    assert read(daemon.tree / "file") == FILE
    # A guest sits in it: what is mounted over it would not be seen.
    for place in ("/", "/a"):
        status, _, answer = daemon.ask("POST", f"/api/v1/mount?mountpoint={place}", image)
        assert status == 500, answer
    assert daemon.ask("DELETE", "/api/v1/mount?mountpoint=/")[0] == 500
    assert daemon.end() == 0


def test_a_directory_of_the_command_line(start, shared):
    daemon = start("--shared-dir", shared, "--virtual-mountpoint", "/x/y")
    (daemon.tree / "x/y/c1/written").write_text("by the guest")
    assert (shared / "c1/written").read_text() == "by the guest"


def test_a_killed_daemon_leaves_neither_virtiofsd_nor_mounts(start, image):
    daemon = start()
    daemon.mount("/a", image)
    device = (daemon.tree / "a").stat().st_dev
    child = daemon.virtiofsd()
    daemon.process.send_signal(signal.SIGKILL)
    daemon.process.wait(SECONDS)
    until(lambda: not exists(child), "virtiofsd lives on")
    gone = f"{os.major(device)}:{os.minor(device)}"
    assert gone not in Path("/proc/self/mountinfo").read_text()
    # A stale socket is no obstacle.
    again = start()
    again.mount("/a", image)
    assert read(again.tree / "a/file") == FILE


def test_the_daemon_ends_with_virtiofsd(start):
    daemon = start()
    os.kill(daemon.virtiofsd(), signal.SIGKILL)
    assert daemon.process.wait(SECONDS) == 1
    assert "Error: virtiofsd has ended with status -9" in daemon.log.read_text()


def fail(*words, before=()):
    command = [*before, sys.executable, "-m", "fscache", "virtiofs", *map(str, words)]
    done = subprocess.run(
        command, cwd=CHECKOUT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    return done.returncode, done.stderr.splitlines()[-1]


def test_what_cannot_be_is_one_line(tmp_path):
    assert fail("--sock", tmp_path / ("x" * 120)) == (
        1,
        f"Error: {tmp_path}/{'x' * 120}: no socket can be made (AF_UNIX path too long)",
    )
    status, line = fail("--sock", tmp_path / "nowhere/sock")
    assert (status, "No such file or directory" in line) == (1, True)
    status, line = fail("--sock", tmp_path / "s", "-B", "/nowhere", "-D", tmp_path)
    assert (status, line.startswith("Error: /nowhere")) == (1, True)
    assert not (tmp_path / "s").exists()
    before = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    status, line = fail("--sock", tmp_path / "s", before=before)
    assert (status, "needs root" in line) == (1, True)


def test_usage():
    assert fail()[0] == 2
    assert fail("--sock", "s", "-B", "b", "-s", "d", "-D", "x")[0] == 2


def test_a_bare_name_of_a_socket(tmp_path, start):
    """Rootless runtimes give bare names, since a path may have 107 bytes only."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    words = [sys.executable, "-m", "fscache", "virtiofs", "--sock", "s", "--apisock", "a"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen(words, cwd=deep, env=environment) as process:
        until(lambda: (deep / "s").is_socket() and (deep / "a").is_socket(), "no sockets")
        process.terminate()
        assert process.wait(SECONDS) == 0
    assert list(deep.iterdir()) == []
