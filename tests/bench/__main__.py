"""`python -m tests.bench`, which is `make bench`.

Environment: BENCH_QUICK=1 for little of everything; BENCH_ONLY=builder for nydus-image alone,
BENCH_ROWS='create*' for those of its rows that are called so, BENCH_ONLY=nydusify for nydusify,
BENCH_ONLY=nydusd for what is read, here and in a guest;
BENCH_JSON=path for the results as JSON, BENCH_SOURCE=path.tar for another tree,
NYDUS_IMAGE_PEER, NYDUSD_PEER, NYDUS_OVERLAYFS_PEER and NYDUSIFY_PEER for the paths of real
programs to put beside ours, TMPDIR for another place than /var/tmp.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fscache.channel.fuse import require_fuse
from fscache.probe import lazy_supported, probe
from fscache.sharing import LazyUnsupported
from tests.bench import report
from tests.bench.builder import BuilderBench
from tests.bench.builderinputs import image_command
from tests.bench.channels import ChannelBench, guest_defect
from tests.bench.containers import ContainerBench
from tests.bench.daemon import DaemonBench, start_row
from tests.bench.disk import DiskBench
from tests.bench.fuse import FuseBench
from tests.bench.measure import INTERRUPTS, BenchError, run
from tests.bench.nydusify import NydusifyBench
from tests.bench.overlay import OverlayBench
from tests.bench.report import Row
from tests.bench.rig import Image, Server
from tests.bench.source import Settings, pack_big, pack_tree
from tests.bench.tree import PYTHON, TreeBench


def _path(name: str) -> Path | None:
    value = os.environ.get(name)
    return Path(value).absolute() if value else None


def _settings() -> Settings:
    settings = Settings(
        quick=os.environ.get("BENCH_QUICK", "") not in ("", "0"),
        source=_path("BENCH_SOURCE"),
        image_peer=_path("NYDUS_IMAGE_PEER"),
        daemon_peer=_path("NYDUSD_PEER"),
        overlayfs_peer=_path("NYDUS_OVERLAYFS_PEER"),
        nydusify_peer=_path("NYDUSIFY_PEER"),
        only_rows=os.environ.get("BENCH_ROWS", ""),
    )
    peers = (
        settings.image_peer, settings.daemon_peer, settings.overlayfs_peer, settings.nydusify_peer,
    )  # fmt: skip
    for path in (settings.source, *peers):
        if path is not None and not path.is_file():
            raise BenchError(f"{path}: no such file")
    return settings


class _Bench:
    """Runs the sections in one temporary directory and tells each row as it comes."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._settings = settings
        self._directory = directory
        self.rows: list[Row] = []
        self.skipped: list[str] = []

    def _tell(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.rows.append(row)
            print("\n".join(report.lines(row)), flush=True)

    def _skip(self, what: str) -> None:
        self.skipped.append(what)
        print(f"skipped: {what}", flush=True)

    def _place(self, name: str) -> Path:
        directory = self._directory / name
        directory.mkdir()
        return directory

    def run(self) -> None:
        settings = self._settings
        tree = settings.source
        if tree is None:
            tree = self._directory / "tree.tar"
            pack_tree(tree, settings)
        only = os.environ.get("BENCH_ONLY")
        if only == "nydusify":
            self._run_nydusify(tree)
            return
        if only == "nydusd":
            self._run_reading(tree)
            return
        builder = BuilderBench(settings, tree, self._place("builder"))
        self._tell(builder.rows(self._skip))
        self._tell(DiskBench(settings, tree, self._place("disk")).rows())
        if only == "builder":
            return
        self._tell(OverlayBench(settings, self._place("overlay")).rows(self._skip))
        self._run_nydusify(tree)
        self._run_reading(tree)

    def _run_reading(self, tree: Path) -> None:
        verdict = lazy_supported(probe(self._directory))
        if verdict.ok:
            self._run_daemon(tree)
        else:
            self._skip(f"everything that is read through the kernel: {verdict.detail}")
        self._run_guest()

    def _run_nydusify(self, tree: Path) -> None:
        bench = NydusifyBench(self._settings, tree, self._place("nydusify"))
        self._tell(bench.rows(self._skip))

    def _build(self, tar: Path, directory: Path) -> tuple[Path, str]:
        """Build an image that carries its digests, which the real nydusd wants for verifying."""
        bootstrap, summary = directory / "boot", directory / "report.json"
        run(
            [*image_command(), "create", "--log-level", "warn", "-t", "tar-rafs",
             "--features", "blob-toc", "--chunk-size", "0x100000", "-B", str(bootstrap),
             "-D", str(directory), "-J", str(summary), str(tar)],
            directory / "build.log",
        )  # fmt: skip
        (blob_id,) = json.loads(summary.read_text())["blobs"]
        return bootstrap, blob_id

    def _run_daemon(self, tree: Path) -> None:
        settings = self._settings
        big, small = self._place("big"), self._place("tree")
        tar = big / "big.tar"
        digest = pack_big(tar, settings.big_bytes)
        big_image, small_image = self._build(tar, big), self._build(tree, small)
        tar.unlink()
        with Server.run([big, small]) as server:
            tree_image = Image(*small_image, small, server)
            self._tell([start_row(settings, tree_image, small)])
            if not tree_image.has(PYTHON):
                self._skip("programs of an image: no python3 in it (BENCH_SOURCE=a root's tar)")
            self._tell(TreeBench(settings, tree_image, self._place("program")).rows())
            self._run_containers(tree, tree_image)
            image = Image(*big_image, big, server)
            self._tell(DaemonBench(settings, image, digest, big).rows())
            self._run_fuse(image, tree_image)

    def _run_containers(self, tree: Path, image: Image) -> None:
        if not image.has(PYTHON):
            self._skip("containers: the tree is no root file system")
            return
        try:
            bench = ContainerBench(self._settings, tree, self._place("containers"))
        except BenchError as error:
            self._skip(f"containers: {error}")
        else:
            self._tell(bench.rows())

    def _run_fuse(self, big: Image, tree: Image) -> None:
        try:
            require_fuse()
        except LazyUnsupported as error:
            self._skip(f"everything through FUSE: {error}")
        else:
            bench = FuseBench(self._settings, big, tree, self._place("fuse"))
            self._tell(bench.rows())

    def _run_guest(self) -> None:
        defect = guest_defect()
        if defect is not None:
            self._skip(f"everything in a guest: {defect}")
            return
        tar, blobs = self._directory / "guest.tar", self._place("guest")
        pack_big(tar, self._settings.guest_bytes)
        bootstrap, _ = self._build(tar, blobs)
        tar.unlink()
        self._tell(ChannelBench(self._settings, bootstrap, blobs).rows())


def main() -> int:
    INTERRUPTS.take()
    try:
        settings = _settings()
        place = os.environ.get("TMPDIR", "/var/tmp")
        with tempfile.TemporaryDirectory(prefix="nydus-bench-", dir=place) as directory:
            bench = _Bench(settings, Path(directory))
            print(", ".join(f"{name} {value}" for name, value in report.machine().items()))
            print(f"{settings.rounds} rounds in turns: median (smallest..largest)\n")
            print(report.HEADER)
            bench.run()
        target = _path("BENCH_JSON")
        if target is not None:
            conditions = {"quick": settings.quick, "rounds": settings.rounds}
            report.write_json(target, bench.rows, bench.skipped, conditions)
    except BenchError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


sys.exit(main())
