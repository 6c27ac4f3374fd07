"""libfuse 3 by way of mfusepy: one session from its mount to its end.

Imported when FUSE is used, by `fscache.channel.fuse`, which chooses the library. What mfusepy
lacks is here: entries of directories with their attributes, and libfuse's messages in our log.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections import deque
from pathlib import Path
from typing import Any

import mfusepy

from erofs.errors import NydusError
from fscache import kernel
from fscache.channel.fuseops import Operations

__all__ = ["SessionError", "caller", "run_session"]

logger = logging.getLogger(__name__)
# It tells of each request.
logging.getLogger("fuse").setLevel(logging.INFO)

# Idle threads that stay, and all of them: each waiting read has one, and there must be others
# for what does not wait.
_IDLE_THREADS = 16
_MAX_THREADS = 1000
_MAX_THREADS_SINCE = (3, 12)
_FILL_DIR_PLUS = 2
_READDIR_PLUS = 1
_MESSAGE_BYTES = 1024
_SYSLOG_LEVELS = (logging.ERROR,) * 4 + (logging.WARNING, logging.INFO, logging.INFO)


class SessionError(NydusError):
    """libfuse cannot mount, or a session did not end well; the text has its reason."""


class _Messages:
    """Puts libfuse's messages into our log, and keeps the last ones for an error."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self.last: deque[str] = deque(maxlen=3)
        # A `va_list` argument is a pointer on all machines that `fscache.kernel` knows.
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        # Kept: libfuse calls it as long as the process lives. mfusepy has no name for the function.
        self._callback = prototype(self._take)
        mfusepy._libfuse.fuse_set_log_func(self._callback)

    def _take(self, level: int, form: bytes, values: int) -> None:
        buffer = ctypes.create_string_buffer(_MESSAGE_BYTES)
        self._libc.vsnprintf(
            buffer, ctypes.c_size_t(_MESSAGE_BYTES), ctypes.c_char_p(form), ctypes.c_void_p(values)
        )
        text = buffer.value.decode("utf-8", "backslashreplace").strip()
        self.last.append(text)
        logger.log(_SYSLOG_LEVELS[level] if level < len(_SYSLOG_LEVELS) else logging.DEBUG, text)


_messages = _Messages()


class _Session(mfusepy.FUSE):  # type: ignore[misc]  # it has no types
    """mfusepy's session; the constructor returns when it has ended."""

    def opendir(self, path: bytes, info: Any) -> int:
        """Open a directory whose entries the kernel may keep, as it keeps the content of files.

        libfuse tells it from 3.16 on.
        """
        status: int = super().opendir(path, info)
        info.contents.cache_readdir = info.contents.keep_cache = 1
        return status

    def readdir_fuse_3(
        self, path: bytes | None, buffer: Any, filler: Any, offset: int, info: Any, flags: int
    ) -> int:
        """Fill in entries with their attributes, so that nobody has to ask for each of them."""
        status = mfusepy.c_stat()
        fill = _FILL_DIR_PLUS if flags & _READDIR_PLUS else 0

        def take(name: bytes, attributes: dict[str, int], following: int) -> bool:
            mfusepy.set_st_attrs(status, attributes, use_ns=True)
            return bool(filler(buffer, name, status, following, fill) == 0)

        self.operations.readdir(info.contents.fh, offset, take)
        return 0


def caller() -> tuple[int, int, int]:
    """Return user, group and process of the request that this thread answers."""
    user, group, process = mfusepy.fuse_get_context()
    return user, group, process


def run_session(operations: Operations, mountpoint: Path, options: dict[str, Any]) -> None:
    """Mount, answer requests by threads of libfuse, return when the file system has ended.

    For a thread of its own: its working directory becomes the root directory. Handlers of
    signals that have none end the session.

    Args:
        operations: the answers.
        mountpoint: an absolute path.
        options: mount options; True for those without a value.

    Raises:
        SessionError: it could not be mounted, or its end was an error; with libfuse's reason.
    """
    kernel.unshare_directory()
    threads = {"max_idle_threads": _IDLE_THREADS}
    if (mfusepy.fuse_version_major, mfusepy.fuse_version_minor) >= _MAX_THREADS_SINCE:
        threads["max_threads"] = _MAX_THREADS
    _messages.last.clear()
    try:
        place = os.fsencode(mountpoint).decode("utf-8", "surrogateescape")
        _Session(operations, place, foreground=True, **threads, **options)
    except RuntimeError as error:
        reason = "; ".join(_messages.last) or f"libfuse's error {error}"
        raise SessionError(f"the FUSE session failed ({reason})") from error
