"""Hash trees and exported disks, beside digests of the same blocks on all cores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.bench.builderinputs import image_command
from tests.bench.measure import child, fresh, run, take_turns
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
        self._peaks: dict[str, int] = {}

    def _tree(self, block_size: int) -> float:
        with fresh(self._directory, "out") as out:
            command = child("hash_tree", self._tar, block_size, out / "disk")
            return float(run(command, self._log).output)

    def _floor(self, block_size: int, copies: bool) -> float:
        with fresh(self._directory, "out") as out:
            target = out / "disk" if copies else "-"
            command = child("floor_disk", self._tar, block_size, target)
            usage = run(command, self._log)
        # The disk's row is about whole programs.
        return usage.seconds if copies else float(usage.output)

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

    def _export(self, command: list[str], bootstrap: Path, label: str) -> float:
        with fresh(self._directory, "out") as out:
            usage = run(
                [*command, "export", "--log-level", "warn", "--block", "--verity",
                 "-B", str(bootstrap), "-D", str(self._directory), "-O", str(out / "disk")],
                self._log,
            )  # fmt: skip
        self._peaks[label] = max(self._peaks.get(label, 0), usage.peak_bytes)
        return usage.seconds

    def rows(self) -> Iterator[Row]:
        """Measure a tree of each block size, and an export with one."""
        size, rounds = self._tar.stat().st_size, self._settings.rounds
        for block_size in _BLOCKS:
            variants = {
                OURS: partial(self._tree, block_size),
                "floor": partial(self._floor, block_size, False),
            }
            seconds = take_turns(variants, rounds)
            note = f"{size >> 20} MiB, {size / min(seconds[OURS]) / (1 << 20):.0f} MiB/s at best"
            yield Row(f"hash tree, {block_size} bytes", seconds, note, {"bytes": size})
        bootstrap = self._index()
        variants = {
            OURS: partial(self._export, image_command(), bootstrap, OURS),
            "floor": partial(self._floor, _TARFS_BLOCK, True),
        }
        if self._settings.image_peer is not None:
            peer = image_command(self._settings.image_peer)
            variants["peer"] = partial(self._export, peer, bootstrap, "peer")
        seconds = take_turns(variants, rounds)
        peaks = ", ".join(f"{name} {peak >> 20} MiB" for name, peak in self._peaks.items())
        yield Row(
            "export --block --verity, tarfs",
            seconds,
            f"{size >> 20} MiB, peak memory: {peaks}",
            {"bytes": size, **{f"peak_bytes_{name}": p for name, p in self._peaks.items()}},
        )
