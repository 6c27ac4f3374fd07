"""The FUSE channel: a file system of this process, for users without privilege and old kernels.

Mounting and unmounting, and what a killed daemon leaves. Unlike EROFS, nobody can go on with a
mount whose daemon is gone: it answers `ENOTCONN`.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erofs import open_bootstrap
from erofs.errors import NydusError
from erofs.rafs import SuperFlags
from fscache import kernel
from fscache.cache.cachedblob import CachedBlob
from fscache.channel.fuseops import Operations
from fscache.fetch.demand import Demand
from fscache.imagefiles import ImageFiles
from fscache.mounts.mount import DEFAULT_READ_AHEAD_KB, MountBusy, MountError, set_read_ahead
from fscache.mounts.place import MOUNT_SOURCE, Mounted, device_at, mounted_at
from fscache.sharing import LazyUnsupported
from fscache.transport import is_root

__all__ = ["FuseMount", "clear_dead", "is_dead", "mount_fuse", "require_fuse"]

logger = logging.getLogger(__name__)

_KIND = f"fuse.{MOUNT_SOURCE}"
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
_LIBRARIES = ("libfuse3.so.4", "libfuse3.so.3")
_DEVICE = "/dev/fuse"
_HINTS = {
    errno.ENOENT: " (modprobe fuse)",
    errno.ENODEV: " (modprobe fuse)",
    errno.EACCES: " (other systems let everybody open it: chmod 666)",
}
_UNMOUNT = "fusermount3"
_UNMOUNT_SECONDS = 30.0


def _unmount(path: Path, *, lazily: bool) -> None:
    """Unmount, by the setuid helper where this user may not; raise `MountError`."""
    try:
        kernel.umount(path, (kernel.MNT_DETACH if lazily else 0) | kernel.UMOUNT_NOFOLLOW)
        return
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise MountBusy(
                "mount is busy: files in it are in use", errno.EBUSY, path=path
            ) from error
        if error.errno != errno.EPERM:
            code = error.errno or errno.EIO
            raise MountError(f"cannot unmount: {error.strerror}", code, path=path) from error
    try:
        done = subprocess.run(
            [_UNMOUNT, "-u", *(["-z"] if lazily else []), "--", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_UNMOUNT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountError(f"cannot unmount: {error}", path=path) from error
    if done.returncode:
        text = done.stderr.decode("utf-8", "backslashreplace").strip()
        # It has no other way to tell.
        kind = MountError if lazily else MountBusy
        raise kind(f"cannot unmount: {text}", errno.EBUSY, path=path)


def is_dead(mountpoint: Path) -> bool:
    """Return whether a mount of ours is on top at a place, whose daemon is gone."""
    if mounted_at(mountpoint) != Mounted(_KIND, MOUNT_SOURCE):
        return False
    try:
        # The kernel knows attributes by heart, but asks for this each time.
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in _DEAD
    return False


def clear_dead(mountpoint: Path) -> None:
    """Unmount what killed daemons have left at a place; raise `MountError`."""
    while is_dead(mountpoint):
        logger.warning("%s is still mounted by a daemon that is gone: unmounted", mountpoint)
        _unmount(mountpoint.absolute(), lazily=True)


def _options() -> dict[str, Any]:
    """Return the mount options: for root those with which containers can run from it."""
    options: dict[str, Any] = {
        "ro": True,
        "default_permissions": True,
        "fsname": MOUNT_SOURCE,
        "subtype": MOUNT_SOURCE,
    }
    if os.geteuid() == 0:
        options |= {"allow_other": True, "suid": True, "dev": True}
    return options


class FuseMount:
    """An attached FUSE mount and the session that answers it; see `Mount`.

    Args:
        files: the image; closed when the session has ended, also when it could not begin.
        mountpoint: an existing directory.
        has_acls: whether files of the image may have access control lists.

    Raises:
        MountError: it cannot be mounted, with libfuse's reason.
    """

    def __init__(self, files: ImageFiles, mountpoint: Path, *, has_acls: bool) -> None:
        self.mountpoint = mountpoint.absolute()
        self.name: str | None = None
        self._files = files
        self._has_acls = has_acls
        self._target = self.mountpoint.resolve()
        self._begun = threading.Event()
        self._is_mounted = False
        self._failure: NydusError | OSError | None = None
        self._thread = threading.Thread(target=self._serve, name="fuse", daemon=True)
        self._thread.start()
        self._begun.wait()
        if not self._is_mounted:
            raise MountError(f"cannot mount: {self._failure}", path=mountpoint) from self._failure
        # Answered when the kernel knows what was agreed on, which would lessen the read-ahead.
        self.device = os.lstat(self._target).st_dev
        if is_root():
            set_read_ahead(None, self.device, DEFAULT_READ_AHEAD_KB)

    def _ready(self) -> None:
        self._is_mounted = True
        self._begun.set()

    def _serve(self) -> None:
        try:
            # Imported here: libfuse is loaded for those alone who use it.
            from fscache.channel.libfuse import caller, run_session

            operations = Operations(
                self._files, has_acls=self._has_acls, caller=caller, ready=self._ready
            )
            run_session(operations, self._target, _options())
        except (NydusError, OSError) as error:
            if self._is_mounted:
                logger.error("%s: %s", self.mountpoint, error)
            self._failure = error
        finally:
            self._files.close()
            self._begun.set()

    def is_attached(self) -> bool:
        """Return whether this mount is on top at its mount point."""
        return device_at(self._target) == self.device

    def is_gone(self) -> bool:
        """Return whether the session has ended: with its last user, after it was unmounted."""
        return not self._thread.is_alive()

    def unmount(self) -> None:
        """Unmount; nothing happens when something else has unmounted or covered it.

        Raises:
            MountBusy: there are users.
            MountError: any other refusal.
        """
        if self.is_attached():
            _unmount(self._target, lazily=False)

    def detach(self) -> None:
        """Take the mount out of the tree now; it ends with its last user. Raises `MountError`."""
        if self.is_attached():
            _unmount(self._target, lazily=True)

    def close(self) -> None:
        """Do nothing: the session has ended by itself."""


def mount_fuse(
    bootstrap: Path, blobs: Sequence[CachedBlob], demand: Demand, mountpoint: Path
) -> FuseMount:
    """Mount an image by a file system of this process.

    Args:
        bootstrap: RAFS v6; read as long as the mount is there.
        blobs: open, in the order of its device table, until the mount is gone.
        demand: makes their bytes ready.
        mountpoint: an existing directory.

    Raises:
        MountError: it cannot be mounted, with libfuse's reason.
        FormatError: the bootstrap is broken.
    """
    image = open_bootstrap(bootstrap)
    has_acls = SuperFlags.HAS_XATTR in image.flags
    return FuseMount(ImageFiles(image, blobs, demand), mountpoint, has_acls=has_acls)


def _load() -> None:
    """Load libfuse and its binding; raise `LazyUnsupported`."""
    for name in _LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        # The binding would take libfuse 2 where there are both, and start a process to find it.
        os.environ.setdefault("FUSE_LIBRARY_PATH", name)
        break
    else:
        raise LazyUnsupported("no FUSE: libfuse 3 is not installed (Debian: apt install fuse3)")
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError, AttributeError) as error:
        raise LazyUnsupported(f"no FUSE: mfusepy cannot be loaded ({error})") from error


def require_fuse() -> None:
    """Load libfuse; raise `LazyUnsupported` where the kernel or this machine lacks FUSE."""
    _load()
    if not is_root() and shutil.which(_UNMOUNT) is None:
        raise LazyUnsupported(f"no FUSE: {_UNMOUNT} is not installed (Debian: apt install fuse3)")
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "")
        raise LazyUnsupported(f"no FUSE: {error.strerror}: {_DEVICE}{hint}") from error
