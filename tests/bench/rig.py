"""Daemons, mounts and the blob server as processes that are gone when their block ends."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from erofs import open_bootstrap
from tests.bench.measure import BenchError, child, module, run, started
from tests.bench.source import BIG_NAME

_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.001
_START_SECONDS = 60.0


class Server:
    """The blob server in its own process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.port = int(process.stdout.readline())

    @classmethod
    @contextmanager
    def run(cls, directories: Sequence[Path]) -> Iterator[Server]:
        """Serve the blobs of the directories until the end of the block."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with started(child("server", *directories), **pipes) as process:
            yield cls(process)

    def take_ranges(self) -> list[tuple[int, int]]:
        """Return (offset, length) of the requests since the last call."""
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Daemon(NamedTuple):
    """A running program that has mounted; `seconds` is how long that took from its start."""

    pid: int
    seconds: float


def _device(path: Path) -> int:
    return path.stat().st_dev


@contextmanager
def mounted(command: Sequence[str], mountpoint: Path, log: Path) -> Iterator[Daemon]:
    """Run a program that mounts, and end both."""
    before = _device(mountpoint)
    with log.open("wb") as output:
        start = time.monotonic()
        try:
            with started(command, stdout=output, stderr=output) as process:
                try:
                    while _device(mountpoint) == before:
                        late = time.monotonic() - start > _START_SECONDS
                        if late or process.poll() is not None:
                            text = log.read_text(errors="replace")[-2000:]
                            raise BenchError(f"{' '.join(command)}: no mount\n{text}")
                        time.sleep(_POLL_SECONDS)
                    yield Daemon(process.pid, time.monotonic() - start)
                finally:
                    process.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_STOP_SECONDS)
        finally:
            # What a plain mount, or a killed daemon, has left.
            if _device(mountpoint) != before:
                subprocess.run(["umount", "-l", str(mountpoint)], check=True)


class Image:
    """A bootstrap, its one blob at a server, and a complete copy of the data."""

    def __init__(self, bootstrap: Path, blob_id: str, directory: Path, server: Server) -> None:
        self.bootstrap = bootstrap
        self.blob_id = blob_id
        self.server = server
        self.complete = directory / "complete"
        self._directory = directory
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir()
        self._log = directory / "mount.log"

    def write_config(
        self, work_dir: Path, latency: int, rafs: Mapping[str, object] | None = None
    ) -> Path:
        """Write a configuration that both daemons take, with more keys of `rafs` if need be."""
        path = self._directory / "config.json"
        backend = {"addr": f"http://127.0.0.1:{self.server.port}", "path": f"/{latency}"}
        content = {
            "version": 2,
            "backend": {"type": "http-proxy", "http-proxy": backend},
            "cache": {
                "type": "blobcache",
                "validate": True,
                "filecache": {"work_dir": str(work_dir)},
            },
            "rafs": {"mode": "direct", **(rafs or {})},
        }
        path.write_text(json.dumps(content))
        return path

    def serve(
        self,
        peer: Path | None,
        work_dir: Path,
        latency: int,
        *options: str,
        rafs: Mapping[str, object] | None = None,
    ) -> AbstractContextManager[Daemon]:
        """Serve with our daemon, or with the peer through FUSE; see `mounted`."""
        config = self.write_config(work_dir, latency, rafs)
        words = ["-C", config, "-B", self.bootstrap, "-M", self.mountpoint, "-l", "warn"]
        # A limit of this machine may be lower than what both would set.
        words += ["--rlimit-nofile", "0"]
        program = module("fscache") if peer is None else [str(peer)]
        command = [*program, "fuse", *map(str, words), *options]
        return mounted(command, self.mountpoint, self._log)

    def has(self, name: bytes) -> bool:
        """Return whether a file is in the image."""
        with open_bootstrap(self.bootstrap) as image:
            return image.lookup(name) is not None

    def mount_plain(self) -> AbstractContextManager[Daemon]:
        """Mount the complete copy by the kernel alone; see `mounted`."""
        data = self.complete / f"{self.blob_id}.blob.data"
        command = child("plain_mount", self.bootstrap, self.mountpoint, data)
        return mounted(command, self.mountpoint, self._log)

    def fill(self) -> None:
        """Make the complete copy."""
        with self.serve(None, self.complete, 0, "--eager"):
            pass
        self.server.take_ranges()

    def read(self, *arguments: object) -> list[float]:
        """Run a reader of `children.reader` on what is mounted and return what it prints."""
        words = [str(argument) for argument in arguments]
        words[1:1] = [str(self.mountpoint / BIG_NAME)]
        usage = run(child("reader", *words), self._directory / "reader.log")
        return json.loads(usage.output)

    def floor(self, ranges: list[tuple[int, int]], latency: int, streams: int) -> dict:
        """Fetch the ranges by the floor's loop; return its seconds."""
        target, listed = self._directory / "floor.data", self._directory / "ranges.json"
        listed.write_text(json.dumps(ranges))
        command = child(
            "floor_fetch", self.bootstrap, self.server.port, f"/{latency}/{self.blob_id}",
            listed, target, streams,
        )  # fmt: skip
        try:
            usage = run(command, self._directory / "floor.log")
        finally:
            target.unlink(missing_ok=True)
        self.server.take_ranges()
        return json.loads(usage.output)
