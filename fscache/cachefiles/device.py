"""System calls on `/dev/cachefiles` and on the descriptors that come through it, one each.

No state but the descriptor; what is to be called when is `machine`'s and `channel`'s business.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import time
from pathlib import Path

from fscache.cachefiles.errors import CachefilesError, CachefilesMissing
from fscache.cachefiles.protocol import CREAD, MESSAGE_BYTES, command

__all__ = ["DEVICE", "Device", "is_kept"]

DEVICE = Path("/dev/cachefiles")

_PAUSE_SECONDS = 0.05
_OPEN_HINTS = {
    errno.ENOENT: "not available on this kernel: Linux 5.19 to 7.1 have it, by the module"
    " cachefiles, where CONFIG_CACHEFILES_ONDEMAND is set",
    errno.EBUSY: "another process has it: cachefilesd (systemctl disable --now cachefilesd), or"
    " another nydusd, or its holder",
    errno.EPERM: "root (CAP_SYS_ADMIN) is needed",
    errno.EACCES: "root (CAP_SYS_ADMIN) is needed",
}
_BIND_HINTS = {
    errno.EINVAL: "this kernel's cachefiles has no on-demand mode (CONFIG_CACHEFILES_ONDEMAND)",
    errno.ENOENT: "the cache directory does not exist",
    errno.EOPNOTSUPP: "the file system cannot hold the kernel's cache: use ext4, xfs or btrfs with"
    " blocks of at most a page",
    errno.EROFS: "the cache directory is read-only",
    errno.EBUSY: "the cache directory is another cache's",
}


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    # fcntl.ioctl takes signed numbers, and message ids have all 32 bits.
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong]
    libc.ioctl.restype = ctypes.c_int
    return libc


def is_kept(path: Path = DEVICE) -> bool:
    """Whether somebody has the device open."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


class Device:
    """Owner of an open device: use `open`, or give it one that a holder kept."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def open(cls, path: Path = DEVICE, patience: float = 0.0) -> Device:
        """Open the device, which has one opener at a time.

        Args:
            path: of the device.
            patience: seconds to wait for one that has it, and may be just ending.

        Raises:
            CachefilesMissing: the kernel has none.
            CachefilesError: the text names what can be done.
        """
        end = time.monotonic() + patience
        while True:
            try:
                return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            except OSError as error:
                code = error.errno or errno.EIO
                if code != errno.EBUSY or time.monotonic() > end:
                    hint = _OPEN_HINTS.get(code, "cannot be opened")
                    kind = CachefilesMissing if code == errno.ENOENT else CachefilesError
                    raise kind(f"{hint} ({error.strerror})", code, path=path) from error
            time.sleep(_PAUSE_SECONDS)

    def fileno(self) -> int:
        """Return the descriptor; it stays owned by this object."""
        return self._fd

    def close(self) -> None:
        """Close this copy; with the last one the cache and its mounts end."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def write(self, text: bytes) -> None:
        """Give one command; raise `OSError` with the kernel's errno."""
        count = os.write(self._fd, text)
        if count != len(text):
            raise OSError(errno.EIO, f"{count} of {len(text)} bytes taken")

    def read(self) -> bytes:
        """Return one message, nothing when there is none.

        Raises:
            OSError: the kernel has ended the request itself (`EMFILE`), or the cache is dead.
        """
        try:
            return os.read(self._fd, MESSAGE_BYTES)
        except BlockingIOError:
            return b""

    def complete(self, fd: int, msg_id: int) -> None:
        """Complete a READ through a descriptor of its object; raise `OSError`."""
        if _libc().ioctl(fd, CREAD, msg_id) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def bind(self, directory: Path, tag: str | None) -> None:
        """Make a directory the cache, in on-demand mode; once for each opening of the device.

        Raises:
            CachefilesMissing: the kernel has no on-demand mode.
            CachefilesError: the text names what can be done.
        """
        self._set_up("dir", os.fsencode(directory), directory)
        if tag is not None:
            self._set_up("tag", os.fsencode(tag), directory)
        self._set_up("bind", b"ondemand", directory)

    def _set_up(self, name: str, argument: bytes, directory: Path) -> None:
        try:
            self.write(command(name, argument))
        except OSError as error:
            code = error.errno or errno.EIO
            hint = _BIND_HINTS.get(code) if name == "bind" else None
            kind = CachefilesMissing if hint and code == errno.EINVAL else CachefilesError
            raise kind(
                f"{hint or f'the kernel refuses {name!r}'} ({error.strerror})", code, path=directory
            ) from error

    def restore(self) -> bool:
        """Have everything that is unanswered delivered again; False when the kernel cannot.

        Raises:
            CachefilesError: the cache is dead.
        """
        try:
            self.write(command("restore"))
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return False
            raise CachefilesError(
                f"the kernel refuses 'restore' ({error.strerror})", error.errno or errno.EIO
            ) from error
        return True
