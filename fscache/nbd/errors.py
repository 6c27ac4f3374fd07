"""What goes wrong with the kernel's NBD client."""

from __future__ import annotations

import errno

from erofs.errors import NydusError

__all__ = ["DeviceError"]


class DeviceError(NydusError):
    """A device that cannot be had, attached or detached; `errno` is the kernel's."""

    def __init__(self, what: str, code: int = errno.EIO, **where: object) -> None:
        super().__init__(what, **where)
        self.errno = code
