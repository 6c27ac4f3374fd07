"""Reads of one image through each channel of this kernel: run inside a guest of the lab.

Arguments: bootstrap, directory of its blob, rounds, channels. Prints JSON: for each channel, and
for complete files, the seconds of each measurement in each round. Daemons are forked off here: an
emulated processor takes many seconds to start Python. This process reads and does not serve.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fscache.backend import LocalFsConfig
from fscache.config import DaemonConfig
from fscache.daemon import Daemon, Transport
from fscache.mounts.mount import mount_erofs
from tests.bench.children.reader import read_all, scattered
from tests.bench.report import COMPLETE
from tests.bench.source import BIG_NAME

_SCRATCH = Path("/scratch/bench")
_CHUNK = 1 << 20


def _serve(daemon: Daemon, ready: int) -> None:
    """Serve until told to end; tell by a byte that the mount is there."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    daemon.start()
    os.write(ready, b"1")
    signal.sigwait({signal.SIGTERM})
    daemon.stop()


@contextmanager
def _forked(daemon: Daemon) -> Iterator[None]:
    """Have another process mount and serve during the block."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            _serve(daemon, theirs)
            status = 0
        except Exception:
            logging.exception("daemon failed")
        finally:
            os._exit(status)
    os.close(theirs)
    try:
        if not os.read(ours, 1):
            raise SystemExit("a daemon did not start")
        yield
    finally:
        os.close(ours)
        os.kill(pid, signal.SIGTERM)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise SystemExit("a daemon failed")


def _forget_pages() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


class _Guest:
    """One image below the scratch disk, its blob beside it."""

    def __init__(self, bootstrap: Path, blobs: Path) -> None:
        _SCRATCH.mkdir()
        self.bootstrap = Path(shutil.copy(bootstrap, _SCRATCH / "boot"))
        self.blobs = Path(shutil.copytree(blobs, _SCRATCH / "blobs"))
        self.complete = _SCRATCH / "complete"
        self.mountpoint = _SCRATCH / "mnt"
        self.mountpoint.mkdir()
        self.file = str(self.mountpoint / BIG_NAME)
        with _forked(self._daemon(Transport.EAGER, self.complete)):
            pass

    def _daemon(self, way: Transport, work_dir: Path) -> Daemon:
        config = DaemonConfig(LocalFsConfig(dir=self.blobs), work_dir)
        return Daemon(config, self.bootstrap, self.mountpoint, transport=way)

    @contextmanager
    def _plain(self) -> Iterator[None]:
        mount = mount_erofs(self.bootstrap, list(self.complete.glob("*.data")), self.mountpoint)
        try:
            yield
        finally:
            mount.unmount()

    def _median_page(self, seed: int) -> float:
        """Return how long one page at a random place takes."""
        count = Path(self.file).stat().st_size // _CHUNK
        seconds = sorted(scattered(self.file, str(seed), str(count)))
        return seconds[len(seconds) // 2]

    def _complete(self, seed: int) -> dict[str, float]:
        """Measure what is mounted and complete, on disk but not in memory; then in memory."""
        _forget_pages()
        first = read_all(self.file, 1)
        hot = read_all(self.file, 1)
        _forget_pages()
        return {"complete": first, "hot": hot, "page": self._median_page(seed)}

    def plain(self, seed: int) -> dict[str, float]:
        """Measure the kernel alone."""
        with self._plain():
            return self._complete(seed)

    def channel(self, way: Transport, seed: int) -> dict[str, float]:
        """Measure a channel from an empty cache on."""
        work_dir = _SCRATCH / "work"
        with _forked(self._daemon(way, work_dir)):
            cold = read_all(self.file, 1)
        with _forked(self._daemon(way, work_dir)):
            found = self._complete(seed)
        shutil.rmtree(work_dir)
        return {"cold": cold, **found}


def main() -> None:
    bootstrap, blobs, rounds, *ways = sys.argv[1:]
    # What nobody loads by looking for it.
    subprocess.run(["modprobe", "nbd"], check=True)
    guest = _Guest(Path(bootstrap), Path(blobs))
    variants: dict[str, Callable[[int], dict[str, float]]] = {
        way: lambda seed, way=way: guest.channel(Transport(way), seed) for way in ways
    }
    variants[COMPLETE] = guest.plain
    found: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
    for seed in range(int(rounds)):
        for name, measure in variants.items():
            for what, seconds in measure(seed).items():
                found[name].setdefault(what, []).append(seconds)
    print(json.dumps(found))


main()
