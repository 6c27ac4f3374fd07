"""A mount namespace with a tmpfs: what is mounted in it is seen nowhere else and ends with it."""

import os
import subprocess
from pathlib import Path

TIMEOUT = 60
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class MountSpace:
    """Runs programs in the namespace; `top` is the tmpfs as they see it.

    Args:
        top: an empty directory, which also exists outside.
        programs: directory that comes first in their PATH.
    """

    def __init__(self, top: Path, programs: Path):
        self.top = top
        self.programs = programs
        self._first = subprocess.Popen(
            ["unshare", "--mount", "--propagation=slave", "sh", "-c",
             'mount -t tmpfs tmpfs "$0" && echo ready && read -r _', str(top)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._first.stdout.readline() == b"ready\n"
        self._proc = Path(f"/proc/{self._first.pid}")

    def seen(self, path) -> Path:
        """Return a path of the namespace as it is reached from outside."""
        return self._proc / "root" / str(path).removeprefix("/")

    def make(self, *names):
        """Make directories below `top`; return their paths in the namespace."""
        paths = [self.top / name for name in names]
        for path in paths:
            self.seen(path).mkdir(parents=True)
        return paths[0] if len(paths) == 1 else paths

    def run(self, *words, path=None):
        """Run a program to its end; words are text or bytes."""
        environment = {"PATH": f"{self.programs}:{PATH}" if path is None else path}
        enter = ["/usr/bin/nsenter", f"--mount={self._proc}/ns/mnt"]
        return subprocess.run(
            [*enter, "--", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )

    def overlays(self):
        """Return (mount point, options) of the overlays below `top`, as /proc/mounts says."""
        found = []
        for line in (self._proc / "mounts").read_bytes().splitlines():
            _, place, kind, options = line.split()[:4]
            if kind == b"overlay" and place.startswith(os.fsencode(self.top)):
                found.append((place, options.split(b",")))
        return found

    def close(self):
        self._first.stdin.close()
        self._first.stdout.close()
        self._first.wait(TIMEOUT)
