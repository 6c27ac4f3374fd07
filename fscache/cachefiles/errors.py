"""The errors of this package."""

from __future__ import annotations

import errno

from erofs.errors import NydusError

__all__ = ["CachefilesError", "CachefilesMissing"]


class CachefilesError(NydusError):
    """The kernel's cachefiles cannot be served, or refuses something; `errno` is the kernel's."""

    def __init__(self, what: str, code: int = errno.EIO, **where: object) -> None:
        super().__init__(what, **where)
        self.errno = code


class CachefilesMissing(CachefilesError):
    """The running kernel has no cachefiles on demand."""
