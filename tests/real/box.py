"""A box for programs that start others, mount and listen: nothing of it outlives the box.

It has mount, process and network name spaces of its own. Mounts are not seen outside, ports
are free and lead nowhere but to loopback, /run is empty, and the end of the first process
ends all others, also when the test run itself is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["Box", "BoxError", "wait_for"]

_INIT = Path(__file__).with_name("boxinit.py")
_SPACES = ("--mount", "--pid", "--net")
END_SECONDS = 90.0
POLL_SECONDS = 0.05


class BoxError(Exception):
    """Something in the box did not happen; says what, and shows the end of its log."""


def wait_for(what: str, seconds: float, ready: Callable[[], bool]) -> None:
    """Return once `ready` says so; raise `BoxError` after that many seconds."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise BoxError(f"{what}: not within {seconds:.0f} s")
        time.sleep(POLL_SECONDS)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        # The name in parentheses may hold anything.
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return int(stat.rpartition(")")[2].split()[1])
    return None


def _child(pid: int) -> int | None:
    return next((other for other in _processes() if _parent(other) == pid), None)


class Program:
    """A program that runs in the box; its output goes to a log file."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    def check(self) -> None:
        """Raise `BoxError` when it has ended."""
        status = self._process.poll()
        if status is not None:
            raise BoxError(f"{self.name} ended with status {status}\n{self.log_end()}")

    def log_end(self, size: int = 4000) -> str:
        """Return the last characters of its log."""
        return self.log.read_text(errors="replace")[-size:]

    def _send(self, number: signal.Signals) -> None:
        # What we started is nsenter, which waits for its one child.
        pid = _child(self._process.pid)
        if pid is not None:
            os.kill(pid, number)

    def pause(self) -> None:
        """Stop it: whoever is connected to it waits."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._send(signal.SIGCONT)
        # It stops itself when its child is stopped.
        self._process.send_signal(signal.SIGCONT)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to it, not to what it has started, and wait until it is gone."""
        self._send(number)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BoxError(f"{self.name} does not end\n{self.log_end()}") from error


class Box:
    """Name spaces with their first process; `close` ends everything in them.

    Args:
        root: where logs go.
        env: the whole environment of programs in the box.
    """

    def __init__(self, root: Path, env: dict[str, str]) -> None:
        self._root = root
        self._env = env
        self._started: list[subprocess.Popen[bytes]] = []
        self._first = subprocess.Popen(
            ["unshare", *_SPACES, "--fork", "--kill-child", "--mount-proc",
             sys.executable, "-I", str(_INIT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        pid = _child(self._first.pid) if self._first.stdout.readline() == b"ready\n" else None
        if pid is None:
            self.close()
            raise BoxError("the name spaces of the box could not be made")
        self._pid = pid
        self._space = os.readlink(f"/proc/{pid}/ns/pid")

    def _inside(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--target={self._pid}", *_SPACES, "--", *map(str, command)]

    def start(self, name: str, command: Sequence[str]) -> Program:
        """Start a program; its output is added to `<root>/<name>.log`."""
        log = self._root / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                self._inside(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=self._env,
            )  # fmt: skip
        self._started.append(process)
        return Program(name, process, log)

    def run(self, *command: object, seconds: float = 180.0) -> str:
        """Run a program to its end and return what it prints; raise `BoxError` if it fails."""
        words = [str(word) for word in command]
        try:
            done = subprocess.run(
                self._inside(words), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", env=self._env, timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise BoxError(f"{' '.join(words)}: not done after {seconds:.0f} s") from error
        if done.returncode:
            text = (done.stdout + done.stderr)[-4000:]
            raise BoxError(f"{' '.join(words)}: status {done.returncode}\n{text}")
        return done.stdout

    def processes(self) -> dict[int, list[str]]:
        """Return the arguments of all processes in the box, by their numbers outside."""
        found = {}
        for pid in _processes():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == self._space:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    found[pid] = [os.fsdecode(word) for word in words[:-1]]
        return found

    @property
    def top(self) -> Path:
        """The root directory as the box sees it."""
        return Path(f"/proc/{self._pid}/root")

    def mounts(self) -> list[str]:
        """Return the lines of the box's mount table."""
        return Path(f"/proc/{self._pid}/mounts").read_text().splitlines()

    def close(self) -> None:
        """End all processes in the box; its mounts and ports go with them."""
        self._first.stdin.close()
        self._first.stdout.close()
        for process in self._started:
            # One that is stopped would never see that its child is gone.
            process.send_signal(signal.SIGCONT)
        try:
            for process in (self._first, *self._started):
                process.wait(END_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BoxError("processes in the box do not end") from error
