"""The same image and cache through FUSE, beside fanotify and complete files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from tests.bench.measure import fresh, take_turns
from tests.bench.report import OURS, Row
from tests.bench.rig import Image
from tests.bench.source import Settings

# Ours is the one that is looked at here.
_WAYS = {OURS: "fuse", "fanotify": "fanotify"}
_SETTLE_SECONDS = 0.3


class FuseBench:
    """Measures an image with a single large file, filled as `DaemonBench` does, and a tree."""

    def __init__(self, settings: Settings, big: Image, tree: Image, directory: Path) -> None:
        self._settings = settings
        self._big = big
        self._tree = tree
        self._directory = directory

    def rows(self) -> Iterator[Row]:
        """Measure reads, cold and hot, and a walk through a tree."""
        size = f"{self._settings.big_bytes >> 20} MiB"
        yield self._row("FUSE: cold, 1 stream, 0 ms", self._cold, size)
        yield self._row("FUSE: hot, 1 stream", self._hot, "", partial(self._plain, 2))
        yield self._row(
            "FUSE: complete blob, 1 stream",
            self._complete,
            "first read of a new mount",
            partial(self._plain, 1),
        )
        yield self._row("FUSE: walk and stat, first", partial(self._walk, 1), "of a new mount")
        yield self._row("FUSE: walk and stat, again", partial(self._walk, 2))

    def _row(self, name, measure, note="", plain=None) -> Row:
        variants = {name: partial(measure, way) for name, way in _WAYS.items()}
        if plain is not None:
            variants["plain mount"] = plain
        return Row(name, take_turns(variants, self._settings.rounds), note)

    def _serve(self, image: Image, work_dir: Path, way: str) -> AbstractContextManager[float]:
        return image.serve(None, work_dir, 0, "--transport", way)

    def _cold(self, way: str) -> float:
        with fresh(self._directory, "cold") as work_dir, self._serve(self._big, work_dir, way):
            (seconds,) = self._big.read("sequential", 1, 1, "-")
        return seconds

    def _hot(self, way: str) -> float:
        with self._serve(self._big, self._big.complete, way):
            return self._big.read("sequential", 1, 2, "-")[-1]

    def _complete(self, way: str) -> float:
        with self._serve(self._big, self._big.complete, way):
            time.sleep(_SETTLE_SECONDS)
            return self._big.read("sequential", 1, 1, "-")[-1]

    def _plain(self, passes: int) -> float:
        with self._big.mount_plain():
            return self._big.read("sequential", 1, passes, "-")[-1]

    def _walk(self, passes: int, way: str) -> float:
        with fresh(self._directory, "cold") as work_dir, self._serve(self._tree, work_dir, way):
            return self._tree.read("walk", passes)[-1]
