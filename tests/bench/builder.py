"""Every kind of work of `nydus-image`, beside floors, mkfs.erofs and a real nydus-image.

What is built is in `tests.bench.builderinputs`. The bars are those of the project: each row
says them, `make bench` judges nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from tests.bench.builderinputs import Inputs, image_command
from tests.bench.measure import Turns, Usage, child, fresh, run, run_fed
from tests.bench.report import OURS, Row
from tests.bench.source import Settings

_MKFS = {"lz4_block": ["-zlz4"], "none": []}
_Measure = Callable[[], Usage]


class BuilderBench:
    """Measures in one directory; `rows` makes what it needs on the way."""

    def __init__(self, settings: Settings, tar: Path, directory: Path) -> None:
        self._settings = settings
        self._directory = directory
        self._log = directory / "builder.log"
        self._inputs = Inputs(settings, tar, directory)

    def rows(self, skip: Callable[[str], None]) -> Iterator[Row]:
        """Measure everything, one row after the other."""
        yield from self._tree(skip)
        yield from self._compressed()
        yield from self._small_files()
        yield from self._unpack()
        yield from self._metadata()
        yield from self._empty_files()
        yield self._start()
        yield self._look_up()
        yield self._stream()

    # Running things.

    def _row(
        self,
        name: str,
        variants: Mapping[str, _Measure],
        bars: Mapping[str, float],
        note: str = "",
        items: int = 0,
    ) -> Row:
        turns = Turns(self._settings.rounds)
        turns.take(variants)
        if items:
            best = min(turns.seconds[OURS]) / items * 1e6
            least = min(turns.cpu_seconds[OURS]) / items * 1e6
            note += f", {best:.1f} µs each at best, {least:.1f} µs cpu"
        here = {other: bar for other, bar in bars.items() if other in variants}
        return Row(
            name, turns.seconds, note, {"items": items}, turns.cpu_seconds, turns.peak_bytes, here
        )

    def _both(self, measure: Callable[[list[str]], Usage]) -> dict[str, _Measure]:
        """Return ours, and the real tool where there is one."""
        variants = {OURS: partial(measure, image_command())}
        if self._settings.image_peer is not None:
            variants["peer"] = partial(measure, image_command(self._settings.image_peer))
        return variants

    def _create(self, tar: Path, words: tuple[str, ...], command: list[str]) -> Usage:
        with fresh(self._directory, "out") as out:
            return run(
                [*command, "create", "--log-level", "warn", *words, "-B", str(out / "boot"),
                 "-D", str(out), str(tar)],
                self._log,
            )  # fmt: skip

    def _into_file(self, words: tuple[str, ...], option: str, command: list[str]) -> Usage:
        """Run a command that makes one file."""
        with fresh(self._directory, "out") as out:
            target = [option, str(out / "made")]
            return run([*command, words[0], "--log-level", "warn", *target, *words[1:]], self._log)

    # The rows.

    def _floor(self, tar: Path, plan: Path, compressor: str) -> Usage:
        with fresh(self._directory, "out") as out:
            return run(child("floor_create", tar, plan, out / "blob", compressor), self._log)

    def _mkfs(self, options: list[str], tree: Path) -> Usage:
        with fresh(self._directory, "out") as out:
            command = ["mkfs.erofs", "--quiet", *options, str(out / "image"), str(tree)]
            return run(command, self._log)

    def _tree(self, skip: Callable[[str], None]) -> Iterator[Row]:
        inputs = self._inputs
        tar, (plan, files, size) = inputs.tree, inputs.plan()
        note = f"{files} files, {size >> 20} MiB"
        extracted, reason = inputs.extracted()
        if extracted is None:
            skip(f"mkfs.erofs beside create: {reason}")
        bars = {
            "zstd": {"peer": 0.9, "floor": 1.35},
            "lz4_block": {"peer": 1.1},
            "none": {"peer": 1.8},
        }
        for compressor, bar in bars.items():
            words = ("-t", "tar-rafs", "--chunk-size", "0x100000", "--compressor", compressor)
            variants = self._both(partial(self._create, tar, words))
            variants["floor"] = partial(self._floor, tar, plan, compressor)
            if extracted is not None and compressor in _MKFS:
                variants["mkfs.erofs"] = partial(self._mkfs, _MKFS[compressor], extracted)
            yield self._row(f"create, {compressor}", variants, bar, note)
        if extracted is not None:
            shutil.rmtree(extracted)
        words = ("-t", "tar-rafs", "--batch-size", "0x100000")
        variants = self._both(partial(self._create, tar, words))
        yield self._row("create, batches", variants, {"peer": 1.0}, note)

    def _compressed(self) -> Iterator[Row]:
        source = self._inputs.gzipped()
        note = f"{source.stat().st_size >> 20} MiB of gzip"
        for kind, bar in (("targz-rafs", 0.9), ("targz-ref", 1.2)):
            variants = self._both(partial(self._create, source, ("-t", kind)))
            yield self._row(f"create, {kind}", variants, {"peer": bar}, note)
        source.unlink()

    def _small_files(self) -> Iterator[Row]:
        tar, count = self._inputs.small_files(), self._settings.files
        for compressor, bars in (("zstd", {"peer": 1.0}), ("none", {})):
            words = ("-t", "tar-rafs", "--compressor", compressor)
            variants = self._both(partial(self._create, tar, words))
            note = f"{count} files of 1 KiB" + ("" if bars else " (bar: 35 µs each)")
            yield self._row(f"many files, {compressor}", variants, bars, note, count)

    def _unpack(self) -> Iterator[Row]:
        image, blobs = self._inputs.tree_image()
        words = ("unpack", "--bootstrap", str(image), "--blob-dir", str(blobs))
        variants = self._both(partial(self._into_file, words, "--output"))
        yield self._row("unpack, zstd", variants, {"peer": 1.0})

    def _check(self, bootstrap: Path, command: list[str]) -> Usage:
        words = [*command, "check", "--log-level", "warn", "--bootstrap", str(bootstrap)]
        return run(words, self._log)

    def _files_floor(self, target: str, size: int, sources: list[Path]) -> Usage:
        with fresh(self._directory, "out") as out:
            path = out / "boot" if target else "-"
            return run(child("floor_files", path, size, *sources), self._log)

    def _metadata(self) -> Iterator[Row]:
        layers, merged = self._inputs.layers(), self._inputs.merged()
        count, size = self._settings.files, merged.stat().st_size
        one = layers[0]
        variants = self._both(partial(self._check, one))
        variants["floor"] = partial(self._files_floor, "", one.stat().st_size, [one])
        yield self._row("check", variants, {"peer": 1.0}, f"{count} files", count)
        total = count * len(layers)
        words = ("merge", *map(str, layers))
        variants = self._both(partial(self._into_file, words, "--bootstrap"))
        variants["floor"] = partial(self._files_floor, "boot", size, layers)
        note = f"{total} files, {len(layers)} layers"
        yield self._row("merge", variants, {"peer": 0.8}, note, total)
        variants = self._both(partial(self._check, merged))
        variants["floor"] = partial(self._files_floor, "", size, [merged])
        yield self._row("check, merged", variants, {"peer": 1.0}, f"{total} files", total)

    def _empty_files(self) -> Iterator[Row]:
        count = self._settings.files * self._settings.layers
        tar = self._inputs.empty_files()
        variants = self._both(partial(self._create, tar, ("-t", "tar-rafs")))
        note = f"{count} files without content (bar: 25 µs each, 1 KiB of memory)"
        row = self._row("many empty files", variants, {}, note, count)
        row.note += f", {row.peak_bytes[OURS] / count:.0f} bytes of memory each"
        tar.unlink()
        yield row

    def _start(self) -> Row:
        variants = self._both(lambda command: run([*command, "--version"], self._log))
        return self._row("--version", variants, {}, "bar: 60 ms")

    def _look_up(self) -> Row:
        bootstrap, path = self._inputs.layers()[0], self._inputs.path_in_layer()

        def measure() -> Usage:
            usage = run(child("look_up", bootstrap, path), self._log)
            return usage._replace(seconds=float(usage.output))

        return self._row(
            "open, one lookup", {OURS: measure}, {}, f"{self._settings.files} files (bar: 5 ms)"
        )

    def _stream(self) -> Row:
        size = self._settings.stream_bytes
        source = child("tar_stream", size)

        def measure(command: list[str]) -> Usage:
            words = ["create", "--log-level", "warn", "-t", "tar-rafs", "--blob", "/dev/null"]
            with fresh(self._directory, "out") as out:
                target = ["-B", str(out / "boot"), "-"]
                return run_fed(source, [*command, *words, *target], self._log)

        turns = Turns(1)
        turns.take({OURS: partial(measure, image_command())})
        return Row(
            "tar through a pipe",
            turns.seconds,
            f"{size >> 30 or size / (1 << 30):g} GiB (bar: 250 MiB of memory)",
            {"bytes": size},
            turns.cpu_seconds,
            turns.peak_bytes,
        )
