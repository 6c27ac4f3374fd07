"""Loop devices for kernels that cannot mount EROFS from plain files (before 6.12).

For complete files only: the loop driver reads its file without pre-content events, so a
hole in it is zeros (spec ondemand 5.5). Source: Linux `include/uapi/linux/loop.h`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from erofs.errors import NydusError

__all__ = ["LoopDevice", "LoopError"]

_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16
_NAME_BYTES = 64
_ATTEMPTS = 64

# struct loop_config: fd, block_size, struct loop_info64, 8 reserved words.
_CONFIG = struct.Struct("=II" + "5Q4I" + f"{_NAME_BYTES}s64s32s2Q" + "64s")


class LoopError(NydusError):
    """No loop device could be set up."""


class LoopDevice:
    """A read-only block device over a file, set free with its last user.

    `path` is the device node. This object is one user, a mount is another: close it as
    soon as the mount exists, and the device goes away with the mount.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def attach(cls, file: Path) -> LoopDevice:
        """Put a free loop device over `file`; raise `LoopError`."""
        try:
            backing = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LoopError(f"cannot open: {error.strerror}", path=file) from error
        try:
            for _ in range(_ATTEMPTS):
                device = cls._try_attach(backing, file)
                if device is not None:
                    return device
        except OSError as error:
            raise LoopError(f"no loop device: {error}", path=file) from error
        finally:
            os.close(backing)
        raise LoopError("every free loop device was taken by somebody else", path=file)

    @classmethod
    def _try_attach(cls, backing: int, file: Path) -> LoopDevice | None:
        """Configure the next free device; None when another process was faster."""
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
        finally:
            os.close(control)
        path = Path(f"/dev/loop{number}")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            flags = _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR | _LO_FLAGS_DIRECT_IO
            name = os.fsencode(file)[: _NAME_BYTES - 1]
            words = (0, 0, 0, 0, 0, 0, 0, 0, flags)
            config = _CONFIG.pack(backing, 0, *words, name, b"", b"", 0, 0, b"")
            fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
        except OSError as error:
            os.close(fd)
            if error.errno == errno.EBUSY:
                return None
            raise
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd)

    def close(self) -> None:
        """Stop being a user of the device."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> LoopDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
