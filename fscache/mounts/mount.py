"""EROFS mounts through the new mount API: make, tune, unmount, and tell when one is gone.

What the mounted files hold, and who fills them, is decided elsewhere.
Source: spec ondemand 2.6, 5.6, 5.14; Linux `fs/erofs/super.c`.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from erofs.errors import NydusError
from fscache import kernel

__all__ = [
    "DEFAULT_READ_AHEAD_KB",
    "ErofsMount",
    "MountBusy",
    "MountError",
    "attach_mount",
    "create_mount",
    "mount_erofs",
    "set_read_ahead",
]

logger = logging.getLogger(__name__)

DEFAULT_READ_AHEAD_KB = 1024

# fsconfig takes strings below 256 bytes, the terminating NUL included.
_STRING_BYTES = 255
_SYSFS = Path("/sys/fs/erofs")
_BDI = Path("/sys/class/bdi")

# _IOR(0x15, 1, struct fs_sysfs_path): one length byte, then 128 of text (Linux 6.9+).
_FS_IOC_GETFSSYSFSPATH = 2 << 30 | 129 << 16 | 0x15 << 8 | 1

_HINTS = {
    errno.ENOTBLK: "EROFS cannot be mounted from files here: Linux 6.12 and a bootstrap on"
    " ext4, xfs or btrfs are needed (not overlayfs or tmpfs)",
    errno.ENODEV: "this kernel has no erofs (CONFIG_EROFS_FS)",
    errno.EPERM: "root (CAP_SYS_ADMIN) is needed to mount",
    errno.EINVAL: "the kernel refuses the image or the number of its devices",
}


class MountError(NydusError):
    """A mount that cannot be made or undone; `errno` is the kernel's."""

    def __init__(self, what: str, code: int = errno.EIO, **where: object) -> None:
        super().__init__(what, **where)
        self.errno = code


class MountBusy(MountError):
    """A mount that still has users: open files, working directories, mounts below."""


def _mount_error(error: OSError, path: Path) -> MountError:
    code = error.errno or errno.EIO
    text = f"{error.filename}: {error.strerror}"
    hint = _HINTS.get(code)
    return MountError(f"{hint} ({text})" if hint else f"cannot mount: {text}", code, path=path)


