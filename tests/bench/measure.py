"""Running programs and taking turns: what every measurement here is made of."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MODULES = "tests.bench.children."


class BenchError(Exception):
    """A program that is measured or that measures has failed."""


class Usage(NamedTuple):
    """What one run of a program took, by the clock and of all cores together.

    `peak_bytes` is the largest resident set of the process itself.
    """

    seconds: float
    peak_bytes: int
    output: bytes
    cpu_seconds: float = 0.0


def module(name: str, *arguments: object) -> list[str]:
    """Return the command that runs a Python module of this checkout."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def child(name: str, *arguments: object) -> list[str]:
    """Return the command that runs one of the programs in `tests.bench.children`."""
    return module(MODULES + name, *arguments)


class Interrupts:
    """Turns signals into `KeyboardInterrupt`, once, and not while something is being started."""

    _signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._held = False
        self._pending = False

    def take(self) -> None:
        """Take over the signals; what follows the first one is the clean-up, so it is the last."""
        for number in self._signals:
            signal.signal(number, self._arrived)

    def _arrived(self, number: int, frame: object) -> None:
        for each in self._signals:
            signal.signal(each, signal.SIG_IGN)
        self._pending = self._held
        if not self._held:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a signal wait until the end of the block; the caller's clean-up is outside of it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt


INTERRUPTS = Interrupts()


@contextmanager
def started(command: Sequence[str], **pipes: object) -> Iterator[subprocess.Popen[bytes]]:
    """Give a running program; it is killed when it still runs at the end of the block."""
    process: subprocess.Popen[bytes] | None = None
    try:
        with INTERRUPTS.held():
            # Ctrl-C is for the bench, which then ends its children in order.
            process = subprocess.Popen(command, cwd=ROOT, process_group=0, **pipes)
        yield process
    finally:
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


class _PeakWatch:
    """Looks at the largest resident set of a process while it runs.

    The kernel's own account (`ru_maxrss`) begins with the size of the process that forked.
    """

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_bytes = 0
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            # A process that has ended has no such line.
            for line in self._status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.peak_bytes = int(line.split()[1]) * 1024

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def run(command: Sequence[str], log: Path, source: IO[bytes] | None = None) -> Usage:
    """Run a program to its end; its errors go to `log`, its input comes from `source`."""
    before = _children_seconds()
    with log.open("wb") as errors:
        start = time.monotonic()
        with started(command, stdin=source, stdout=subprocess.PIPE, stderr=errors) as process:
            watch = _PeakWatch(process.pid)
            try:
                output = process.stdout.read()
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                seconds = time.monotonic() - start
            finally:
                # Before the process id can be somebody else's.
                watch.stop()
            process.wait()
    if process.returncode:
        text = log.read_text(errors="replace")[-2000:]
        raise BenchError(f"{' '.join(command)}: exit status {process.returncode}\n{text}")
    return Usage(seconds, watch.peak_bytes, output, _children_seconds() - before)


def run_fed(source: Sequence[str], command: Sequence[str], log: Path) -> Usage:
    """Run a program whose input is what another one writes; only the second is measured."""
    with started(source, stdout=subprocess.PIPE) as feeder:
        # The other one is waited for later, so that its seconds do not count.
        return run(command, log, feeder.stdout)


def _children_seconds() -> float:
    """Return the seconds of all cores that ended children, and theirs, have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def fresh(parent: Path, name: str) -> Iterator[Path]:
    """Give an empty directory that is removed afterwards: nothing in it is cached."""
    directory = parent / name
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def warm_memory(directory: Path, size: int) -> None:
    """Have so many bytes of free memory that is really there, by a file that comes and goes.

    What a virtual machine has freed goes back to its host after seconds, and is got again by a
    fault for each page, which takes longer than to fetch, verify and write what comes there.
    """
    piece = bytes(1 << 20)
    path = directory / "memory"
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(0, size, len(piece)):
                file.write(piece)
    finally:
        path.unlink(missing_ok=True)


def take_turns(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure A B C A B C …: what disturbs the machine disturbs all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, measure in variants.items():
            seconds[name].append(measure())
    return seconds


class Turns:
    """Runs of programs side by side, with what each took.

    Args:
        rounds: how often each program runs; A B C A B C …
    """

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self.seconds: dict[str, list[float]] = {}
        self.cpu_seconds: dict[str, list[float]] = {}
        self.peak_bytes: dict[str, int] = {}

    def take(self, variants: Mapping[str, Callable[[], Usage]]) -> None:
        """Measure all variants in turns."""
        for _ in range(self._rounds):
            for name, measure in variants.items():
                usage = measure()
                self.seconds.setdefault(name, []).append(usage.seconds)
                self.cpu_seconds.setdefault(name, []).append(usage.cpu_seconds)
                self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), usage.peak_bytes)
