"""A root filesystem as containers use it: a program, the whole tree, and the daemon's memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.bench.measure import fresh, run, take_turns
from tests.bench.report import OURS, Row
from tests.bench.rig import Daemon, Image
from tests.bench.source import Settings

PEER = "peer (FUSE)"
PYTHON = b"usr/bin/python3"
_LATENCIES = (0, 20)
_PROGRAM = ["/usr/bin/python3", "-c", "import json,ssl,http.client"]
_RECORD = {"access_pattern": True}
_PREFETCH = {"prefetch": {"enable": True, "threads_count": 4}}


class TreeBench:
    """Measures an image of a Debian root filesystem; every cold run has a new work directory."""

    def __init__(self, settings: Settings, image: Image, directory: Path) -> None:
        self._settings = settings
        self._image = image
        self._directory = directory
        self._log = directory / "run.log"
        self._fetched: dict[str, list[tuple[int, int]]] = {}
        self._daemons: dict[str, Path | None] = {OURS: None}
        if settings.daemon_peer is not None:
            self._daemons[PEER] = settings.daemon_peer

    def rows(self) -> Iterator[Row]:
        """Measure a program and the whole tree, cold and hot, and memory."""
        if self._image.has(PYTHON):
            for latency in _LATENCIES:
                yield self._row(f"python3 imports, cold, {latency} ms", self._program, latency)
                yield from self._transfers(f"python3 imports, {latency} ms")
            yield self._listed(_LATENCIES[-1])
        yield self._row("tree through tar, cold, 0 ms", self._walk, 1)
        yield self._row("tree through tar, hot", self._walk, 2)
        yield from self._memory()

    def _row(self, name: str, measure: Callable[..., float], *words: object) -> Row:
        self._fetched.clear()
        variants = {who: partial(measure, who, path, *words) for who, path in self._daemons.items()}
        variants["plain mount"] = partial(self._plain, measure, *words)
        return Row(name, take_turns(variants, self._settings.rounds))

    def _plain(self, measure: Callable[..., float], *words: object) -> float:
        with self._image.mount_plain():
            return self._run() if measure == self._program else self._pass(int(str(words[0])))

    # A program

    def _run(self) -> float:
        command = ["chroot", str(self._image.mountpoint), *_PROGRAM]
        return run(command, self._log).seconds

    def _program(
        self, who: str, peer: Path | None, latency: int, options: tuple[str, ...] = ()
    ) -> float:
        rafs = _PREFETCH if options else {}
        with (
            fresh(self._directory, "cold") as work_dir,
            self._image.serve(peer, work_dir, latency, *options, rafs=rafs),
        ):
            if not options:
                self._image.server.take_ranges()
            seconds = self._run()
            ranges = self._image.server.take_ranges()
        self._fetched.setdefault(who, []).append((len(ranges), sum(size for _, size in ranges)))
        return seconds

    def _transfers(self, name: str) -> Iterator[Row]:
        for number, (what, unit) in enumerate((("requests", "requests"), ("bytes", "B"))):
            values = {
                who: [float(fetched[number]) for fetched in rounds]
                for who, rounds in self._fetched.items()
            }
            yield Row(f"{name}: {what}", values, unit=unit)

    def _listed(self, latency: int) -> Row:
        """Compare a run with a list of a recorded one with runs that have none."""
        with ExitStack() as stack:
            listed = self._record(stack, latency)
            options = ("--prefetch-files", str(listed))
            variants = {OURS: partial(self._program, "list", None, latency, options)}
            for who, path in self._daemons.items():
                variants["no list" if who == OURS else f"{who}, no list"] = partial(
                    self._program, who, path, latency
                )
            seconds = take_turns(variants, self._settings.rounds)
            count = len(listed.read_bytes().splitlines())
        return Row(f"python3 with a list, {latency} ms", seconds, f"{count} files in the list")

    def _record(self, stack: ExitStack, latency: int) -> Path:
        listed, sock = self._directory / "list", self._directory / "api.sock"
        work_dir = stack.enter_context(fresh(self._directory, "recorded"))
        with self._image.serve(None, work_dir, latency, "-A", str(sock), rafs=_RECORD):
            self._run()
            ctl = Path(sys.executable).with_name("nydusctl")
            run([str(ctl), "-S", str(sock), "prefetch-list", "-o", str(listed)], self._log)
        return listed

    # Everything

    def _pass(self, passes: int) -> float:
        for _ in range(passes):
            start = time.monotonic()
            # With /dev/null as its archive GNU tar reads nothing.
            with subprocess.Popen(
                ["tar", "-C", self._image.mountpoint, "-cf", "-", "."], stdout=subprocess.PIPE
            ) as tar:
                assert tar.stdout is not None
                while os.read(tar.stdout.fileno(), 1 << 20):
                    pass
            seconds = time.monotonic() - start
        return seconds

    def _walk(self, who: str, peer: Path | None, passes: int) -> float:
        with (
            fresh(self._directory, "cold") as work_dir,
            self._image.serve(peer, work_dir, 0),
        ):
            return self._pass(passes)

    # Memory

    def _memory(self) -> Iterator[Row]:
        """Compare what all processes of a daemon have for themselves, idle and at work."""
        idle: dict[str, list[float]] = {}
        loaded: dict[str, list[float]] = {}
        for _ in range(self._settings.rounds):
            for who, peer in self._daemons.items():
                with (
                    fresh(self._directory, "cold") as work_dir,
                    self._image.serve(peer, work_dir, 0) as daemon,
                ):
                    idle.setdefault(who, []).append(_memory(daemon))
                    self._pass(1)
                    loaded.setdefault(who, []).append(_memory(daemon))
        if len(self._daemons) > 1:
            yield Row("memory, idle", idle, unit="B")
            yield Row("memory after the whole tree", loaded, unit="B")


def _memory(daemon: Daemon) -> float:
    """Return the resident bytes of a daemon and of its holder, which is its child."""
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    resident = 0
    for pid in [str(daemon.pid), *children]:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                resident += int(line.split()[1]) * 1024
    return float(resident)
