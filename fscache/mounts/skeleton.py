"""Directories over an image that has none of its own for a mount: a skeleton and its overlay.

Over what is mounted at a directory (the lower mount) comes a read-only overlay of a small
tmpfs, the skeleton, and of that mount. The skeleton has the directories that mounts are
wanted at, and their parents, which look as those of the lower mount.

Layers of a mounted overlay must not change, so for each change a new overlay is made with all
that is mounted on the old one, put beneath it, and then the old one is detached: who opens a
path finds the one or the other whole. Programs that already are in the old one go on there.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from erofs.inode import Inode
from erofs.reader import open_bootstrap
from fscache import kernel
from fscache.mounts.mount import MountError
from fscache.mounts.overlay import create_overlay
from fscache.mounts.place import create_tmpfs, is_our_overlay, mounted_below, umount_fd
from fscache.mounts.treepath import Names, PathError

__all__ = [
    "Attributes",
    "Cover",
    "Look",
    "host_directories",
    "image_directories",
]

logger = logging.getLogger(__name__)

_PERMISSIONS = 0o7777
_NEW_MODE = 0o755
# In the skeleton these would say something about the overlay that is being made.
_OVERLAY_XATTRS = b"trusted.overlay."


class Attributes(NamedTuple):
    """What a directory looks like; `mode` holds the permissions alone."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: Mapping[bytes, bytes]


# Tells of the root, and of the directories along a path as far as they are there.
# Raises PathError when something on the way is no directory.
Look = Callable[[Sequence[bytes]], list[Attributes]]


def image_directories(bootstrap: Path) -> Look:
    """Return what tells of the directories of an image; reads the bootstrap, not a mount."""

    def look(names: Sequence[bytes]) -> list[Attributes]:
        with open_bootstrap(bootstrap) as image:
            inode = image.root
            found = [_of_inode(inode)]
            for name in names:
                entry = inode.lookup(name)
                if entry is None:
                    break
                inode = image.inode(entry.nid)
                if not inode.is_dir:
                    raise _in_the_way(names, "image")
                found.append(_of_inode(inode))
        return found

    return look


def host_directories(top: Path) -> Look:
    """Return what tells of the directories below one of the host; links are not followed."""

    def look(names: Sequence[bytes]) -> list[Attributes]:
        path = top
        found = [_of_path(path)]
        for name in names:
            path /= os.fsdecode(name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                break
            if not stat.S_ISDIR(mode):
                raise _in_the_way(names, "shared directory")
            found.append(_of_path(path))
        return found

    return look


def _in_the_way(names: Sequence[bytes], where: str) -> PathError:
    return PathError(f"a part of the mount point is no directory in the {where}", path=_show(names))


def _show(names: Sequence[bytes]) -> str:
    return "/" + os.fsdecode(b"/".join(names))


def _of_inode(inode: Inode) -> Attributes:
    moment = inode.mtime * 10**9 + inode.mtime_nsec
    return Attributes(inode.mode & _PERMISSIONS, inode.uid, inode.gid, moment, inode.xattrs())


def _of_path(path: Path) -> Attributes:
    status = path.stat()
    xattrs = {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)}
    mode = status.st_mode & _PERMISSIONS
    return Attributes(mode, status.st_uid, status.st_gid, status.st_mtime_ns, xattrs)


def _create_skeleton(paths: Iterable[Names], look: Look) -> int:
    """Create a tmpfs with directories, attached nowhere; raise `OSError` or `PathError`."""
    wanted: dict[Names, Attributes | None] = {}
    for path in paths:
        known = look(path)
        for depth in range(len(path) + 1):
            wanted[path[:depth]] = known[depth] if depth < len(known) else None
    mount = create_tmpfs()
    try:
        root = _by_fd(mount)
        for path in sorted(wanted):
            _place(root, path).mkdir(exist_ok=not path)
        # The deepest first: what is made in a directory changes its time.
        for path in sorted(wanted, reverse=True):
            _apply(_place(root, path), wanted[path])
    except BaseException:
        os.close(mount)
        raise
    return mount


def _apply(path: Path, attributes: Attributes | None) -> None:
    if attributes is None:
        path.chmod(_NEW_MODE)
        return
    for name, value in attributes.xattrs.items():
        if not name.startswith(_OVERLAY_XATTRS):
            try:
                os.setxattr(path, name, value)
            except OSError as error:
                logger.warning("%r of a directory is not shown: %s", name, error.strerror)
    os.chown(path, attributes.uid, attributes.gid)
    # After the owner, whose change takes special bits away.
    path.chmod(attributes.mode)
    os.utime(path, ns=(attributes.mtime_ns, attributes.mtime_ns))


