"""Channels that this machine's kernel may lack, in a guest of the lab: cachefiles and NBD.

Processors of guests are often emulated, so their digits stand for nothing. What counts is how
many times as long a read takes as one of complete files in the same guest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.bench.measure import ROOT, BenchError, child
from tests.bench.report import COMPLETE, OURS, Row
from tests.bench.source import Settings

# The lab is no package of ours, and `make bench` runs without pytest's paths.
sys.path.append(str(ROOT / "vm-images"))

from vmlab.booting import boot, boot_defect
from vmlab.catalogue import KERNELS
from vmlab.errors import LabError
from vmlab.machine import host_path
from vmlab.store import find

# FUSE as well, by which one gets from there to this machine's rows.
CHANNELS = ("cachefiles", "nbd", "fuse")
# Debian's kernel with what cachefiles take; it has the two others as well.
_KERNEL = KERNELS["ondemand"]
_SECONDS = 900.0

# What is measured, and which measurement of complete files it is put beside.
_ROWS = {
    "cold": ("complete", "empty cache, blob in memory; beside files on disk"),
    "complete": ("complete", "first read of a new mount, nothing in memory"),
    "hot": ("hot", ""),
    "page": ("page", "median of random 4 KiB, nothing in memory"),
}


def guest_defect() -> str | None:
    """Return why there can be no guest; nothing is downloaded for it."""
    return boot_defect(_KERNEL)


class ChannelBench:
    """Measures an image with a single large file, whose blob lies in a directory of its own."""

    def __init__(self, settings: Settings, bootstrap: Path, blob_dir: Path) -> None:
        self._settings = settings
        self._places = (host_path(bootstrap), host_path(blob_dir))

    def _measure(self) -> dict[str, dict[str, list[float]]]:
        stored = find(_KERNEL)
        if stored is None:
            raise BenchError(f"kernel {_KERNEL.name} has gone")
        command = child("guest_channels", *self._places, self._settings.guest_rounds, *CHANNELS)
        try:
            with boot(stored, _KERNEL) as guest:
                done = guest.run(command, cwd=ROOT, seconds=_SECONDS)
        except LabError as error:
            raise BenchError(f"guest: {error}") from error
        if done.status:
            text = done.stderr.decode(errors="replace")[-2000:]
            raise BenchError(f"{' '.join(command)}: exit status {done.status} in a guest\n{text}")
        return json.loads(done.stdout)

    def rows(self) -> Iterator[Row]:
        """Measure all channels in one guest; raise `BenchError`."""
        found = self._measure()
        size = f"{self._settings.guest_bytes >> 20} MiB"
        for channel in CHANNELS:
            for what, (beside, note) in _ROWS.items():
                seconds = {OURS: found[channel][what], COMPLETE: found[COMPLETE][beside]}
                text = f"{size}, {note}" if what == "cold" else note
                yield Row(f"VM, {channel}: {what}", seconds, text)