def _reachable(path: Path, stack: ExitStack) -> str:
    """Return a string for `path` that fits into fsconfig, valid as long as `stack` is open.

    A long path goes through `/proc/self/fd`: it is the same directory entry, so a mark
    of its directory counts (tried on 6.18). `O_PATH` opens raise no events.
    """
    absolute = path.absolute()
    if len(os.fsencode(absolute)) <= _STRING_BYTES:
        return str(absolute)
    fd = os.open(absolute, os.O_PATH | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return f"/proc/self/fd/{fd}"


def _check_source(path: Path) -> None:
    """Name the path that is wrong: the kernel's errno does not tell which one it was."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        code = error.errno or errno.EIO
        raise MountError(f"cannot mount: {error.strerror}", code, path=path) from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise MountError("neither a file nor a block device", errno.EINVAL, path=path)


def create_mount(source: Path, devices: Sequence[Path], *, directio: bool = False) -> int:
    """Create a read-only EROFS mount that is attached nowhere and return its descriptor.

    The caller owns it; the mount ends with it unless it was attached. Its files can be
    opened relative to it.

    Args:
        source: bootstrap, a plain file or a block device.
        devices: data files in the order of the device slots; none for a flat image.
        directio: read the data files past the page cache.

    Raises:
        MountError: with path, reason and the kernel's own messages.
    """
    for path in (source, *devices):
        _check_source(path)
    with ExitStack() as stack:
        try:
            context = kernel.fsopen("erofs")
            stack.callback(os.close, context)
            kernel.fsconfig_flag(context, "ro")
            kernel.fsconfig_string(context, "source", _reachable(source, stack))
            for device in devices:
                kernel.fsconfig_string(context, "device", _reachable(device, stack))
            if directio:
                kernel.fsconfig_flag(context, "directio")
            kernel.fsconfig_create(context)
            return kernel.fsmount(context, kernel.MOUNT_ATTR_RDONLY)
        except OSError as error:
            raise _mount_error(error, source) from error


def _sysfs_name(root: int) -> str | None:
    """Ask the kernel for the name of a file system below `/sys/fs/erofs`; None if it has none."""
    answer = bytearray(129)
    try:
        fcntl.ioctl(root, _FS_IOC_GETFSSYSFSPATH, answer)
    except OSError as error:
        logger.debug("no sysfs path from the kernel: %s", error)
        return None
    kind, _, name = bytes(answer[1 : 1 + answer[0]]).partition(b"/")
    text = name.decode("ascii", "backslashreplace")
    if kind != b"erofs" or not text or "/" in text or not (_SYSFS / text).is_dir():
        return None
    return text


def set_read_ahead(name: str | None, device: int, kilobytes: int) -> None:
    """Set the read-ahead window; block devices have their number as name. Failure is logged."""
    number = f"{os.major(device)}:{os.minor(device)}"
    bdi = _BDI / (name if name and (_BDI / name).exists() else number)
    try:
        (bdi / "read_ahead_kb").write_text(str(kilobytes))
    except OSError as error:
        logger.warning("read-ahead stays as it is: %s", error)


class ErofsMount:
    """An attached EROFS mount.

    `mountpoint` is where it was attached, `device` its `st_dev`, `name` its entry below
    `/sys/fs/erofs` (None on kernels before 6.9 or without sysfs). Dropping the object
    does not unmount.
    """

    def __init__(self, mountpoint: Path, device: int, name: str | None) -> None:
        self.mountpoint = mountpoint
        self.device = device
        self.name = name
        self._target = mountpoint.resolve()

    def is_attached(self) -> bool:
        """Return whether this mount is on top at its mount point."""
        try:
            return self._target.lstat().st_dev == self.device
        except OSError:
            return False

    def is_gone(self) -> bool:
        """Return whether the file system has ended, not only its place in the tree.

        After a lazy unmount it lives until its last user closes. Without a `name` this
        cannot be told, and the place in the tree decides.
        """
        if self.name is None:
            return not self.is_attached()
        return not (_SYSFS / self.name).exists()

    def _umount(self, flags: int) -> None:
        if not self.is_attached():
            return
        try:
            kernel.umount(self._target, flags | kernel.UMOUNT_NOFOLLOW)
        except OSError as error:
            where = {"path": self.mountpoint}
            if error.errno == errno.EBUSY:
                raise MountBusy(
                    "mount is busy: files in it are in use", errno.EBUSY, **where
                ) from error
            code = error.errno or errno.EIO
            raise MountError(f"cannot unmount: {error.strerror}", code, **where) from error

    def unmount(self) -> None:
        """Unmount; nothing happens when something else has unmounted or covered it.

        Raises:
            MountBusy: there are users.
            MountError: any other refusal.
        """
        self._umount(0)

    def detach(self) -> None:
        """Take the mount out of the tree now; it ends with its last user (see `is_gone`)."""
        self._umount(kernel.MNT_DETACH)

    def close(self) -> None:
        """Do nothing: who answers is the same for many mounts."""


def mount_erofs(
    source: Path,
    devices: Sequence[Path],
    mountpoint: Path,
    *,
    directio: bool = False,
    read_ahead_kb: int = DEFAULT_READ_AHEAD_KB,
    before_attach: Callable[[ErofsMount], None] | None = None,
) -> ErofsMount:
    """Mount an EROFS image read-only on an existing directory; see `create_mount`.

    `before_attach` is called while the mount exists and nobody can reach it; if it raises,
    the mount is gone. For lazy data files the mark has to be there before
    (`FanotifyChannel`), the paths have to lead through the marked directory, and the
    bootstrap must not.

    Raises:
        MountError: with path, reason and the kernel's own messages; nothing stays behind.
    """
    if not mountpoint.is_dir():
        raise MountError("mount point is not a directory", errno.ENOTDIR, path=mountpoint)
    mount = create_mount(source, devices, directio=directio)
    return attach_mount(mount, mountpoint, read_ahead_kb=read_ahead_kb, before_attach=before_attach)


def attach_mount(
    mount: int,
    mountpoint: Path,
    *,
    name: str | None = None,
    read_ahead_kb: int | None = DEFAULT_READ_AHEAD_KB,
    before_attach: Callable[[ErofsMount], None] | None = None,
) -> ErofsMount:
    """Attach an EROFS mount that nobody can reach yet; see `mount_erofs`.

    Args:
        mount: its descriptor, closed in any case.
        mountpoint: an existing directory.
        name: its entry below `/sys/fs/erofs`, where the caller knows it.
        read_ahead_kb: of its files; None is the kernel's own.
        before_attach: see `mount_erofs`.

    Raises:
        MountError: nothing stays behind.
    """
    try:
        root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        try:
            device = os.fstat(root).st_dev
            name = name or _sysfs_name(root)
        finally:
            os.close(root)
        # Before anybody can read.
        if read_ahead_kb is not None:
            set_read_ahead(name, device, read_ahead_kb)
        result = ErofsMount(mountpoint.absolute(), device, name)
        if before_attach is not None:
            before_attach(result)
        kernel.move_mount(mount, result.mountpoint.resolve())
    except OSError as error:
        code = error.errno or errno.EIO
        raise MountError(
            f"cannot attach the mount: {error.strerror}", code, path=mountpoint
        ) from error
    finally:
        os.close(mount)
    return result