class Cover:
    """Gives directories for mounts to a mount that cannot make any; see the module.

    A cover of ours that is already there, made by a process that is gone, is gone on with.

    Args:
        top: where the lower mount is; nothing else is mounted over it.
        look: tells of its directories.
    """

    def __init__(self, top: Path, look: Look) -> None:
        self.top = top
        self.look = look
        self._overlay = _open(top) if is_our_overlay(top) else -1
        # What has to be on top for a change: the lower mount, or our overlay.
        self._device = top.lstat().st_dev
        # Holding it makes the lower mount busy, so only while it is covered. -1: not known.
        self._lower = -1

    def change(self, paths: Iterable[Names]) -> None:
        """Have directories for these paths and for no others; without any, no overlay.

        Args:
            paths: below `top`, not empty ones.

        Raises:
            PathError: something in the image is in the way, or somebody covers `top`.
            MountError: from the kernel; what was there before stays.
        """
        wanted = set(paths)
        self._require_top()
        below = mounted_below(self.top)
        try:
            if wanted or (below and self._overlay >= 0):
                self._replace(wanted, below)
            else:
                self._remove()
        except OSError as error:
            hint = "; Linux 6.15 is needed" if error.errno == errno.EINVAL else ""
            raise MountError(
                f"cannot mount below an image ({error.filename}: {error.strerror}{hint})",
                error.errno or errno.EIO,
                path=self.top,
            ) from error

    def remove(self) -> None:
        """Take the overlay away with all that is mounted on it; raise `MountError`.

        Its users go on. One that somebody has covered stays.
        """
        try:
            self._remove()
        except (OSError, PathError) as error:
            raise MountError(f"cannot unmount: {error}", path=self.top) from error

    def _require_top(self) -> None:
        if self.top.lstat().st_dev != self._device:
            raise PathError("something else is mounted over it", path=self.top)

    def _replace(self, wanted: set[Names], below: list[Names]) -> None:
        kept = {path for path in below if not self._is_in_lower(path)}
        with ExitStack() as stack:
            skeleton = _create_skeleton(wanted | kept, self.look)
            stack.callback(os.close, skeleton)
            clones = {}
            for path in below:
                clones[path] = kernel.open_tree(_place(self.top, path), recursive=True)
                stack.callback(os.close, clones[path])
            if self._overlay >= 0 and self._lower < 0:
                # The lower mount can be reached from here only when nothing covers it.
                self._remove()
            if self._lower < 0:
                self._lower = _open(self.top)
            try:
                overlay = create_overlay([skeleton, self._lower])
                stack.callback(os.close, overlay)
                for path, clone in clones.items():
                    kernel.move_mount(clone, _place(_by_fd(overlay), path))
                kernel.move_mount(overlay, self.top, beneath=self._overlay >= 0)
            except OSError:
                self._let_go()
                raise
            old, self._overlay = self._overlay, os.dup(overlay)
            self._device = os.fstat(overlay).st_dev
            if old >= 0:
                stack.callback(os.close, old)
                umount_fd(old)

    def _is_in_lower(self, path: Names) -> bool:
        try:
            return len(self.look(path)) > len(path)
        except PathError:
            # Somebody mounted on a file.
            return True

    def _remove(self) -> None:
        if self._overlay < 0:
            return
        self._require_top()
        umount_fd(self._overlay)
        os.close(self._overlay)
        self._overlay = -1
        while self._lower < 0 and is_our_overlay(self.top):
            # Killed in the middle of a change, with the next one beneath.
            kernel.umount(self.top, kernel.MNT_DETACH | kernel.UMOUNT_NOFOLLOW)
        self._let_go()
        self._device = self.top.lstat().st_dev

    def _let_go(self) -> None:
        """Make the lower mount free to be unmounted, when nothing covers it."""
        if self._overlay < 0 and self._lower >= 0:
            os.close(self._lower)
            self._lower = -1


def _open(path: Path) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _by_fd(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}")


def _place(top: Path, names: Names) -> Path:
    return top.joinpath(*(os.fsdecode(name) for name in names))
