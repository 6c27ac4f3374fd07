"""A container from pull to end, through the real containerd and nydus-snapshotter."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.bench.measure import BenchError, take_turns
from tests.bench.report import OURS, Row
from tests.bench.source import Settings
from tests.real.images import Image, make_image
from tests.real.peers import PeersError, build_peers
from tests.real.rig import Rig

_NAME = "bench:n"


class ContainerBench:
    """Runs one command in a container of a fresh image; every round has a new snapshotter.

    What our daemon finds out about the kernel is kept from the first round on, as on a node until
    its next boot.

    Args:
        settings: what is measured beside ours.
        tree: the tar of a root file system with a shell.
        directory: for the image.
    """

    def __init__(self, settings: Settings, tree: Path, directory: Path) -> None:
        self._settings = settings
        try:
            self._peers = build_peers()
        except PeersError as error:
            raise BenchError(f"no containerd or snapshotter: {error}") from error
        self._image: Image = make_image(_NAME, [tree], directory)
        self._environment = {"NYDUSD_RUN_DIR": str(directory / "run")}
        self._seconds: dict[str, list[float]] = {}

    def rows(self) -> Iterator[Row]:
        """Measure `ctr run`, and `ctr image pull` with it."""
        variants = {OURS: partial(self._run, OURS, None)}
        if self._settings.daemon_peer is not None:
            name = "peer (FUSE)"
            variants[name] = partial(self._run, name, self._settings.daemon_peer)
        whole = take_turns(variants, self._settings.rounds)
        note = "dedicated daemon, image pulled before; ours tries the kernel in the first round"
        yield Row("ctr run … true", self._seconds, note)
        yield Row("ctr image pull and run", whole)

    def _run(self, who: str, nydusd: Path | None) -> float:
        rig = Rig(self._peers, "dedicated", environment=self._environment, nydusd=nydusd)
        try:
            reference = rig.push(self._image)
            begin = time.monotonic()
            rig.pull(reference)
            pulled = time.monotonic()
            rig.ctr("run", "--rm", reference, "once", "true")
            end = time.monotonic()
        finally:
            rig.close()
        self._seconds.setdefault(who, []).append(end - pulled)
        return end - begin
