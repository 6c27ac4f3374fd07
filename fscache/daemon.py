"""One image at one mount point: the simplest daemon, and the one to use from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from fscache.config import DaemonConfig
from fscache.image import ROOT, Progress, ServedImage
from fscache.lifecycle import State, StateError
from fscache.node import NodeDaemon, NodeOptions
from fscache.sharing import LazyUnsupported
from fscache.transport import Transport

__all__ = ["Daemon", "LazyUnsupported", "State", "StateError", "Transport"]


class Daemon(NodeDaemon):
    """Serves one image at one mount point; `start`, `wait`, `stop`, or a context manager.

    Args:
        config: backend and cache directory.
        bootstrap: on a file system that EROFS can be mounted from (ext4, xfs, btrfs).
        mountpoint: an existing directory.
        transport: how the image gets to the kernel.
        directio: read data files past the page cache.
        progress: called with (bytes done, all bytes) while an eager start fetches.
    """

    def __init__(
        self,
        config: DaemonConfig,
        bootstrap: Path,
        mountpoint: Path,
        *,
        transport: Transport = Transport.AUTO,
        directio: bool = False,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(
            NodeOptions(
                mountpoint=mountpoint,
                bootstrap=bootstrap,
                config=config,
                id=config.id or None,
                transport=transport,
                directio=directio,
                progress=progress,
            )
        )

    @property
    def mountpoint(self) -> Path:
        """Where the image is mounted."""
        return self.options.mountpoint

    @property
    def served(self) -> ServedImage:
        """The image, once it is mounted; raise `TableError` before."""
        return self.image(ROOT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
