"""Every kind of work of `nydus-image`, beside floors, mkfs.erofs and a real nydus-image.

What is built is in `tests.bench.builderinputs`. The bars are those of the project: each row
says them, `make bench` judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

from tests.bench.builderinputs import Inputs, image_command
from tests.bench.measure import Turns, Usage, child, fresh, run, run_fed
from tests.bench.report import OURS, Row
from tests.bench.source import Settings

_MKFS = {"lz4_block": ["-zlz4"], "none": []}
_Measure = Callable[[], Usage]
# The name of a row, and what measures it.
_Case = tuple[str, Callable[[str], Row]]


class BuilderBench:
    """Measures in one directory; `rows` makes what it needs on the way."""

    def __init__(self, settings: Settings, tar: Path, directory: Path) -> None:
        self._settings = settings
        self._directory = directory
        self._log = directory / "builder.log"
        self._inputs = Inputs(settings, tar, directory)

    def rows(self, skip: Callable[[str], None]) -> Iterator[Row]:
        """Measure what is asked for, one row after the other."""
        cases = chain(
            self._tree(skip),
            self._compressed(),
            self._small_files(),
            self._metadata(),
            self._others(),
        )
        for name, measure in cases:
            if self._settings.wants(name):
                yield measure(name)

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

    def _tree(self, skip: Callable[[str], None]) -> Iterator[_Case]:
        bars = {
            "zstd": {"peer": 0.9, "floor": 1.35},
            "lz4_block": {"peer": 1.1},
            "none": {"peer": 1.8},
        }
        for compressor, bar in bars.items():
            yield f"create, {compressor}", partial(self._plain, skip, compressor, bar)
        yield "create, batches", self._batches

    def _plain(
        self, skip: Callable[[str], None], compressor: str, bars: Mapping[str, float], name: str
    ) -> Row:
        tar, (plan, files, size) = self._inputs.tree, self._inputs.plan()
        words = ("-t", "tar-rafs", "--chunk-size", "0x100000", "--compressor", compressor)
        variants = self._both(partial(self._create, tar, words))
        variants["floor"] = partial(self._floor, tar, plan, compressor)
        if compressor in _MKFS:
            extracted, reason = self._inputs.extracted()
            if extracted is None:
                skip(f"mkfs.erofs beside {name}: {reason}")
            else:
                variants["mkfs.erofs"] = partial(self._mkfs, _MKFS[compressor], extracted)
        return self._row(name, variants, bars, f"{files} files, {size >> 20} MiB")

    def _batches(self, name: str) -> Row:
        words = ("-t", "tar-rafs", "--batch-size", "0x100000")
        variants = self._both(partial(self._create, self._inputs.tree, words))
        return self._row(name, variants, {"peer": 1.0})

    def _compressed(self) -> Iterator[_Case]:
        for kind, bar in (("targz-rafs", 0.9), ("targz-ref", 1.2)):
            yield f"create, {kind}", partial(self._gzip, kind, bar)

    def _gzip(self, kind: str, bar: float, name: str) -> Row:
        source = self._inputs.gzipped()
        variants = self._both(partial(self._create, source, ("-t", kind)))
        return self._row(
            name, variants, {"peer": bar}, f"{source.stat().st_size >> 20} MiB of gzip"
        )

    def _small_files(self) -> Iterator[_Case]:
        for compressor, bars in (("zstd", {"peer": 1.0}), ("none", {})):
            yield f"many files, {compressor}", partial(self._many_files, compressor, bars)

    def _many_files(self, compressor: str, bars: Mapping[str, float], name: str) -> Row:
        tar, count = self._inputs.small_files(), self._settings.files
        words = ("-t", "tar-rafs", "--compressor", compressor)
        variants = self._both(partial(self._create, tar, words))
        note = f"{count} files of 1 KiB" + ("" if bars else " (bar: 35 µs each)")
        return self._row(name, variants, bars, note, count)

    def _others(self) -> Iterator[_Case]:
        yield "unpack, zstd", self._unpack
        yield "many empty files", self._empty_files
        yield "--version", self._start
        yield "open, one lookup", self._look_up
        yield "tar through a pipe", self._stream

    def _unpack(self, name: str) -> Row:
        image, blobs = self._inputs.tree_image()
        words = ("unpack", "--bootstrap", str(image), "--blob-dir", str(blobs))
        variants = self._both(partial(self._into_file, words, "--output"))
        return self._row(name, variants, {"peer": 1.0})

    def _check(self, bootstrap: Path, command: list[str]) -> Usage:
        words = [*command, "check", "--log-level", "warn", "--bootstrap", str(bootstrap)]
        return run(words, self._log)

    def _files_floor(self, target: str, size: int, sources: list[Path]) -> Usage:
        with fresh(self._directory, "out") as out:
            path = out / "boot" if target else "-"
            return run(child("floor_files", path, size, *sources), self._log)

    def _metadata(self) -> Iterator[_Case]:
        count, layers = self._settings.files, self._settings.layers
        yield "check", lambda name: self._checks(self._inputs.layers()[0], count, name)
        yield "merge", self._merge
        yield (
            "check, merged",
            lambda name: self._checks(self._inputs.merged(), count * layers, name),
        )

    def _checks(self, bootstrap: Path, count: int, name: str) -> Row:
        variants = self._both(partial(self._check, bootstrap))
        size = bootstrap.stat().st_size
        variants["floor"] = partial(self._files_floor, "", size, [bootstrap])
        return self._row(name, variants, {"peer": 1.0}, f"{count} files", count)

    def _merge(self, name: str) -> Row:
        layers, size = self._inputs.layers(), self._inputs.merged().stat().st_size
        total = self._settings.files * len(layers)
        words = ("merge", *map(str, layers))
        variants = self._both(partial(self._into_file, words, "--bootstrap"))
        variants["floor"] = partial(self._files_floor, "boot", size, layers)
        note = f"{total} files, {len(layers)} layers"
        return self._row(name, variants, {"peer": 0.8}, note, total)

    def _empty_files(self, name: str) -> Row:
        count = self._settings.files * self._settings.layers
        tar = self._inputs.empty_files()
        variants = self._both(partial(self._create, tar, ("-t", "tar-rafs")))
        note = f"{count} files without content (bar: 25 µs each, 1 KiB of memory)"
        row = self._row(name, variants, {}, note, count)
        row.note += f", {row.peak_bytes[OURS] / count:.0f} bytes of memory each"
        return row

    def _start(self, name: str) -> Row:
        variants = self._both(lambda command: run([*command, "--version"], self._log))
        return self._row(name, variants, {}, "bar: 60 ms")

    def _look_up(self, name: str) -> Row:
        bootstrap, path = self._inputs.layers()[0], self._inputs.path_in_layer()

        def measure() -> Usage:
            usage = run(child("look_up", bootstrap, path), self._log)
            return usage._replace(seconds=float(usage.output))

        note = f"{self._settings.files} files (bar: 5 ms)"
        return self._row(name, {OURS: measure}, {}, note)

    def _stream(self, name: str) -> Row:
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
            name,
            turns.seconds,
            f"{size >> 30 or size / (1 << 30):g} GiB (bar: 250 MiB of memory)",
            {"bytes": size},
            turns.cpu_seconds,
            turns.peak_bytes,
        )
