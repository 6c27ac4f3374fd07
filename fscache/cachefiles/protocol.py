"""Codec of the cachefiles on-demand protocol: bytes in, values out, no descriptor touched.

All numbers are in the machine's byte order. Source: Linux `include/uapi/linux/cachefiles.h`;
spec ondemand 1.3 to 1.10.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from fscache.protocol import ProtocolError

__all__ = [
    "CREAD",
    "MESSAGE_BYTES",
    "NO_OBJECT",
    "BadMessage",
    "Close",
    "Message",
    "Open",
    "Read",
    "command",
    "copen",
    "parse_message",
]

# The kernel's own constant for the longest message.
MESSAGE_BYTES = 1024
# The ioctl that completes a READ, the message id by value: _IOW(0x98, 1, int).
CREAD = 1 << 30 | 4 << 16 | 0x98 << 8 | 1
# Of a CLOSE whose object has lost all its descriptors before it was read (1.10).
NO_OBJECT = 0xFFFFFFFF

_OPEN_CODE, _CLOSE_CODE, _READ_CODE = 0, 1, 2
# One byte less than a page.
_COMMAND_BYTES = 4095
_MAX_ERRNO = 4095
_MAX_SIZE = 1 << 63
_MAX_FD = 1 << 31

# msg_id, opcode, length of the whole message, object_id
_HEADER = struct.Struct("=IIII")
# volume_key_size, cookie_key_size, fd, flags
_OPEN = struct.Struct("=IIII")
# offset, length
_READ = struct.Struct("=QQ")
_NUL = b"\0"


# In place of a descriptor of a bad OPEN.
_NO_FD = -1


class BadMessage(ProtocolError):
    """The kernel sent what this code cannot read.

    `refusable` is the OPEN or READ that can be refused all the same, with what is known of it: the
    descriptor of an OPEN may be negative, a READ has no range. None where nobody can be answered.
    """

    def __init__(self, what: str, refusable: Open | Read | None = None, **where: object) -> None:
        super().__init__(what, **where)
        self.refusable = refusable


class Open(NamedTuple):
    """An object is wanted; `fd` is a descriptor of this process, owned by whoever takes this.

    The keys are without the NUL of the volume key.
    """

    msg_id: int
    object_id: int
    fd: int
    volume_key: bytes
    cookie_key: bytes

    def pack(self) -> bytes:
        """Return the message, as the kernel would send it."""
        keys = self.volume_key + _NUL + self.cookie_key
        sizes = _OPEN.pack(len(self.volume_key) + 1, len(self.cookie_key), self.fd, 0)
        return _pack(self.msg_id, _OPEN_CODE, self.object_id, sizes + keys)


class Close(NamedTuple):
    """An object was withdrawn; nobody waits for an answer."""

    msg_id: int
    object_id: int

    def pack(self) -> bytes:
        """Return the message, as the kernel would send it."""
        return _pack(self.msg_id, _CLOSE_CODE, self.object_id, b"")


class Read(NamedTuple):
    """A range of an object is missing; somebody waits. Offset and length in bytes."""

    msg_id: int
    object_id: int
    offset: int
    length: int

    def pack(self) -> bytes:
        """Return the message, as the kernel would send it."""
        body = _READ.pack(self.offset, self.length)
        return _pack(self.msg_id, _READ_CODE, self.object_id, body)


Message = Open | Close | Read


def _pack(msg_id: int, opcode: int, object_id: int, body: bytes) -> bytes:
    return _HEADER.pack(msg_id, opcode, _HEADER.size + len(body), object_id) + body


def parse_message(buffer: bytes) -> Message:
    """Decode what one `read` of the device returned.

    Raises:
        BadMessage: lengths that do not fit, an unknown opcode, or keys without their end.
    """
    if len(buffer) < _HEADER.size:
        raise BadMessage("truncated message", expected=f"{_HEADER.size} bytes", got=len(buffer))
    msg_id, opcode, length, object_id = _HEADER.unpack_from(buffer)
    if opcode == _OPEN_CODE:
        return _parse_open(buffer, msg_id, length, object_id)
    if opcode == _READ_CODE:
        expected = _HEADER.size + _READ.size
        _check_length(buffer, length, expected, Read(msg_id, object_id, 0, 0))
        return Read(msg_id, object_id, *_READ.unpack_from(buffer, _HEADER.size))
    if opcode == _CLOSE_CODE:
        _check_length(buffer, length, _HEADER.size, None)
        return Close(msg_id, object_id)
    raise BadMessage("unknown opcode", got=opcode)


def _check_length(buffer: bytes, length: int, expected: int, refusable: Open | Read | None) -> None:
    if not length == len(buffer) == expected:
        raise BadMessage(
            "message of the wrong length",
            refusable,
            expected=expected,
            got=f"{len(buffer)} bytes that say {length}",
        )


def _parse_open(buffer: bytes, msg_id: int, length: int, object_id: int) -> Open:
    start = _HEADER.size + _OPEN.size
    refusable = Open(msg_id, object_id, _NO_FD, b"", b"")
    if len(buffer) < start:
        raise BadMessage("truncated OPEN", refusable, expected=f"{start} bytes", got=len(buffer))
    volume_size, cookie_size, fd, _flags = _OPEN.unpack_from(buffer, _HEADER.size)
    if fd >= _MAX_FD:
        raise BadMessage("OPEN without a descriptor", refusable, got=fd)
    refusable = refusable._replace(fd=fd)
    _check_length(buffer, length, start + volume_size + cookie_size, refusable)
    volume = buffer[start : start + volume_size]
    if not volume.endswith(_NUL):
        raise BadMessage("volume key without its end", refusable, got=volume)
    return Open(msg_id, object_id, fd, volume.rstrip(_NUL), buffer[start + volume_size :])


def command(name: str, argument: bytes = b"") -> bytes:
    """Return the bytes of one `write` to the device.

    Raises:
        ProtocolError: what the kernel would cut or misread.
    """
    text = name.encode("ascii") + (b" " + argument if argument else b"")
    if len(text) > _COMMAND_BYTES:
        raise ProtocolError("command too long", expected=f"{_COMMAND_BYTES} bytes", got=len(text))
    if set(text) & set(b"\0\n"):
        raise ProtocolError("command with a NUL or a line feed", got=text)
    return text


def copen(msg_id: int, answer: int) -> bytes:
    """Return the answer to an OPEN: a size in bytes, or a negative errno.

    Raises:
        ProtocolError: neither; the kernel would fail the open.
    """
    if not -_MAX_ERRNO <= answer < _MAX_SIZE:
        raise ProtocolError("neither a size nor an error", got=answer)
    return command("copen", b"%d,%d" % (msg_id, answer))
