"""`nydus-image create` of a tar, beside a floor, mkfs.erofs and a real nydus-image."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.bench.measure import child, fresh, module, run, take_turns
from tests.bench.report import OURS, Row
from tests.bench.source import Settings, write_plan

COMPRESSORS = ("zstd", "lz4_block", "none")
_MKFS = {"lz4_block": ["-zlz4"], "none": []}


def image_command(peer: Path | None = None) -> list[str]:
    """Return how to call `nydus-image`: ours, or the peer."""
    return module("builder.cli") if peer is None else [str(peer)]


class CreateBench:
    """Measures builds of one tar; the last zstd image stays in `directory`."""

    def __init__(self, settings: Settings, tar: Path, directory: Path) -> None:
        self._settings = settings
        self._tar = tar
        self._directory = directory
        self._log = directory / "create.log"
        self._plan = directory / "plan"
        self._peaks: dict[str, int] = {}
        self._files, self._size = write_plan(tar, self._plan)

    def _build(self, command: list[str], compressor: str, label: str) -> float:
        with fresh(self._directory, "out") as out:
            usage = run(
                [*command, "create", "--log-level", "warn", "-t", "tar-rafs",
                 "--compressor", compressor, "--chunk-size", "0x100000",
                 "-B", str(out / "boot"), "-D", str(out), str(self._tar)],
                self._log,
            )  # fmt: skip
        self._peaks[label] = max(self._peaks.get(label, 0), usage.peak_bytes)
        return usage.seconds

    def _floor(self, compressor: str) -> float:
        with fresh(self._directory, "out") as out:
            command = child("floor_create", self._tar, self._plan, out / "blob", compressor)
            return run(command, self._log).seconds

    def _extract(self) -> tuple[Path | None, str]:
        """Unpack the tar for mkfs.erofs; return the reason when there is nothing to compare."""
        if shutil.which("mkfs.erofs") is None:
            return None, "mkfs.erofs is not installed"
        tree = self._directory / "tree"
        try:
            with tarfile.open(self._tar) as tar:
                tar.extractall(tree, filter="tar")
        except (OSError, tarfile.TarError) as error:
            return None, f"the tar cannot be unpacked for mkfs.erofs ({error})"
        return tree, ""

    def _mkfs(self, options: list[str], tree: Path) -> float:
        with fresh(self._directory, "out") as out:
            command = ["mkfs.erofs", "--quiet", *options, str(out / "image"), str(tree)]
            return run(command, self._log).seconds

    def rows(self, skip: Callable[[str], None]) -> Iterator[Row]:
        """Measure all compressors, one after the other."""
        tree, reason = self._extract()
        if tree is None:
            skip(f"mkfs.erofs beside create: {reason}")
        for compressor in COMPRESSORS:
            self._peaks.clear()
            variants = {
                OURS: partial(self._build, image_command(), compressor, OURS),
                "floor": partial(self._floor, compressor),
            }
            if tree is not None and compressor in _MKFS:
                variants["mkfs.erofs"] = partial(self._mkfs, _MKFS[compressor], tree)
            if self._settings.image_peer is not None:
                peer = image_command(self._settings.image_peer)
                variants["peer"] = partial(self._build, peer, compressor, "peer")
            seconds = take_turns(variants, self._settings.rounds)
            yield self._row(compressor, seconds)
        if tree is not None:
            shutil.rmtree(tree)

    def _row(self, compressor: str, seconds: dict[str, list[float]]) -> Row:
        mebibytes = self._size / (1 << 20)
        best = min(seconds[OURS])
        peaks = ", ".join(f"{name} {peak >> 20} MiB" for name, peak in self._peaks.items())
        return Row(
            f"create tar-rafs {compressor}",
            seconds,
            f"{self._files} files, {mebibytes:.0f} MiB, {mebibytes / best:.0f} MiB/s at best,"
            f" peak memory: {peaks}",
            {
                "files": self._files,
                "bytes": self._size,
                **{f"peak_bytes_{name}": peak for name, peak in self._peaks.items()},
            },
        )
