"""One request and its answer: refused, read at once, or read when everything is there."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from erofs.errors import NydusError, OutOfBounds
from fscache.cache.cachefile import CacheError
from fscache.nbd import protocol
from fscache.nbd.disk import Data, Disk, Part, Slice
from fscache.nbd.protocol import MAX_PAYLOAD, Command, CommandFlags, Request

__all__ = ["Client", "Pending", "read_file"]

logger = logging.getLogger(__name__)

# Below this a copy costs less than the system call for the file's own pages.
_SENDFILE_BYTES = 16 << 10
_ZEROS = bytes(1 << 20)
_READING = (Command.READ, Command.CACHE)
# An int: the complement of flags has only those that are known.
_FLAGS = int(CommandFlags.FUA | CommandFlags.DF)
_WRITING = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)


class Client(Protocol):
    """Who asked.

    `structured` tells how it wants its replies, `direct` whether files may be sent as such:
    what goes wrong then can no longer be told in a reply.
    """

    structured: bool

    @property
    def disk(self) -> Disk:
        """What is read."""

    @property
    def direct(self) -> bool:
        """See the class."""

    def later(self, answer: Callable[[], None]) -> None:
        """Have another thread call this, or nobody when the connection ends."""

    def reply(self, data: Sequence[Data]) -> None:
        """Send the answer; called exactly once for each request, never raises."""


class Pending:
    """One request, and the duty to answer it."""

    def __init__(self, client: Client, request: Request) -> None:
        self._client = client
        self._request = request
        self._parts: list[Part] = []
        self._lock = threading.Lock()
        self._missing = 1
        self._error: NydusError | None = None

    def begin(self) -> None:
        """Answer at once when that is possible, else when everything is there."""
        code = self._refusal()
        if code or self._request.command not in _READING:
            self._finish(code)
            return
        self._missing += len(self._parts)
        slow = False
        for source, offset, length in self._parts:
            if source is None:
                self._last(None)
            else:
                slow = slow or source.slow
                source.request(offset, length, self._ready)
        if not self._last(None):
            return
        if slow:
            self._client.later(self.answer)
        else:
            self.answer()

    def _refusal(self) -> int:
        """Return the error of a request that cannot be done, 0 for others."""
        request = self._request
        if request.command in _WRITING:
            return errno.EPERM
        if request.command == Command.FLUSH:
            return 0
        # Some clients set FUA on everything.
        if request.command not in _READING or request.flags & ~_FLAGS:
            return errno.EINVAL
        if request.command == Command.READ and request.length > MAX_PAYLOAD:
            return errno.EOVERFLOW
        try:
            self._parts = self._client.disk.parts(request.offset, request.length)
        except OutOfBounds:
            return errno.EINVAL
        return 0

    def _last(self, error: NydusError | None) -> bool:
        """Take the news of a part, or of the beginning; return whether that was all."""
        with self._lock:
            self._missing -= 1
            self._error = self._error or error
            return self._missing == 0

    def _ready(self, error: NydusError | None) -> None:
        if self._last(error):
            self._client.later(self.answer)

    def answer(self) -> None:
        """Read what is ready now, and answer."""
        if self._error is not None:
            self._finish(self._error.errno)
        elif self._request.command == Command.CACHE:
            self._finish(0)
        else:
            self._answer_read()

    def _answer_read(self) -> None:
        try:
            data = [self._data(part) for part in self._parts]
        except NydusError as error:
            logger.warning("reads fail: %s", error)
            self._finish(error.errno)
        except Exception:
            # A reader waits, whatever went wrong here.
            logger.exception("reading the disk failed")
            self._finish(errno.EIO)
        else:
            self._client.reply(self._framed(data))

    def _data(self, part: Part) -> Data | None:
        if part.source is None:
            return None
        found = part.source.read(part.offset, part.length)
        if not isinstance(found, Slice) or (
            self._client.direct and found.length >= _SENDFILE_BYTES
        ):
            return found
        return read_file(found)

    def _framed(self, data: Sequence[Data | None]) -> list[Data]:
        request = self._request
        if not self._client.structured:
            return [protocol.simple_reply(request.cookie), *_whole(self._parts, data)]
        if not data:
            return [protocol.structured_done(request.cookie)]
        if request.flags & CommandFlags.DF:
            place = (request.cookie, request.offset, request.length)
            return [protocol.structured_data(*place, done=True), *_whole(self._parts, data)]
        framed: list[Data] = []
        offset = request.offset
        for number, (part, item) in enumerate(zip(self._parts, data, strict=True), 1):
            frame = protocol.structured_hole if item is None else protocol.structured_data
            framed.append(frame(request.cookie, offset, part.length, done=number == len(data)))
            if item is not None:
                framed.append(item)
            offset += part.length
        return framed

    def _finish(self, code: int) -> None:
        """Answer without data."""
        cookie, code = self._request.cookie, protocol.wire_error(code) if code else 0
        if self._client.structured and self._request.command == Command.READ:
            self._client.reply([protocol.structured_error(cookie, code)])
        else:
            self._client.reply([protocol.simple_reply(cookie, code)])


def _whole(parts: Sequence[Part], data: Sequence[Data | None]) -> list[Data]:
    """Return data with zeros where there are none."""
    whole: list[Data] = []
    for part, item in zip(parts, data, strict=True):
        if item is not None:
            whole.append(item)
            continue
        rest, size = part.length % len(_ZEROS), len(_ZEROS)
        whole += [_ZEROS] * (part.length // size)
        whole.append(memoryview(_ZEROS)[:rest])
    return whole


def read_file(place: Slice) -> bytes:
    """Read a range of a file; raise `CacheError`."""
    try:
        data = os.pread(place.fd, place.length, place.offset)
    except OSError as error:
        raise CacheError.of("cannot be read", error, offset=place.offset) from error
    if len(data) != place.length:
        raise CacheError("file is too short", offset=place.offset, expected=place.length)
    return data
