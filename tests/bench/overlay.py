"""`nydus-overlayfs` from start to finished mount: it runs twice for each container."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from overlayfs_helper.install import install_helper
from tests.bench.measure import child, run
from tests.bench.report import OURS, Row
from tests.bench.source import Settings
from tests.capabilities import missing

# The helper takes milliseconds, so more rounds cost nothing.
_ROUNDS = 20


class OverlayBench:
    """Installs the helper into `directory`, as `make install-helper` does, and times it."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._settings = settings
        self._directory = directory
        self._program = install_helper(directory / "usr", directory / "sbin")

    def _measure(self, commands: dict[str, list[str]]) -> dict[str, list[float]]:
        top = self._directory / "top"
        top.mkdir(exist_ok=True)
        command = child("overlay_mounts", top, _ROUNDS, json.dumps(commands))
        return json.loads(run(command, self._directory / "overlay.log").output)

    def rows(self, skip: Callable[[str], None]) -> Iterator[Row]:
        """Measure the helper alone, and as containerd calls it."""
        reason = missing("root") or missing("overlay")
        if reason:
            skip(f"mounts of nydus-overlayfs: {reason}")
            return
        interpreter = self._program.read_text().split()[0].removeprefix("#!")
        call = ["overlay", "{target}", "-o", "{options}"]
        commands = {
            OURS: [str(self._program), *call],
            "import ctypes": [interpreter, "-I", "-S", "-c", "import ctypes"],
        }
        peer = self._settings.overlayfs_peer
        if peer is not None:
            commands["peer"] = [str(peer), *call]
        note = f"8 layers, {_ROUNDS} rounds; the goal is 1.5 times the import"
        yield Row("nydus-overlayfs, one mount", self._measure(commands), note)
        fuse = shutil.which("mount.fuse3")
        if fuse is None:
            skip("nydus-overlayfs by mount.fuse3: fuse3 is not installed")
            return
        commands = {OURS: [fuse, *call, "-t", str(self._program)], "alone": commands[OURS]}
        if peer is not None:
            commands["peer"] = [fuse, *call, "-t", str(peer)]
        yield Row("nydus-overlayfs by mount.fuse3", self._measure(commands))
