"""What a channel is asked to mount, and what it gives back: values and one protocol.

`fscache.sharing.Domain.mount` is where channels differ: the kernel's EROFS over plain files
(fanotify, eager), a file system of our own (FUSE). All else is the same for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from erofs.values import Value

if TYPE_CHECKING:
    from fscache.cache.cachedblob import CachedBlob

__all__ = ["ROOT", "ImageOptions", "Mount", "MountJob", "Progress"]

Progress = Callable[[int, int], None]
ROOT = "/"


class ImageOptions(Value):
    """How an image is mounted.

    Args:
        directio: read data files past the page cache.
        progress: called with (bytes done, all bytes) while an eager start fetches.
        before_mount: called when the fetching is over and the mount begins.
        path: its place in the table of a node.
    """

    directio: bool = False
    progress: Progress | None = None
    before_mount: Callable[[], None] | None = None
    path: str = ROOT


class Mount(Protocol):
    """An attached mount; dropping the object does not unmount.

    `mountpoint` is where it was attached, `device` its `st_dev`, `name` its entry below
    `/sys/fs/erofs`, by which a successor finds it; None for one that nobody could go on with.
    """

    mountpoint: Path
    device: int
    name: str | None

    def is_attached(self) -> bool:
        """Return whether this mount is on top at its mount point."""

    def is_gone(self) -> bool:
        """Return whether nobody can read from it any more, not only that it is out of the tree."""

    def unmount(self) -> None:
        """Unmount; raise `MountBusy` when there are users, `MountError` for other refusals."""

    def detach(self) -> None:
        """Take the mount out of the tree now; it ends with its last user. Raises `MountError`."""

    def close(self) -> None:
        """Let go of what answers it, when it is gone and before its blobs are; raises nothing."""


class MountJob(NamedTuple):
    """One image to be mounted.

    Args:
        bootstrap: a file that EROFS could be mounted from.
        bootstrap_fd: the same file, open; the image's.
        mountpoint: an existing directory.
        blobs: open, in the order of the image's device table.
        options: see `ImageOptions`.
        attaching: to be called with a mount that exists and that nobody can reach yet, by
            channels whose mounts outlive a killed daemon.
    """

    bootstrap: Path
    bootstrap_fd: int
    mountpoint: Path
    blobs: Sequence[CachedBlob]
    options: ImageOptions
    attaching: Callable[[Mount], None]
