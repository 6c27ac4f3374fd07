"""Mounts that hold no image: the private tmpfs that images hang below, and bind mounts."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from fscache import kernel
from fscache.mount import MountBusy, MountError

__all__ = ["TMPFS_SOURCE", "Mounted", "PlainMount", "mount_bind", "mount_tmpfs", "mounted_at"]

# Tells our tmpfs from anybody else's.
TMPFS_SOURCE = "nydusd"
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


def mount_tmpfs(mountpoint: Path) -> PlainMount:
    """Mount a small tmpfs that only holds directories; raise `MountError`."""
    with ExitStack() as stack:
        try:
            context = kernel.fsopen("tmpfs")
            stack.callback(os.close, context)
            kernel.fsconfig_string(context, "source", TMPFS_SOURCE)
            kernel.fsconfig_string(context, "mode", "0755")
            kernel.fsconfig_string(context, "size", _TMPFS_SIZE)
            kernel.fsconfig_create(context)
            mount = kernel.fsmount(context, 0)
            stack.callback(os.close, mount)
            kernel.move_mount(mount, mountpoint)
        except OSError as error:
            raise MountError(
                f"cannot mount a tmpfs: {error.strerror}", error.errno or errno.EIO,
                path=mountpoint,
            ) from error  # fmt: skip
    return PlainMount(mountpoint)


def mount_bind(source: Path, mountpoint: Path) -> PlainMount:
    """Bind a directory; raise `MountError`."""
    try:
        if not stat.S_ISDIR(source.stat().st_mode):
            raise MountError("not a directory", errno.ENOTDIR, path=source)
        mount = kernel.open_tree(source)
        try:
            kernel.move_mount(mount, mountpoint)
        finally:
            os.close(mount)
    except OSError as error:
        raise MountError(
            f"cannot bind: {error.strerror}", error.errno or errno.EIO, path=source
        ) from error
    return PlainMount(mountpoint)


class Mounted(NamedTuple):
    """What is mounted at a place: type of the file system, and the source it was given."""

    kind: str
    source: str


def mounted_at(path: Path) -> Mounted | None:
    """Return what is on top of the mounts right at a path, from mountinfo; None for no mount."""
    target = os.fsencode(os.path.realpath(path))
    found = None
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        head, _, tail = line.partition(b" - ")
        if _unescape(head.split()[4]) == target:
            kind, source = tail.split()[:2]
            found = Mounted(os.fsdecode(kind), os.fsdecode(_unescape(source)))
    return found


def _unescape(field: bytes) -> bytes:
    """Undo the octal escapes of mountinfo."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 0xFF]), field)
