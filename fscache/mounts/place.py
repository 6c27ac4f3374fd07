"""Mounts that hold no image, and what is mounted at a place.

That is the private tmpfs that images hang below, and bind mounts; overlays are in
`fscache.mounts.overlay`.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from fscache import kernel
from fscache.mounts.mount import MountBusy, MountError
from fscache.mounts.mountinfo import MountLine, mounts

__all__ = [
    "MOUNT_SOURCE",
    "Mounted",
    "PlainMount",
    "clear_leftover",
    "create_tmpfs",
    "device_at",
    "is_our_overlay",
    "mount_bind",
    "mount_tmpfs",
    "mounted_at",
    "mounted_below",
    "umount_fd",
]

logger = logging.getLogger(__name__)

# Tells our tmpfs and our overlays from anybody else's.
MOUNT_SOURCE = "nydusd"
_TMPFS_SIZE = "1m"


class PlainMount:
    """A mount that was attached here and needs nobody to serve it."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint

    def unmount(self) -> None:
        """Take it out of the tree, lazily when it is in use; raise `MountError`."""
        for flags in (0, kernel.MNT_DETACH):
            try:
                kernel.umount(self.mountpoint, flags | kernel.UMOUNT_NOFOLLOW)
            except OSError as error:
                if error.errno == errno.EBUSY and not flags:
                    continue
                # Somebody else has unmounted it.
                if error.errno in (errno.EINVAL, errno.ENOENT):
                    return
                raise MountError(
                    f"cannot unmount: {error.strerror}", error.errno or errno.EIO,
                    path=self.mountpoint,
                ) from error  # fmt: skip
            return
        raise MountBusy("mount is busy", errno.EBUSY, path=self.mountpoint)


def create_tmpfs() -> int:
    """Create a small tmpfs that is attached nowhere; the caller owns it. Raises `OSError`."""
    with ExitStack() as stack:
        context = kernel.fsopen("tmpfs")
        stack.callback(os.close, context)
        kernel.fsconfig_string(context, "source", MOUNT_SOURCE)
        kernel.fsconfig_string(context, "mode", "0755")
        kernel.fsconfig_string(context, "size", _TMPFS_SIZE)
        kernel.fsconfig_create(context)
        return kernel.fsmount(context, 0)


def mount_tmpfs(mountpoint: Path) -> PlainMount:
    """Mount a small tmpfs that only holds directories; raise `MountError`."""
    try:
        mount = create_tmpfs()
        try:
            kernel.move_mount(mount, mountpoint)
        finally:
            os.close(mount)
    except OSError as error:
        raise MountError(
            f"cannot mount a tmpfs: {error.strerror}", error.errno or errno.EIO, path=mountpoint
        ) from error
    return PlainMount(mountpoint)


def mount_bind(
    source: Path, mountpoint: Path, *, read_only: bool = False, follow: bool = False
) -> PlainMount:
    """Bind a directory; raise `MountError`.

    What is mounted on it later does not appear at the source.

    Args:
        source: the directory.
        mountpoint: where it appears.
        read_only: nothing can be written there.
        follow: what is mounted in the source appears, too, also later if the source's own
            mount tells others (or has done so before this namespace was split off).
    """
    try:
        if not stat.S_ISDIR(source.stat().st_mode):
            raise MountError("not a directory", errno.ENOTDIR, path=source)
        mount = kernel.open_tree(source, recursive=follow)
        try:
            if read_only or not follow:
                kernel.make_private(mount, kernel.MOUNT_ATTR_RDONLY if read_only else 0)
            kernel.move_mount(mount, mountpoint)
        finally:
            os.close(mount)
    except OSError as error:
        raise MountError(
            f"cannot bind: {error.strerror}", error.errno or errno.EIO, path=source
        ) from error
    return PlainMount(mountpoint)


def umount_fd(mount: int) -> None:
    """Detach the very mount of a descriptor, with all that is mounted on it; raise `OSError`.

    Covered ones, too. Nothing happens when it is attached nowhere.
    """
    try:
        kernel.umount(Path(f"/proc/self/fd/{mount}"), kernel.MNT_DETACH)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


class Mounted(NamedTuple):
    """What is mounted at a place: type of the file system, and the source it was given."""

    kind: str
    source: str


def _top_line(path: Path) -> MountLine | None:
    target = os.fsencode(os.path.realpath(path))
    here = {line.id: line for line in mounts() if line.mountpoint == target}
    # Nothing at this place has the top one as its parent; mounts beneath may come later.
    parents = {line.parent for line in here.values()}
    return next((line for line in here.values() if line.id not in parents), None)


def mounted_at(path: Path) -> Mounted | None:
    """Return what is on top of the mounts right at a path; None for no mount."""
    line = _top_line(path)
    return Mounted(line.kind, line.source) if line else None


def device_at(path: Path) -> int | None:
    """Return `st_dev` of what is on top right at a path, without asking it; None for no mount.

    Of file systems that give one number to all their files.
    """
    line = _top_line(path)
    return line.device if line else None


def is_our_overlay(path: Path) -> bool:
    """Whether an overlay of ours, or of a daemon that is gone, is on top at a path."""
    return mounted_at(path) == Mounted("overlay", MOUNT_SOURCE)


def clear_leftover(top: Path, source: Path | None) -> None:
    """Take away the mounts of a daemon that died: their holes read as zeros (spec ondemand 5.10).

    Only our own kinds of tmpfs and overlay, and EROFS of the very file that comes now; what
    anybody else has mounted there stays below. Raises `MountError`.
    """
    while (found := mounted_at(top)) is not None:
        if found.kind in ("tmpfs", "overlay"):
            ours = found.source == MOUNT_SOURCE
        else:
            wanted = os.path.realpath(source) if source is not None else None
            ours = found.kind == "erofs" and os.path.realpath(found.source) == wanted
        if not ours:
            return
        logger.error(
            "%s is still mounted by a daemon that is gone: programs that used it since"
            " may have read zeros and have to be restarted; it is unmounted now",
            top,
        )
        PlainMount(top).unmount()


def mounted_below(path: Path) -> list[tuple[bytes, ...]]:
    """Return the places of mounts on the top mount at a path, as names below the path.

    What is mounted on those in turn is not among them.
    """
    top = _top_line(path)
    if top is None:
        return []
    prefix = top.mountpoint.rstrip(b"/") + b"/"
    return [
        tuple(line.mountpoint.removeprefix(prefix).split(b"/"))
        for line in mounts()
        if line.parent == top.id and line.mountpoint.startswith(prefix)
    ]
