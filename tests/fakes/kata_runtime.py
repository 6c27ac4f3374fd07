"""What Kata's runtimes do with the daemon that they start for a virtual machine."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from builder import BuildOptions, build
from fscache.cli.virtiofs import TREE

CHECKOUT = Path(__file__).resolve().parents[2]
SECONDS = 60


class Daemon:
    """A nydusd, asked as Kata does: one connection for each request, by hand.

    `before` are the words of a program that starts it.
    """

    def __init__(self, directory, *words, before=()):
        self.sock = directory / "nydusd-api.sock"
        self.log = directory / "nydusd.log"
        command = [*before, sys.executable, "-m", "fscache", *words, "--apisock", self.sock]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=CHECKOUT, stdout=log, stderr=log)

    def ask(self, method, target, body=None):
        """Send raw HTTP and return status, headers and body."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SECONDS)
            connection.connect(str(self.sock))
            connection.sendall(f"{head}Connection: close\r\n\r\n".encode() + data)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), head, body

    def wait(self):
        """Poll as Kata does until the daemon says that it runs."""
        for _ in range(SECONDS * 20):
            assert self.process.poll() is None, self.log.read_text()
            try:
                status, _, body = self.ask("GET", "/api/v1/daemon")
            except OSError:
                time.sleep(0.05)
                continue
            if status == 200 and json.loads(body)["state"] == "RUNNING":
                return json.loads(body)
        pytest.fail(f"does not run\n{self.log.read_text()}")

    def mount(self, place, body):
        """Mount an image or a directory, which has to be done without a word."""
        status, _, answer = self.ask("POST", f"/api/v1/mount?mountpoint={place}", body)
        assert (status, answer) == (204, b""), answer

    def umount(self, place):
        """Take a mount away."""
        status, _, answer = self.ask("DELETE", f"/api/v1/mount?mountpoint={place}")
        assert (status, answer) == (204, b""), answer

    def end(self):
        """End it in order, and return its status."""
        self.process.terminate()
        return self.process.wait(SECONDS)


class Exported(Daemon):
    """The daemon, and the tree that its guest would see."""

    def __init__(self, directory, *words, before=()):
        self.socket = directory / "vhost-fs.sock"
        super().__init__(
            directory,
            *("virtiofs", *words, "--log-level", "info", "--sock", self.socket),
            before=before,
        )

    @property
    def tree(self):
        """Where its namespace has the tree, for who is outside of it."""
        return Path(f"/proc/{self.process.pid}/root{TREE}")

    def virtiofsd(self):
        """Return the process id of its virtiofsd."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (child,) = children.read_text().split()
        return int(child)


def image_request(source, directory):
    """Build an image of a directory, and return the request to mount it."""
    blobs = directory / "blobs"
    blobs.mkdir()
    build(source, BuildOptions(bootstrap=directory / "image.boot", blob_dir=blobs))
    config = {
        "device": {
            "backend": {"type": "localfs", "config": {"dir": str(blobs)}},
            "cache": {"type": "blobcache", "config": {"work_dir": str(directory / "cache")}},
        },
        "mode": "direct",
    }
    return {
        "fs_type": "rafs",
        "source": str(directory / "image.boot"),
        "config": json.dumps(config),
    }


def passthrough_request(source):
    """Return the request to pass a directory through."""
    return {"fs_type": "passthrough_fs", "source": str(source), "config": ""}
