"""Overlay mounts: a read-only view of several layers, and a writable layer over an image."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from fscache import kernel
from fscache.mounts.mount import MountError
from fscache.mounts.place import MOUNT_SOURCE, PlainMount, is_our_overlay
from fscache.settings import OverlayConfig

__all__ = ["WritableMount", "adopt_writable", "create_overlay", "mount_writable"]

logger = logging.getLogger(__name__)


_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def _through(fd: int) -> str:
    """Return a path for fsconfig, whose strings are short and know no relative paths."""
    return f"/proc/self/fd/{fd}"


def create_overlay(lowers: Sequence[int]) -> int:
    """Create a read-only overlay that is attached nowhere; the caller owns it.

    What the image says about other overlays is not followed, so that it looks the same with
    and without a layer above it; only its whiteouts (character devices 0:0) are hidden.

    Args:
        lowers: descriptors of two layers or more, the topmost first, which may be attached
            nowhere (Linux 6.15).

    Raises:
        OSError: with the kernel's own messages.
    """
    with ExitStack() as stack:
        context = kernel.fsopen("overlay")
        stack.callback(os.close, context)
        kernel.fsconfig_string(context, "source", MOUNT_SOURCE)
        for lower in lowers:
            kernel.fsconfig_string(context, "lowerdir+", _through(lower))
        kernel.fsconfig_string(context, "redirect_dir", "nofollow")
        kernel.fsconfig_string(context, "metacopy", "off")
        kernel.fsconfig_flag(context, "ro")
        kernel.fsconfig_create(context)
        return kernel.fsmount(context, kernel.MOUNT_ATTR_RDONLY)


class WritableMount(PlainMount):
    """A writable overlay; holds a lock of its upper directory, which nobody else may use."""

    def __init__(self, mountpoint: Path, lock: int) -> None:
        super().__init__(mountpoint)
        self._lock = lock

    def unmount(self) -> None:
        """Take it out of the tree, lazily when it is in use; raise `MountError`."""
        super().unmount()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def mount_writable(mountpoint: Path, layer: OverlayConfig) -> WritableMount:
    """Mount a writable overlay over what is mounted at a directory.

    What is written stays in `layer.upper_dir`.

    Raises:
        MountError: the directories are not there, or cannot serve; nothing stays behind.
    """
    with ExitStack() as stack, ExitStack() as kept:
        upper = _layer(kept, "upper_dir", layer.upper_dir)
        work = _layer(stack, "work_dir", layer.work_dir)
        try:
            # The kernel only warns of a second overlay, which would spoil the files of both.
            fcntl.flock(upper, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MountError(
                "overlay.upper_dir is used by another mount", errno.EBUSY, path=layer.upper_dir
            ) from error
        try:
            lower = _closing(stack, os.open(mountpoint, _DIRECTORY | os.O_PATH))
            context = _closing(stack, kernel.fsopen("overlay"))
            kernel.fsconfig_string(context, "source", MOUNT_SOURCE)
            kernel.fsconfig_string(context, "lowerdir+", _through(lower))
            kernel.fsconfig_string(context, "upperdir", _through(upper))
            kernel.fsconfig_string(context, "workdir", _through(work))
            kernel.fsconfig_create(context)
            mount = _closing(stack, kernel.fsmount(context, 0))
            kernel.move_mount(mount, mountpoint)
        except OSError as error:
            raise MountError(
                "overlay.upper_dir and overlay.work_dir cannot serve: an empty work_dir beside"
                " upper_dir is needed, on one local file system such as ext4, xfs or btrfs"
                f" ({error.strerror})",
                error.errno or errno.EIO,
                path=layer.upper_dir,
            ) from error
        kept.pop_all()
    return WritableMount(mountpoint, upper)


def adopt_writable(mountpoint: Path, layer: OverlayConfig) -> WritableMount | None:
    """Return the writable overlay that a process which is gone has mounted, if it is there."""
    if not is_our_overlay(mountpoint):
        logger.error("%s: its writable layer is gone, it is read-only", mountpoint)
        return None
    with ExitStack() as stack:
        try:
            lock = _layer(stack, "upper_dir", layer.upper_dir)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (MountError, OSError) as error:
            logger.error("%s is not locked: %s", layer.upper_dir, error)
            lock = -1
        stack.pop_all()
    return WritableMount(mountpoint, lock)


def _layer(stack: ExitStack, key: str, path: Path) -> int:
    try:
        return _closing(stack, os.open(path, _DIRECTORY))
    except OSError as error:
        code = error.errno or errno.EIO
        raise MountError(f"overlay.{key}: {error.strerror}", code, path=path) from error


def _closing(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd
