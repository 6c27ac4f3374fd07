"""Builds images, serves them with a daemon, and reads the mounts in processes of their own.

No thread of the test process reads a mount: a page fault that holds the GIL would wait for
a daemon that cannot run.
"""

import contextlib
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from builder.bootstrap import inlined_bootstrap
from builder.build import BuildOptions, SourceType, build
from builder.merge import MergeOptions, merge
from builder.source.options import SourceOptions, WhiteoutSpec
from fscache.backend import HttpProxyConfig, LocalFsConfig
from fscache.config import DaemonConfig
from fscache.daemon import Daemon
from fscache.settings import RafsConfig

TIMEOUT = 60
ROOT = Path(__file__).parents[2]

_SNAPSHOT = """
import os, pickle, sys
from pathlib import Path
from treecompare import read_tree
tree = read_tree(Path(sys.argv[1]), content=sys.argv[2] == "True")
nlinks = {name: os.lstat(os.fsencode(sys.argv[1]) + name).st_nlink for name in tree}
pickle.dump((tree, nlinks), sys.stdout.buffer)
"""
_READ = """
import os, sys
try:
    fd = os.open(sys.argv[1], os.O_RDONLY)
    sys.stdout.buffer.write(os.pread(fd, int(sys.argv[3]), int(sys.argv[2])))
except OSError as error:
    sys.exit(error.errno)
"""


class Child:
    """A Python program in its own process, killed in any case; `tests/` is importable."""

    def __init__(self, code, *args):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def line(self):
        """Wait for a line of output."""
        line = self.process.stdout.readline().strip()
        assert line, self.process.stderr.read()
        return line

    def go(self):
        """Let a program go on that waits for a line of input."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def end(self, timeout=TIMEOUT):
        """Wait for the end and return exit status, output and errors."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def finish(self, timeout=TIMEOUT):
        """Return the output of a program that must succeed."""
        status, out, err = self.end(timeout)
        assert status == 0, err
        return out

    def close(self):
        self.process.kill()
        self.process.wait(TIMEOUT)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Built(NamedTuple):
    """A bootstrap, and the directory with its blobs."""

    bootstrap: Path
    blob_dir: Path

    def blobs(self):
        """Return the stored blobs by id."""
        return {path.name: path.read_bytes() for path in self.blob_dir.iterdir()}


def build_image(top, where, **options):
    """Build a directory or a tar into `where`, bootstrap and blob separate."""
    blob_dir = where / "blobs"
    blob_dir.mkdir(parents=True)
    kind = SourceType.DIRECTORY if top.is_dir() else SourceType.TAR
    bootstrap = where / "image.boot"
    build(top, BuildOptions(source_type=kind, bootstrap=bootstrap, blob_dir=blob_dir, **options))
    return Built(bootstrap, blob_dir)


def build_layers(tars, where, **options):
    """Build each layer with its metadata inside and merge them, as nydusify does."""
    blob_dir = where / "blobs"
    blob_dir.mkdir(parents=True)
    sources = []
    for tar in tars:
        result = build(
            tar,
            BuildOptions(
                source_type=SourceType.TAR,
                blob_dir=blob_dir,
                inline_bootstrap=True,
                toc=True,
                source=SourceOptions(whiteout_spec=WhiteoutSpec.NONE),
                **options,
            ),
        )
        source = where / result.blobs[0]
        source.write_bytes(inlined_bootstrap(result.blob_path))
        sources.append(source)
    bootstrap = where / "merged.boot"
    merge(sources, MergeOptions(bootstrap=bootstrap))
    return Built(bootstrap, blob_dir)


def http(server, **options):
    """Return the configuration of a blob server as backend.

    It is waited for: a busy machine is no reason to ask for anything twice.
    """
    patience = {"timeout": TIMEOUT, "connect_timeout": TIMEOUT}
    return HttpProxyConfig(addr=server.address, **{**patience, **options})


