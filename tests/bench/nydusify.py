"""`nydusify` through a local registry, beside a floor and the real tool.

The floor reads the layers, unpacks them, builds their data by the floor of `create`, and pushes
what it made: what no converter can do without.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.bench.largeimage import push_large
from tests.bench.measure import BenchError, Turns, Usage, child, fresh, module, run, started
from tests.bench.report import OURS, Row
from tests.bench.source import Settings
from tests.debian_image import make_debian_layout

_CONFIG = """\
version: 0.1
log:
  level: error
storage:
  filesystem:
    rootdirectory: {root}
http:
  addr: 127.0.0.1:{port}
"""
_START_SECONDS = 60
# Goals: times the real tool's time.
_GOALS = {"convert": 0.9, "proof": 1.3, "zran": 1.2, "check": 0.5}


class NydusifyBench:
    """Converts one image of three layers again and again, each time to a new repository."""

    def __init__(self, settings: Settings, tree: Path, directory: Path) -> None:
        self._settings = settings
        self._tree = tree
        self._directory = directory
        self._log = directory / "nydusify.log"
        self._number = 0
        self._host = ""

    def rows(self, skip: Callable[[str], None]) -> Iterator[Row]:
        """Measure convert without and with proof, zran, and check."""
        for name in ("docker-registry", "skopeo"):
            if shutil.which(name) is None:
                skip(f"nydusify: {name} is not installed")
                return
        layout = make_debian_layout(self._tree, self._directory / "layout")
        with self._registry():
            self._skopeo(layout)
            yield self._row("convert, no proof", "convert", ["--no-proof"], floor=True)
            yield self._row("convert with proof", "proof", [])
            yield self._row("convert --oci-ref, no proof", "zran", ["--oci-ref", "--no-proof"])
            yield self._check()
            yield self._large()

    @contextmanager
    def _registry(self) -> Iterator[None]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self._host = f"localhost:{port}"
        config = self._directory / "registry.yml"
        config.write_text(_CONFIG.format(root=self._directory / "registry", port=port))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with started(["docker-registry", "serve", str(config)], **quiet):
            end = time.monotonic() + _START_SECONDS
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError as error:
                    if time.monotonic() > end:
                        raise BenchError("the registry does not start") from error
                    time.sleep(0.05)
            yield

    def _skopeo(self, layout: Path) -> None:
        run(
            ["skopeo", "copy", "--all", "--dest-tls-verify=false", f"oci:{layout}:latest",
             f"docker://{self._host}/source:v1"],
            self._log,
        )  # fmt: skip

    def _command(self, peer: Path | None, name: str) -> list[str]:
        """Return the first words of a command line; the real tool needs real programs."""
        if peer is None:
            return [*module("builder.nydusify"), name]
        words = [str(peer), name]
        if self._settings.image_peer is not None:
            words += ["--nydus-image", str(self._settings.image_peer)]
        if name == "check" and self._settings.daemon_peer is not None:
            words += ["--nydusd", str(self._settings.daemon_peer)]
        return words

    def _convert(self, peer: Path | None, words: list[str], source: str = "source:v1") -> Usage:
        self._number += 1
        target = f"{self._host}/target{self._number}:n"
        if peer is not None:
            words = [word for word in words if word != "--no-proof"]
        return run(
            [*self._command(peer, "convert"), "--source", f"{self._host}/{source}", "--target",
             target, "--plain-http", "--work-dir", str(self._directory / "work"), *words],
            self._log,
        )  # fmt: skip

    def _floor(self) -> Usage:
        self._number += 1
        with fresh(self._directory, f"floor{self._number}") as work:
            return run(child("nydusify_floor", self._host, f"floor{self._number}", work), self._log)

    def _row(self, name: str, goal: str, words: list[str], *, floor: bool = False) -> Row:
        variants = {OURS: partial(self._convert, None, words)}
        if floor:
            variants["floor"] = self._floor
        return self._measured(name, goal, variants, lambda peer: self._convert(peer, words))

    def _measured(
        self,
        name: str,
        goal: str,
        variants: dict[str, Callable[[], Usage]],
        peer_run: Callable[[Path], Usage],
    ) -> Row:
        peer = self._settings.nydusify_peer
        if peer is not None:
            variants["peer"] = partial(peer_run, peer)
        turns = Turns(self._settings.rounds)
        turns.take(variants)
        return Row(
            f"nydusify {name}", turns.seconds, cpu_seconds=turns.cpu_seconds,
            peak_bytes=turns.peak_bytes, bars={"peer": _GOALS[goal]},
        )  # fmt: skip

    def _check(self) -> Row:
        self._convert(None, ["--no-proof"])
        words = [
            "--source", f"{self._host}/source:v1", "--target",
            f"{self._host}/target{self._number}:n", "--work-dir", str(self._directory / "check"),
        ]  # fmt: skip

        def check(peer: Path | None) -> Usage:
            return run([*self._command(peer, "check"), *words], self._log)

        return self._measured("check", "check", {OURS: partial(check, None)}, check)

    def _large(self) -> Row:
        """Convert an image that is larger than memory may be, once; its peak is what counts."""
        size = self._settings.stream_bytes // 2
        push_large(f"{self._host}/large:v1", size)
        usage = self._convert(None, [], "large:v1")
        return Row(
            f"nydusify convert, {size >> 20} MiB", {OURS: [usage.seconds]},
            "bar of the peak: 250 MiB", cpu_seconds={OURS: [usage.cpu_seconds]},
            peak_bytes={OURS: usage.peak_bytes},
        )  # fmt: skip
