"""Work on bootstraps alone: merge, check, open with one lookup."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from erofs import open_bootstrap
from tests.bench.create import image_command
from tests.bench.measure import child, fresh, run, take_turns
from tests.bench.report import OURS, Row
from tests.bench.source import Settings, pack_layers

_LOOKUPS = 300
_BLOCK = 4096


class MetadataBench:
    """Builds the layers of a tar, then measures what is done with their bootstraps."""

    def __init__(self, settings: Settings, tar: Path, directory: Path) -> None:
        self._settings = settings
        self._directory = directory
        self._log = directory / "metadata.log"
        self._layers = [self._layer(path) for path in pack_layers(tar, directory)]
        self._merged = directory / "merged.boot"
        self._merge(image_command(), self._merged)

    def _layer(self, tar: Path) -> Path:
        """Build a layer; its bootstrap is named like its blob, which merge goes by."""
        report, bootstrap = tar.with_suffix(".json"), tar.with_suffix(".boot")
        run(
            [*image_command(), "create", "--log-level", "warn", "-t", "tar-rafs",
             "-B", str(bootstrap), "-D", str(self._directory), "-J", str(report), str(tar)],
            self._log,
        )  # fmt: skip
        tar.unlink()
        (blob_id,) = json.loads(report.read_text())["blobs"]
        (self._directory / blob_id).unlink()
        layers = self._directory / "layers"
        layers.mkdir(exist_ok=True)
        return bootstrap.rename(layers / blob_id)

    def _merge(self, command: list[str], target: Path) -> float:
        sources = map(str, self._layers)
        words = [*command, "merge", "--log-level", "warn", "--bootstrap", str(target), *sources]
        return run(words, self._log).seconds

    def _check(self, command: list[str]) -> float:
        words = [*command, "check", "--log-level", "warn", "--bootstrap", str(self._merged)]
        return run(words, self._log).seconds

    def _into_fresh(self, command: list[str]) -> float:
        with fresh(self._directory, "out") as out:
            return self._merge(command, out / "boot")

    def _floor(self, writes: bool) -> float:
        with fresh(self._directory, "out") as out:
            target = out / "boot" if writes else "-"
            sources = self._layers if writes else [self._merged]
            size = self._merged.stat().st_size
            return run(child("floor_files", target, size, *sources), self._log).seconds

    def rows(self) -> Iterator[Row]:
        """Measure merge, check, and open with a lookup."""
        with open_bootstrap(self._merged) as image:
            names = sum(1 for _ in image.walk())
            path = max((path for path, _ in image.walk()), key=lambda path: path.count(b"/"))
        note = f"{names} names, bootstrap of {self._merged.stat().st_size >> 10} KiB"
        peer = self._settings.image_peer
        rounds = self._settings.rounds
        merge = {
            OURS: partial(self._into_fresh, image_command()),
            "floor": partial(self._floor, True),
        }
        check = {
            OURS: partial(self._check, image_command()),
            "floor": partial(self._floor, False),
        }
        if peer is not None:
            merge["peer"] = partial(self._into_fresh, image_command(peer))
            check["peer"] = partial(self._check, image_command(peer))
        yield Row(
            f"merge {len(self._layers)} layers", take_turns(merge, rounds), note, {"names": names}
        )
        yield Row("check", take_turns(check, rounds), note, {"names": names})
        lookup = {
            OURS: partial(_open_and_look_up, self._merged, path),
            "floor": partial(_read_blocks, self._merged, path),
        }
        depth = path.count(b"/")
        yield Row("open, one lookup", take_turns(lookup, rounds), f"{depth} components deep")


def _open_and_look_up(bootstrap: Path, path: bytes) -> float:
    start = time.perf_counter()
    for _ in range(_LOOKUPS):
        with open_bootstrap(bootstrap) as image:
            image.lookup(path)
    return (time.perf_counter() - start) / _LOOKUPS


def _read_blocks(bootstrap: Path, path: bytes) -> float:
    """Read as many blocks as a lookup has to look at: two for each component, and one."""
    reads = 1 + 2 * path.count(b"/")
    start = time.perf_counter()
    for _ in range(_LOOKUPS):
        fd = os.open(bootstrap, os.O_RDONLY)
        for number in range(reads):
            os.pread(fd, _BLOCK, number * _BLOCK)
        os.close(fd)
    return (time.perf_counter() - start) / _LOOKUPS
