"""FUSE for a user without privilege: `nobody`, in a mount namespace whose /dev/fuse is as usual.

Distributions let everybody open the device. Mounts are made by the setuid `fusermount3`, so
nothing but the daemon's user may look into them.
"""

import encodings
import os
import pickle
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
from capabilities import CI, requires
from serving import ROOT, build_image, wait_until, write_config
from treecompare import differences, read_tree

from tests.fakes.oci_image import Image, layer, member
from tests.fakes.oci_registry import OciRegistry
from tests.nydusify_images import nydusify

pytestmark = [
    pytest.mark.root,
    requires("root", "fuse"),
    # Images of root file systems may lack it; installed systems and containers have it.
    pytest.mark.skipif(not Path("/etc/mtab").exists(), reason="fusermount3 needs /etc/mtab"),
]

NOBODY = 65534
TIMEOUT = 60
_BECOME = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
# Reads what lies in root's home, an interpreter or this checkout, and may nothing else.
_READ = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
_NAMESPACE = """
mount -t tmpfs -o mode=755 tmpfs /mnt && mknod -m 666 /mnt/fuse c 10 229 &&
mount --bind /mnt/fuse /dev/fuse && echo ready && read -r _
"""
_SNAPSHOT = """
import pickle, sys
from pathlib import Path
from treecompare import read_tree
pickle.dump(read_tree(Path(sys.argv[1])), sys.stdout.buffer)
"""
_HOLD = """
import sys
with open(sys.argv[1], "rb") as file:
    print("ready", flush=True)
    sys.stdin.readline()
    sys.stdout.buffer.write(file.read())
"""


def _environment():
    packages = sysconfig.get_paths()["purelib"]
    paths = [str(ROOT), str(ROOT / "tests"), packages]
    return {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(paths), "LC_ALL": "C.UTF-8"}


def _find_python():
    """Return how to become `nobody`, and an interpreter that then finds our packages."""
    for become in (_BECOME, _BECOME + _READ):
        for python in (sys.executable, shutil.which("python3", path="/usr/bin")):
            if python is not None:
                packages = "mfusepy, zstandard, treecompare"
                done = subprocess.run(
                    [*become, python, "-c", f"import fscache.cli.nydusd, {packages}"],
                    env=_environment(), capture_output=True, check=False,
                )  # fmt: skip
                if done.returncode == 0:
                    return become, python
    (pytest.fail if CI else pytest.skip)("no Python with our packages that `nobody` may run")
    return None


