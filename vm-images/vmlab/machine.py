"""A running guest: run commands in it, and be told when it dies."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from vmlab import frames
from vmlab.errors import GuestDied, GuestTimeout, LabError

__all__ = ["SCRATCH", "Guest", "Result", "guest_environment", "host_path"]

# The ext4 disk of each guest, for caches; empty at first, and gone with the guest.
SCRATCH = Path("/scratch")
_PASSED = ("PATH", "HOME", "LANG", "LC_ALL", "TERM", "CI")
_PASSED_PREFIXES = ("NYDUS_", "HYPOTHESIS_")
_CONSOLE_LINES = 20
_END_SECONDS = 10
_PANIC = "Kernel panic - not syncing: "


class Result(NamedTuple):
    """What a command did: its status, negative for the signal that ended it, and its output."""

    status: int
    stdout: bytes
    stderr: bytes


def host_path(path: Path) -> Path:
    """Return where a guest sees a path of the host that its own /tmp, /run or /dev covers."""
    return Path("/host") / path.absolute().relative_to("/")


def guest_environment(kernel: str) -> dict[str, str]:
    """Return the environment of commands: what of this process's own makes sense in a guest."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED or name.startswith(_PASSED_PREFIXES)
    }
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        **passed,
        "TMPDIR": "/var/tmp",  # noqa: S108 - the guest's own, on its scratch disk
        "PYTHONDONTWRITEBYTECODE": "1",
        "NYDUS_VM_KERNEL": kernel,
    }


class Guest:
    """A booted guest; `booting.boot` makes it, and `close` or the end of a `with` kills it."""

    def __init__(
        self,
        kernel: str,
        process: subprocess.Popen[bytes],
        port: socket.socket,
        directory: Path,
    ) -> None:
        self.kernel = kernel
        self.release = ""
        self.port = port
        self._process = process
        self._directory = directory
        self._resources = contextlib.ExitStack()
        self._decoder = frames.Decoder()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the guest and remove what it had; nothing of it is kept."""
        self._resources.close()

    def kill(self) -> None:
        """End the guest at once, from any thread; whoever waits for it gets `GuestDied`."""
        self._process.kill()

    def console(self) -> str:
        """Return what the kernel has said so far: warnings, errors, and how it ended."""
        with contextlib.suppress(FileNotFoundError):
            return (self._directory / "console").read_bytes().decode(errors="replace")
        return ""

    def own(self, resources: contextlib.ExitStack) -> None:
        """Take over what `close` has to undo."""
        self._resources = resources

    def wait_ready(self, seconds: float) -> None:
        """Wait for the agent; raises as `receive` does."""
        for kind, payload in self.receive(seconds, "booting"):
            if kind == frames.READY:
                self.release = payload["release"]
                return

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        seconds: float | None = 600,
        stdout: Callable[[bytes], object] | None = None,
        stderr: Callable[[bytes], object] | None = None,
    ) -> Result:
        """Run a command in the guest, and return its status and output.

        Processes that it leaves behind go on, but what they write later is lost.

        Args:
            argv: the program, looked up in the guest's PATH, and its arguments.
            env: added to `guest_environment`.
            cwd: where it runs; as a rule where this process is.
            seconds: how long it may take; the guest is killed then.
            stdout: gets each piece of output at once, which is then not in the result.
            stderr: as `stdout`.

        Raises:
            GuestDied, GuestTimeout: the guest ended first; it cannot be used any more.
        """
        self.send_run(argv, env, cwd, None)
        collected = {frames.STDOUT: bytearray(), frames.STDERR: bytearray()}
        sinks = {
            frames.STDOUT: stdout or collected[frames.STDOUT].extend,
            frames.STDERR: stderr or collected[frames.STDERR].extend,
        }
        for kind, payload in self.receive(seconds, " ".join(map(str, argv))):
            if kind in sinks:
                sinks[kind](payload)
            elif kind == frames.EXIT:
                status = payload["status"]
                break
        return Result(status, *(bytes(each) for each in collected.values()))

    def send_run(
        self,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None,
        cwd: Path | None,
        terminal: tuple[int, int] | None,
    ) -> None:
        """Start a command; `terminal` is the rows and columns of one for it."""
        request = {
            "argv": [os.fspath(word) for word in argv],
            "env": {**guest_environment(self.kernel), **(env or {})},
            "cwd": os.fspath(cwd or Path.cwd()),
            "tty": terminal,
        }
        self.send(frames.RUN, request)

    def send(self, kind: int, payload: Any) -> None:
        """Send a frame to the agent; raise `GuestDied` when there is none any more."""
        try:
            self.port.sendall(frames.pack(kind, payload))
        except OSError as error:
            raise self._died() from error

    def receive(self, seconds: float | None, what: str) -> Iterator[tuple[int, Any]]:
        """Yield the agent's frames, without end.

        Raises:
            GuestTimeout: `seconds` went by; `what` was going on. The guest is killed.
            GuestDied: the kernel panicked, or QEMU ended.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.001)
            self.port.settimeout(left)
            try:
                data = self.port.recv(1 << 16)
            except TimeoutError:
                tail = self._tail()
                self.close()
                raise GuestTimeout(f"{what} took longer than {seconds:g} s", tail) from None
            except ConnectionError:
                data = b""
            if not data:
                raise self._died()
            try:
                yield from self._decoder.feed(data)
            except ValueError as error:
                raise LabError(f"the agent in the guest: {error}") from error

    def _tail(self) -> str:
        """Return the console's last lines; of a panic, what led to it rather than its registers."""
        lines = self.console().splitlines()
        ends = [number for number, line in enumerate(lines, start=1) if _PANIC in line]
        end = ends[0] if ends else len(lines)
        return "\n".join(lines[max(end - _CONSOLE_LINES, 0) : end])

    def _died(self) -> GuestDied:
        """Return why the guest is gone; close it."""
        try:
            status = str(self._process.wait(_END_SECONDS))
        except subprocess.TimeoutExpired:
            status = "unknown"
        console, tail = self.console(), self._tail()
        said = (self._directory / "qemu.log").read_text(errors="replace").strip()
        self.close()
        panics = [line.split(_PANIC)[1] for line in console.splitlines() if _PANIC in line]
        if panics:
            return GuestDied(f"kernel panic in the guest: {panics[0].strip()}", tail)
        return GuestDied(f"QEMU ended with status {status}: {said or 'without a word'}", tail)