class Serving:
    """Daemons, mounts and readers of one test; `stack` ends all of them, readers first.

    `patience` is how many seconds a whole tree may take to be read.
    """

    patience = TIMEOUT

    def __init__(self, directory, stack):
        self.directory = directory
        self.stack = stack

    def mountpoint(self, name=None):
        """Return a new mount point that is unmounted in the end, whoever mounted it."""
        path = self.directory / (name or f"mnt{len(list(self.directory.glob('mnt*')))}")
        path.mkdir()
        self.stack.callback(unmount, path)
        return path

    def start(self, image, backend=None, *, work_dir=None, amplify=1 << 20, **options):
        """Start a daemon in this process, by default with the blobs' directory as backend."""
        config = DaemonConfig(
            backend or LocalFsConfig(dir=image.blob_dir),
            work_dir or self.directory / "cache",
            rafs=RafsConfig(batch_size=amplify),
        )
        daemon = Daemon(config, image.bootstrap, self.mountpoint(), **options)
        self.stack.callback(daemon.stop)
        daemon.start()
        return daemon

    def child(self, code, *args):
        child = Child(code, *args)
        self.stack.callback(child.close)
        return child

    def snapshot(self, top, content=True):
        """Read a mounted tree in a child; check the number of links of every inode."""
        tree, nlinks = pickle.loads(self.child(_SNAPSHOT, top, content).finish(self.patience))
        wrong = {
            name: got
            for name, got in nlinks.items()
            if tree[name].links and got != len(tree[name].links)
        }
        assert wrong == {}
        return tree

    def read(self, path, offset=0, length=1 << 27):
        """Read in a child; raise its `OSError`."""
        status, out, err = self.child(_READ, path, offset, length).end()
        assert not err, err
        if status:
            raise OSError(status, os.strerror(status))
        return out

    def read_fails(self, path, offset=0, length=1 << 27):
        """Assert that a read gives EIO, without any data."""
        status, out, err = self.child(_READ, path, offset, length).end()
        assert (status, out, err) == (errno.EIO, b"", b"")

    def nydusd(self, *args, cwd=None, **environment):
        """Start `nydusd` as a process of its own, as a user would."""
        process = Nydusd([str(arg) for arg in args], cwd, environment)
        self.stack.callback(process.close)
        return process


class Nydusd:
    """A `nydusd` process; its errors go to a file, so that no pipe can fill."""

    def __init__(self, args, cwd, environment):
        self._errors = open(os.memfd_create("stderr"), "r+b")  # noqa: SIM115
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("nydusd"), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=cwd,
            env={**os.environ, **environment},
        )

    @property
    def stderr(self):
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), size, 0).decode()

    def wait_for(self, text):
        """Wait until a text appears in the log."""
        wait_until(lambda: text in self.stderr or self.process.poll() is not None)
        assert text in self.stderr, self.stderr

    def send(self, number):
        self.process.send_signal(number)

    def end(self):
        """Wait for the end and return the exit status."""
        status = self.process.wait(TIMEOUT)
        assert "Traceback" not in self.stderr, self.stderr
        return status

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(TIMEOUT)
        self.process.stdout.close()
        self._errors.close()


def unmount(path):
    """Unmount everything at a path; nothing is fine, too."""
    while subprocess.run(["umount", "-l", path], stderr=subprocess.DEVNULL).returncode == 0:
        pass


def wait_until(condition):
    """Return when `condition` holds; fail after `TIMEOUT` seconds."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def write_config(path, image, backend=None, work_dir=None):
    """Write a configuration of version 1 for `nydusd` and return its path."""
    backend = backend or {"type": "localfs", "config": {"dir": str(image.blob_dir)}}
    cache = {"type": "blobcache", "config": {"work_dir": str(work_dir or path.parent / "cache")}}
    path.write_text(json.dumps({"device": {"backend": backend, "cache": cache}, "mode": "direct"}))
    return path
