"""Run programs inside the mounted image by chroot, and tell when their first output came."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.demo.report import Printer
from tests.demo.run import DemoError, Finished, Processes

__all__ = ["Inside"]

TIMEOUT_SECONDS = 120.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What chroot says of a program that is not there, or that this machine cannot run.
_CANNOT_RUN = (126, 127)

PYTHON = (
    "python3",
    "-c",
    "import http.client, json, sys;"
    ' print(json.dumps({"python": sys.version.split()[0], "modules": len(sys.modules)}))',
)
GIT = ("git", "--version")
SHELL = ("/bin/sh", "-c", 'echo "hello from $0"')


class Inside:
    """Runs commands with a mounted image as their root.

    `first_output` is the moment of the first line that any of them printed.
    """

    def __init__(self, root: Path, processes: Processes, out: Printer) -> None:
        self._root = root
        self._processes = processes
        self._out = out
        self.first_output: float | None = None

    def run(self, program: Sequence[str]) -> Finished | None:
        """Run one command and show its output; return None when it is not in the image.

        Raises `DemoError` when it fails.
        """
        command = self._command(program)
        self._out.command(command)
        done = self._processes.run(
            command, timeout=TIMEOUT_SECONDS, env={"PATH": _PATH, "HOME": "/", "LC_ALL": "C.UTF-8"}
        )
        if done.status in _CANNOT_RUN:
            reason = done.last_errors[-1] if done.last_errors else f"status {done.status}"
            self._out.line(f"skipped: {reason}")
            return None
        if done.status != 0:
            raise DemoError(
                f"{program[0]} fails inside with status {done.status}", done.last_errors
            )
        if self.first_output is None:
            self.first_output = done.first_output
        for line in done.stdout.splitlines():
            self._out.line(line)
        return done

    def _command(self, program: Sequence[str]) -> list[str]:
        root = str(self._root)
        chroot = _tool("chroot")
        if os.path.lexists(self._root / "dev/null") or not (self._root / "dev").is_dir():
            return [chroot, root, *program]
        # Exported containers have an empty /dev, and git does not start without /dev/null.
        script = f'mount --bind /dev "$0/dev" && exec {chroot} "$0" "$@"'
        return [_tool("unshare"), "--mount", "/bin/sh", "-c", script, root, *program]


def _tool(name: str) -> str:
    path = shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + _PATH)
    if path is None:
        raise DemoError(f"{name} is not installed")
    return path
