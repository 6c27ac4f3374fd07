"""FUSE operations as mfusepy calls them, over `ImageFiles`: text and dictionaries, no kernel.

The kernel caches whatever it can: an image never changes under its mount. It also checks
permissions by itself (`default_permissions`).
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from erofs.errors import NydusError
from fscache.fetch.complaints import Complaints
from fscache.imagefiles import ImageFiles

__all__ = ["Operations", "Take"]

logger = logging.getLogger(__name__)

# For ever, as the original has it (2^32 seconds, spec tools 9).
_CACHE_SECONDS = float(1 << 32)
# Reads ahead of readers that the kernel sends without waiting for those before.
_MAX_BACKGROUND = 64
_CAP_POSIX_ACL = 1 << 19
_CAP_CACHE_SYMLINKS = 1 << 23
# A user who may not read them need not know of them (as in the kernel's EROFS).
_TRUSTED = b"trusted."

# Takes name, attributes and following offset of an entry, if it has room for it.
Take = Callable[[bytes, dict[str, int], int], bool]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _replied(
    operation: Callable[Concatenate[Operations, _P], _R],
) -> Callable[Concatenate[Operations, _P], _R]:
    """Turn what an operation raises into the errno that the reader gets."""

    @functools.wraps(operation)
    def reply(self: Operations, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return operation(self, *args, **kwargs)
        except NydusError as error:
            self.complaints.tell("image", str(error))
            raise OSError(errno.EIO, str(error)) from error
        except OSError:
            raise
        except Exception as error:
            # A reader waits in the kernel for this answer, whatever went wrong here.
            logger.exception("a request of the kernel failed")
            raise OSError(errno.EIO, repr(error)) from error

    return reply


class Operations:
    """Answers requests; methods raise `OSError` with the errno of the answer.

    A file handle is the number of the inode, so nothing has to be remembered of open files.

    Args:
        files: the image.
        has_acls: whether the kernel has to ask for access control lists.
        caller: returns user, group and process of the request that is being answered.
        ready: called when the kernel has begun to ask.
    """

    # Times in nanoseconds.
    use_ns = True

    def __init__(
        self,
        files: ImageFiles,
        *,
        has_acls: bool,
        caller: Callable[[], tuple[int, int, int]],
        ready: Callable[[], None],
    ) -> None:
        self._files = files
        self._has_acls = has_acls
        self._caller = caller
        self._ready = ready
        self.complaints = Complaints()

    def init_with_config(self, connection: Any, config: Any) -> None:
        """Agree with the kernel on what it caches; the structures are libfuse's."""
        wanted = _CAP_CACHE_SYMLINKS | (_CAP_POSIX_ACL if self._has_acls else 0)
        connection.want |= connection.capable & wanted
        connection.max_background = _MAX_BACKGROUND
        config.use_ino = 1
        config.nullpath_ok = 1
        config.kernel_cache = 1
        config.entry_timeout = config.negative_timeout = config.attr_timeout = _CACHE_SECONDS
        self._ready()

    def _number(self, path: str | None, handle: int | None = None) -> int:
        """Return the number of an inode, from its handle when there is no path."""
        if path is None:
            if handle is None:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return handle
        return self._files.find(_encode(path))

    @_replied
    def getattr(self, path: str | None, handle: int | None = None) -> dict[str, int]:
        """Return the attributes of a file."""
        return self._files.attributes(self._number(path, handle))

    @_replied
    def readlink(self, path: str) -> str:
        """Return the target of a link."""
        return _decode(self._files.readlink(self._number(path)))

    @_replied
    def statfs(self, path: str) -> dict[str, int]:
        """Return sizes of the whole."""
        return self._files.space()

    @_replied
    def open(self, path: str, flags: int) -> int:
        """Return the handle of a file; the kernel has refused to open it for writing."""
        return self._number(path)

    @_replied
    def opendir(self, path: str) -> int:
        """Return the handle of a directory."""
        return self._number(path)

    @_replied
    def read(self, path: str | None, size: int, offset: int, handle: int) -> bytes:
        """Return bytes of a file; waits for chunks that miss."""
        return self._files.read(handle, offset, size)

    @_replied
    def readdir(self, handle: int, offset: int, take: Take) -> None:
        """Give the entries of a directory from an offset on, until there is no more room."""
        order = self._files.directory(handle).order
        for position in range(offset, len(order)):
            name, number = order[position]
            if not take(name, self._files.attributes(number), position + 1):
                return

    @_replied
    def listxattr(self, path: str) -> list[str]:
        """Return the names of extended attributes."""
        names = self._files.xattrs(self._number(path))
        user, _, _ = self._caller()
        return [_decode(name) for name in names if not user or not name.startswith(_TRUSTED)]

    @_replied
    def getxattr(self, path: str, name: str) -> bytes:
        """Return the value of an extended attribute."""
        try:
            return self._files.xattrs(self._number(path))[_encode(name)]
        except KeyError:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA)) from None
