"""Processes, signals and cleaning up: whatever happens, nothing of the demo stays behind.

What the demo shows is not here.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

__all__ = [
    "ROOT",
    "Cleanup",
    "DemoError",
    "Finished",
    "Processes",
    "Signals",
    "Stopped",
    "mounts_below",
    "remove_tree",
    "ticker",
]

# The checkout: `erofs`, `builder`, `fscache` and `tests` are importable from there.
ROOT = Path(__file__).resolve().parents[2]
KEPT_BYTES = 64 * 1024
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(Exception):
    """Why the demo cannot go on, in one line; `details` are lines that explain it."""

    def __init__(self, what: str, details: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.details = details


class Stopped(KeyboardInterrupt):
    """A signal asked the demo to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Signals:
    """Turns the first signal into `Stopped` in the main thread; later ones do nothing."""

    def __init__(self) -> None:
        self._holds = 0
        self._pending = 0

    def install(self) -> None:
        """Take over, except for signals that the caller had ignored, as `nohup` does."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._arrive)

    def ignore(self) -> None:
        """Let nothing interrupt what comes now."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        # Cleaning up begins here: a second Ctrl-C must not break it off.
        self.ignore()
        if self._holds:
            self._pending = number
        else:
            raise Stopped(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a signal wait until the block is done, so that what it makes is known."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._pending and not self._holds:
            raise Stopped(self._pending)


class Cleanup:
    """What has to be undone, in reverse order; a step that fails does not stop the others."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], str | None]] = []

    def add(self, step: Callable[[], str | None]) -> None:
        """Add a step, which returns what it had to leave behind, or None."""
        self._steps.append(step)

    def run(self) -> list[str]:
        """Run all steps and return what is left behind."""
        left = []
        while self._steps:
            step = self._steps.pop()
            try:
                text = step()
            except (OSError, DemoError) as error:
                text = str(error)
            if text is not None:
                left.append(text)
        return left


def mounts_below(path: Path) -> list[str]:
    """Return what is mounted at or below a directory."""
    top = os.fsencode(path.resolve())
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        place = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4])
        if place == top or place.startswith(top + b"/"):
            found.append(os.fsdecode(place))
    return found


def remove_tree(path: Path) -> str | None:
    """Remove a directory; never reach into something that is mounted below it."""
    mounts = mounts_below(path)
    if mounts:
        return f"{path} stays: {mounts[0]} is still mounted"
    shutil.rmtree(path)
    return None


class _Ticker:
    """Shows on a terminal how long something takes; silent everywhere else."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._shown = -1
        self._enabled = sys.stderr.isatty()

    def tick(self) -> None:
        """Show the seconds since the start, when they changed."""
        seconds = int(time.monotonic() - self._begin)
        if self._enabled and seconds > max(0, self._shown):
            self._shown = seconds
            sys.stderr.write(f"\r   ... {seconds} s\033[K")
            sys.stderr.flush()

    def end(self) -> None:
        """Take the line away."""
        if self._shown > 0:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


@contextmanager
def ticker() -> Iterator[Callable[[], None]]:
    """Give a function that shows the elapsed time when it is called now and then."""
    line = _Ticker()
    try:
        yield line.tick
    finally:
        line.end()


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended; `first_output` and `end` are moments of `time.monotonic()`."""

    status: int
    stdout: str
    stderr: str
    begin: float
    end: float
    first_output: float | None

    @property
    def seconds(self) -> float:
        """How long the command ran."""
        return self.end - self.begin

    @property
    def last_errors(self) -> list[str]:
        """The last lines of its standard error."""
        return [line for line in self.stderr.splitlines() if line.strip()][-6:]


class Processes:
    """Starts commands, each in a session of its own: who gets Ctrl-C is decided here."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._running: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        command: Sequence[str],
        *,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
        env: dict[str, str] | None = None,
        registered: Callable[[subprocess.Popen[bytes]], None] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command; `registered` takes it over, otherwise `end_all` ends it."""
        with self._signals.held():
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    env=env,
                    cwd=ROOT,
                    start_new_session=True,
                )
            except OSError as error:
                raise DemoError(f"{command[0]} cannot be started: {error.strerror}") from error
            (registered or self._running.append)(process)
        return process

    def run(
        self, command: Sequence[str], *, timeout: float, env: dict[str, str] | None = None
    ) -> Finished:
        """Run a command to its end; raise `DemoError` when it takes too long."""
        begin = time.monotonic()
        pipe = subprocess.PIPE
        process = self.start(command, stdout=pipe, stderr=pipe, env=env)
        try:
            out, err, first = self._drain(process, begin + timeout, command[0])
        finally:
            self._end(process)
        return Finished(
            process.returncode,
            out.decode(errors="replace"),
            err.decode(errors="replace"),
            begin,
            time.monotonic(),
            first,
        )

    def _drain(
        self, process: subprocess.Popen[bytes], deadline: float, name: str
    ) -> tuple[bytes, bytes, float | None]:
        kept = {"stdout": b"", "stderr": b""}
        first: float | None = None
        with selectors.DefaultSelector() as selector, ticker() as tick:
            for key in kept:
                selector.register(getattr(process, key), selectors.EVENT_READ, key)
            while selector.get_map():
                for ready, _ in selector.select(POLL_SECONDS):
                    data = os.read(ready.fd, KEPT_BYTES)
                    if not data:
                        selector.unregister(ready.fileobj)
                    elif first is None and ready.data == "stdout":
                        first = time.monotonic()
                    kept[ready.data] = (kept[ready.data] + data)[-KEPT_BYTES:]
                tick()
                if time.monotonic() > deadline:
                    raise DemoError(f"{Path(name).name} did not end in time")
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise DemoError(f"{Path(name).name} did not end in time") from error
        return kept["stdout"], kept["stderr"], first

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End a process and its children, if it still runs."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE_SECONDS)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        if process.poll() is not None and process in self._running:
            self._running.remove(process)

    def end_all(self) -> str | None:
        """End what still runs; return what would not end."""
        for process in list(self._running):
            self._end(process)
        return ", ".join(f"process {process.pid} does not end" for process in self._running) or None
