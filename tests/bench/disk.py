"""Hash trees and exported disks, beside digests of the same blocks on all cores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.bench.builderinputs import image_command
from tests.bench.measure import Turns, Usage, child, fresh, run, take_turns
from tests.bench.report import OURS, Row
from tests.bench.source import Settings

_TARFS_BLOCK = 512
_BLOCKS = (4096, _TARFS_BLOCK)


class DiskBench:
    """Measures over one tar: its bytes as data, and as a tarfs image."""

    def __init__(self, settings: Settings, tar: Path, directory: Path) -> None:
        self._settings = settings
        self._tar = tar
        self._directory = directory
        self._log = directory / "disk.log"

    def _tree(self, block_size: int) -> float:
        with fresh(self._directory, "out") as out:
            command = child("hash_tree", self._tar, block_size, out / "disk")
            return float(run(command, self._log).output)

    def _floor(self, block_size: int) -> float:
        return float(run(child("floor_disk", self._tar, block_size, "-"), self._log).output)

    def _index(self) -> Path:
        """Make tarfs metadata; return its path, with the tar beside it under its id."""
        bootstrap, report = self._directory / "boot", self._directory / "report.json"
        run(
            [*image_command(), "create", "--log-level", "warn", "-t", "tar-tarfs",
             "-B", str(bootstrap), "-D", str(self._directory), "-J", str(report), str(self._tar)],
            self._log,
        )  # fmt: skip
        (blob_id,) = json.loads(report.read_text())["blobs"]
        (self._directory / blob_id).symlink_to(self._tar)
        return bootstrap

    def _export(self, command: list[str], bootstrap: Path) -> Usage:
        with fresh(self._directory, "out") as out:
            return run(
                [*command, "export", "--log-level", "warn", "--block", "--verity",
                 "-B", str(bootstrap), "-D", str(self._directory), "-O", str(out / "disk")],
                self._log,
            )  # fmt: skip

    def _copy(self) -> Usage:
        with fresh(self._directory, "out") as out:
            return run(child("floor_disk", self._tar, _TARFS_BLOCK, out / "disk"), self._log)

    def rows(self) -> Iterator[Row]:
        """Measure a tree of each block size, and an export with one."""
        for block_size in _BLOCKS:
            name = f"hash tree, {block_size} bytes"
            if self._settings.wants(name):
                yield self._hash_tree(name, block_size)
        name = "export --block --verity, tarfs"
        if self._settings.wants(name):
            yield self._exported(name)

    def _hash_tree(self, name: str, block_size: int) -> Row:
        size = self._tar.stat().st_size
        variants = {
            OURS: partial(self._tree, block_size),
            "floor": partial(self._floor, block_size),
        }
        seconds = take_turns(variants, self._settings.rounds)
        note = f"{size >> 20} MiB, {size / min(seconds[OURS]) / (1 << 20):.0f} MiB/s at best"
        return Row(name, seconds, note, {"bytes": size})

    def _exported(self, name: str) -> Row:
        size, bootstrap = self._tar.stat().st_size, self._index()
        programs: dict[str, Callable[[], Usage]] = {
            OURS: partial(self._export, image_command(), bootstrap),
            "floor": self._copy,
        }
        bars = {}
        if self._settings.image_peer is not None:
            peer = image_command(self._settings.image_peer)
            programs["peer"] = partial(self._export, peer, bootstrap)
            bars["peer"] = 1.3
        turns = Turns(self._settings.rounds)
        turns.take(programs)
        return Row(
            name,
            turns.seconds,
            f"{size >> 20} MiB",
            {"bytes": size},
            turns.cpu_seconds,
            turns.peak_bytes,
            bars,
        )