class User:
    """A home of the user's with an image of files of that user, and programs run there."""

    def __init__(self, home, stack):
        self.home = home
        self.stack = stack
        self._become, self.python = _find_python()
        self.source = home / "source"
        self.source.mkdir()
        shutil.copytree(Path(encodings.__file__).parent, self.source / "encodings")
        (self.source / "secret").write_bytes(b"secret" * 100_000)
        subprocess.run(["chown", "-hR", f"{NOBODY}:{NOBODY}", self.source], check=True)
        (self.source / "secret").chmod(0o400)
        self.image = build_image(self.source, home / "image")
        self.config = write_config(home / "config.json", self.image)
        self.top = home / "mnt"
        self.top.mkdir()
        subprocess.run(["chown", "-hR", f"{NOBODY}:{NOBODY}", home], check=True)
        self._first = subprocess.Popen(
            ["unshare", "--mount", "--propagation=slave", "sh", "-c", _NAMESPACE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        stack.callback(self._end)
        assert self._first.stdout.readline() == b"ready\n"

    def _end(self):
        self._first.stdin.close()
        self._first.stdout.close()
        self._first.wait(TIMEOUT)

    def start(self, *words, **pipes):
        """Start a program of the user in the namespace."""
        enter = ["nsenter", f"--mount=/proc/{self._first.pid}/ns/mnt", f"--wdns={self.home}"]
        process = subprocess.Popen(
            [*enter, *self._become, *map(str, words)], env=_environment(), **pipes
        )

        def end():
            if process.poll() is None:
                process.kill()
            process.communicate()

        self.stack.callback(end)
        return process

    def run(self, *words):
        """Run a program to its end; return status, output and errors."""
        process = self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=TIMEOUT)
        return process.returncode, out, err

    def serve(self, *options):
        """Start a daemon and wait until it serves; `log` has its messages."""
        log = self.home / "log"
        with log.open("wb") as file:
            words = ["erofs", "-B", "image/image.boot", "-C", self.config, "-M", "mnt", *options]
            daemon = self.start(self.python, "-m", "fscache", *words, stderr=file)
        wait_until(lambda: "serving " in log.read_text() or daemon.poll() is not None)
        assert daemon.poll() is None, log.read_text()
        return daemon

    @property
    def is_mounted(self):
        mounts = Path(f"/proc/{self._first.pid}/mounts").read_text()
        return f"nydusd {self.top} fuse.nydusd ro,nosuid,nodev" in mounts

    def tree(self):
        status, out, err = self.run(self.python, "-c", _SNAPSHOT, self.top)
        assert status == 0, err
        return pickle.loads(out)


@pytest.fixture
def user(stack):
    # Not below pytest's directories, which are root's alone.
    home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuse-user-")))
    home.chmod(0o755)
    return User(home, stack)


@pytest.mark.parametrize("options", [("--transport", "fuse"), ()])
def test_whole_tree_and_orderly_end(user, options):
    """Without an option, too: nothing else is possible here."""
    daemon = user.serve(*options)
    assert user.is_mounted
    expected = read_tree(user.source)
    expected[b"/"] = expected[b"/"]._replace(mtime_ns=0)
    assert differences(expected, user.tree()) == []
    # Nobody else may look, not even root.
    with pytest.raises(OSError, match="Permission denied"):
        Path(f"/proc/{daemon.pid}/root{user.top}/secret").stat()
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(TIMEOUT) == 0
    assert not user.is_mounted
    log = (user.home / "log").read_text()
    assert "ERROR" not in log
    assert "Traceback" not in log


def test_users_are_served_on(user):
    daemon = user.serve()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    reader = user.start(user.python, "-c", _HOLD, user.top / "secret", **pipes)
    assert reader.stdout.readline() == b"ready\n"
    daemon.send_signal(signal.SIGTERM)
    wait_until(lambda: not user.is_mounted)
    assert daemon.poll() is None
    out, _ = reader.communicate(b"\n", timeout=TIMEOUT)
    assert out == (user.source / "secret").read_bytes()
    assert daemon.wait(TIMEOUT) == 0


def test_killed_and_started_again(user):
    daemon = user.serve()
    daemon.kill()
    daemon.wait(TIMEOUT)
    assert user.is_mounted
    assert b"not connected" in user.run("ls", user.top)[2]
    daemon = user.serve()
    assert "by a daemon that is gone" in (user.home / "log").read_text()
    assert user.run("cat", user.top / "secret")[1] == (user.source / "secret").read_bytes()
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(TIMEOUT) == 0
    assert not user.is_mounted


@pytest.mark.parametrize("transport", ["fanotify", "eager"])
def test_what_takes_root_says_so(user, transport):
    words = ["erofs", "-B", "image/image.boot", "-C", user.config, "-M", "mnt"]
    status, _, err = user.run(user.python, "-m", "fscache", *words, "--transport", transport)
    assert status == 1
    assert b"Error: " in err
    assert b"Traceback" not in err
    assert not user.is_mounted


_BY_NAME = {
    "nydusify": ("builder.nydusify", "mount", "--work-dir", "work", "--plain-http", "--target"),
    "nydusd": ("fscache", "erofs", "--image"),
}


@pytest.mark.parametrize("program", _BY_NAME)
def test_image_is_mounted_by_its_name(user, tmp_path, program):
    """From a reference to a tree, lazily out of the registry, without privilege."""
    content = b"content" * 300_000
    # The command starts the daemon by the same interpreter, which may lie in root's home.
    user._become = _BECOME + _READ
    option = "--mount-path" if program == "nydusify" else "--mountpoint"
    with OciRegistry() as registry:
        Image([layer(member("dir/file", content))]).add(registry.repository("app"), "v1")
        target = f"{registry.host}/app:n"
        words = ("convert", "--source", f"{registry.host}/app:v1", "--target", target)
        done = nydusify(*words, "--plain-http", "--work-dir", tmp_path)
        assert done.status == 0, done.stderr
        log = user.home / "log"
        with log.open("wb") as file:
            words = [user.python, "-m", *_BY_NAME[program], target, option, user.top]
            process = user.start(*words, stderr=file)
        wait_until(lambda: user.is_mounted or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        assert user.run("cat", user.top / "dir" / "file")[1] == content
        assert user.run("ls", user.top)[1] == b"dir\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0, log.read_text()
        assert not user.is_mounted
    assert "Traceback" not in log.read_text()
    left = [path for path in user.home.glob("work/*") if path.exists()]
    assert left == []
