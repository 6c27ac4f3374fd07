"""The NBD wire format: its numbers, the requests of a client, and the replies to them.

Pure: bytes in, values out; sockets are in `fscache.nbd.server`. All numbers are big endian.
Source: the protocol of the NetworkBlockDevice project, `doc/proto.md`; `linux/nbd.h`.
"""

from __future__ import annotations

import errno
import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

from erofs.errors import NydusError

__all__ = [
    "MAX_PAYLOAD",
    "Command",
    "CommandFlags",
    "ExportFlags",
    "ProtocolError",
    "Request",
    "RequestParser",
    "simple_reply",
    "structured_data",
    "structured_done",
    "structured_error",
    "structured_hole",
    "wire_error",
]

# What a client may ask for at once, and what everybody accepts.
MAX_PAYLOAD = 32 << 20

_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC = 0x25609513
_SIMPLE_REPLY = struct.Struct(">IIQ")
_SIMPLE_REPLY_MAGIC = 0x67446698
_CHUNK = struct.Struct(">IHHQI")
_CHUNK_MAGIC = 0x668E33EF
_OFFSET = struct.Struct(">Q")
_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")

_CHUNK_DONE = 1
_CHUNK_NONE = 0
_CHUNK_DATA = 1
_CHUNK_HOLE = 2
_CHUNK_ERROR = 0x8001


class ProtocolError(NydusError):
    """A client sent what is not in the protocol; the connection ends."""


class ExportFlags(IntFlag):
    """What a server tells of an export (`NBD_FLAG_*`)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10


class Command(IntEnum):
    """What a request asks for (`NBD_CMD_*`)."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlags(IntFlag):
    """Flags of a request that mean something here (`NBD_CMD_FLAG_*`)."""

    FUA = 1 << 0
    # Do not fragment: one chunk for the whole of a structured reply.
    DF = 1 << 2


# The protocol has numbers of its own; these happen to be those of Linux.
_WIRE_ERRORS = (
    errno.EPERM,
    errno.EIO,
    errno.ENOMEM,
    errno.EINVAL,
    errno.ENOSPC,
    errno.EOVERFLOW,
    errno.ENOTSUP,
    errno.ESHUTDOWN,
)


def wire_error(code: int) -> int:
    """Return the number that the protocol has for an errno, that of `EIO` if it has none."""
    return code if code in _WIRE_ERRORS else errno.EIO


class Request(NamedTuple):
    """A request as it came; nothing of it is checked but its magic and its length.

    Offset and length are in bytes, `cookie` is the client's name for the request.
    """

    flags: int
    command: int
    cookie: int
    offset: int
    length: int

    def pack(self) -> bytes:
        """Encode it, as a client does."""
        return _REQUEST.pack(_REQUEST_MAGIC, *self)


class RequestParser:
    """Cuts the bytes of a client into requests; the payload of writes is passed over.

    The payload comes off the stream before its request is returned, so that the next one is
    found behind it.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._writing: Request | None = None
        self._skip = 0

    def feed(self, data: bytes | memoryview) -> list[Request]:
        """Return the requests that are complete with these bytes.

        Raises:
            ProtocolError: no request, or a write of more than `MAX_PAYLOAD`.
        """
        buffer, found, position = self._buffer, [], 0
        buffer += data
        while True:
            if self._writing is not None:
                taken = min(self._skip, len(buffer) - position)
                position += taken
                self._skip -= taken
                if self._skip:
                    break
                found.append(self._writing)
                self._writing = None
            if len(buffer) - position < _REQUEST.size:
                break
            magic, *fields = _REQUEST.unpack_from(buffer, position)
            if magic != _REQUEST_MAGIC:
                raise ProtocolError(
                    "request with a wrong magic", expected=hex(_REQUEST_MAGIC), got=hex(magic)
                )
            request = Request(*fields)
            position += _REQUEST.size
            if request.command != Command.WRITE:
                found.append(request)
                continue
            if request.length > MAX_PAYLOAD:
                raise ProtocolError("write is too long", expected=MAX_PAYLOAD, got=request.length)
            self._writing, self._skip = request, request.length
        del buffer[:position]
        return found


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """Return the head of a simple reply; without an error the data of a read follow."""
    return _SIMPLE_REPLY.pack(_SIMPLE_REPLY_MAGIC, error, cookie)


def _chunk(kind: int, cookie: int, length: int, *, done: bool) -> bytes:
    return _CHUNK.pack(_CHUNK_MAGIC, _CHUNK_DONE if done else 0, kind, cookie, length)


def structured_data(cookie: int, offset: int, length: int, *, done: bool) -> bytes:
    """Return the head of a chunk of data, which follow."""
    head = _chunk(_CHUNK_DATA, cookie, _OFFSET.size + length, done=done)
    return head + _OFFSET.pack(offset)


def structured_hole(cookie: int, offset: int, length: int, *, done: bool) -> bytes:
    """Return a chunk that says that there are zeros."""
    head = _chunk(_CHUNK_HOLE, cookie, _HOLE.size, done=done)
    return head + _HOLE.pack(offset, length)


def structured_error(cookie: int, error: int) -> bytes:
    """Return the chunk that ends a reply with an error."""
    head = _chunk(_CHUNK_ERROR, cookie, _ERROR.size, done=True)
    return head + _ERROR.pack(error, 0)


def structured_done(cookie: int) -> bytes:
    """Return the chunk that ends a reply without saying more."""
    return _chunk(_CHUNK_NONE, cookie, 0, done=True)
