"""Reading through the kernel: cold, hot and complete, beside floors, plain mounts and FUSE."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from tests.bench.measure import fresh, take_turns, warm_memory
from tests.bench.report import OURS, Row
from tests.bench.rig import Image
from tests.bench.source import Settings

LATENCIES = (0, 5, 20)
STREAMS = (1, 4)
_SETTLE_SECONDS = 0.3
_COMPLETE_TURNS = 5


class DaemonBench:
    """Measures one image with a single large file; every cold read has a new work directory."""

    def __init__(self, settings: Settings, image: Image, digest: bytes, directory: Path) -> None:
        self._settings = settings
        self._image = image
        self._digest = digest.hex()
        self._directory = directory
        self._ranges: list[tuple[int, int]] = []
        image.fill()

    def rows(self) -> Iterator[Row]:
        """Measure everything that is read."""
        for latency in LATENCIES:
            for streams in STREAMS:
                yield self._sequential(latency, streams)
        for latency in LATENCIES[:2]:
            yield from self._random(latency)
        yield self._hot()
        yield self._complete()
        yield self._cached()

    def _variants(
        self, ours: Callable[[Path | None], float], **others: Callable[[], float]
    ) -> dict[str, Callable[[], float]]:
        variants: dict[str, Callable[[], float]] = {OURS: partial(ours, None), **others}
        if self._settings.daemon_peer is not None:
            variants["peer (FUSE)"] = partial(ours, self._settings.daemon_peer)
        return variants

    # Cold, front to back

    def _read_cold(self, latency: int, streams: int, peer: Path | None) -> float:
        with (
            fresh(self._directory, "cold") as work_dir,
            self._image.serve(peer, work_dir, latency),
        ):
            self._image.server.take_ranges()
            self._warm()
            (seconds,) = self._image.read("sequential", streams, 1, self._digest)
            ranges = self._image.server.take_ranges()
        if peer is None:
            self._ranges = ranges
        return seconds

    def _read_plain(self, streams: int, passes: int = 1) -> float:
        """Read the complete copy; the page cache has the copy, but nothing of the new mount."""
        with self._image.mount_plain():
            self._warm()
            return self._image.read("sequential", streams, passes, "-")[-1]

    def _fetch(self, latency: int, streams: int) -> float:
        self._warm()
        return self._image.floor(self._ranges, latency, streams)["total"]

    def _warm(self) -> None:
        """Have memory for what is read: it is in the data file and in the mount's own cache."""
        warm_memory(self._directory, 3 * self._settings.big_bytes)

    def _sequential(self, latency: int, streams: int) -> Row:
        variants = self._variants(
            partial(self._read_cold, latency, streams),
            floor=partial(self._fetch, latency, streams),
            ceiling=partial(self._read_plain, streams),
        )
        seconds = take_turns(variants, self._settings.rounds)
        size = self._settings.big_bytes
        speed = size / statistics.median(seconds[OURS]) / (1 << 20)
        fetched = sum(length for _, length in self._ranges)
        return Row(
            f"cold, {_streams(streams)}, {latency} ms",
            seconds,
            f"{size >> 20} MiB, {speed:.0f} MiB/s, {len(self._ranges)} requests"
            f" of {fetched / len(self._ranges) / 1024:.0f} KiB on average",
            {"bytes": size, "requests": len(self._ranges), "fetched_bytes": fetched},
        )

    # Cold, here and there

    def _read_random(self, latency: int, seed: int, peer: Path | None) -> list[float]:
        count = self._settings.big_bytes >> 20
        with (
            fresh(self._directory, "cold") as work_dir,
            self._image.serve(peer, work_dir, latency),
        ):
            self._image.server.take_ranges()
            self._warm()
            seconds = self._image.read("random", seed, count)
            ranges = self._image.server.take_ranges()
        if peer is None:
            self._ranges = ranges
        return seconds

    def _random(self, latency: int) -> Iterator[Row]:
        collected: dict[str, list[list[float]]] = {}
        for seed in range(self._settings.rounds):
            variants = self._variants(
                partial(self._read_random, latency, seed),
                floor=lambda: self._image.floor(self._ranges, latency, 1)["each"],
            )
            for name, measure in variants.items():
                collected.setdefault(name, []).append(measure())
        reads = len(collected[OURS][0])
        for percent in (50, 99):
            seconds = {
                name: [_percentile(values, percent) for values in rounds]
                for name, rounds in collected.items()
            }
            note = f"{reads} reads, {len(self._ranges)} requests" if percent == 99 else ""
            yield Row(f"cold random 4 KiB p{percent}, {latency} ms", seconds, note)

    # What is there

    def _read_hot(self, peer: Path | None) -> float:
        """Read what the first pass has left in the page cache of the mount."""
        with (
            fresh(self._directory, "cold") as work_dir,
            self._image.serve(peer, work_dir, 0),
        ):
            return self._image.read("sequential", 1, 2, "-")[-1]

    def _hot(self) -> Row:
        variants = self._variants(
            self._read_hot, **{"plain mount": partial(self._read_plain, 1, 2)}
        )
        return Row("hot, 1 stream", take_turns(variants, self._settings.rounds))

    def _read_complete(self) -> float:
        with self._image.serve(None, self._image.complete, 0):
            # A thread sets the ignore mark, soon after the mount.
            time.sleep(_SETTLE_SECONDS)
            self._warm()
            return self._image.read("sequential", 1, 1, "-")[-1]

    def _complete(self) -> Row:
        variants = {OURS: self._read_complete, "plain mount": partial(self._read_plain, 1)}
        # A read takes some milliseconds, and each by itself is half as long again or as short.
        seconds = take_turns(variants, _COMPLETE_TURNS * self._settings.rounds)
        return Row("complete blob, 1 stream", seconds, "first read of a new mount")

    def _read_page(self, mount: AbstractContextManager[object]) -> float:
        with mount:
            time.sleep(_SETTLE_SECONDS)
            return statistics.median(self._image.read("page", 10_000))

    def _cached(self) -> Row:
        """Read one page of the page cache again and again."""

        def ours(peer: Path | None) -> float:
            return self._read_page(self._image.serve(peer, self._image.complete, 0))

        variants = self._variants(
            ours, **{"plain mount": lambda: self._read_page(self._image.mount_plain())}
        )
        return Row("4 KiB from page cache", take_turns(variants, self._settings.rounds))


def start_row(settings: Settings, image: Image, directory: Path) -> Row:
    """Measure the time from the start of the process until the image is mounted."""
    image.fill()

    def ours(peer: Path | None) -> float:
        with fresh(directory, "cold") as work_dir, image.serve(peer, work_dir, 0) as daemon:
            return daemon.seconds

    def floor() -> float:
        with image.mount_plain() as program:
            return program.seconds

    variants = {OURS: partial(ours, None), "floor": floor}
    if settings.daemon_peer is not None:
        variants["peer (FUSE)"] = partial(ours, settings.daemon_peer)
    seconds = take_turns(variants, settings.rounds)
    return Row(
        "start until mounted", seconds, f"bootstrap of {image.bootstrap.stat().st_size >> 10} KiB"
    )


def _streams(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"


def _percentile(values: list[float], percent: int) -> float:
    """Return the smallest value that at least so many percent do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]
