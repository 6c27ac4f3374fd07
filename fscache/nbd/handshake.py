"""The server's side of the newstyle handshake: which export, and how to talk about it.

Pure: bytes in, bytes out. Only the fixed newstyle is spoken, without TLS. Source: the
protocol of the NetworkBlockDevice project, `doc/proto.md`, "Fixed newstyle negotiation".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import NamedTuple

from fscache.nbd.protocol import MAX_PAYLOAD, ExportFlags, ProtocolError

__all__ = ["Export", "Handshake", "Option", "Phase", "ReplyKind"]

_GREETING = struct.Struct(">8sQH")
_GREETING_MAGIC = b"NBDMAGIC"
_OPTION_MAGIC = 0x49484156454F5054
_FIXED_NEWSTYLE = 1
_NO_ZEROES = 2
_CLIENT_FLAGS = struct.Struct(">I")
_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
_REPLY_MAGIC = 0x3E889045565A9
_LENGTH = struct.Struct(">I")
_SHORT = struct.Struct(">H")
_EXPORT = struct.Struct(">QH")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")
_EXPORT_ZEROES = bytes(124)
# Names have at most 4096 bytes; no option of a sound client comes near this.
_MAX_OPTION = 1 << 16
_MAX_OPTIONS = 1000
_PREFERRED_BLOCK = 1 << 16


class Option(IntEnum):
    """What a client may ask for (`NBD_OPT_*`)."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8


class ReplyKind(IntEnum):
    """How a server answers an option (`NBD_REP_*`)."""

    ACK = 1
    SERVER = 2
    INFO = 3
    UNSUPPORTED = 0x80000001
    INVALID = 0x80000003
    UNKNOWN = 0x80000006
    TOO_BIG = 0x80000009


class _Info(IntEnum):
    EXPORT = 0
    NAME = 1
    BLOCK_SIZE = 3


class Export(NamedTuple):
    """What a client is told of an export; `size` in bytes."""

    size: int
    flags: ExportFlags


class Phase(Enum):
    """Where a handshake is."""

    FLAGS = "flags"
    OPTIONS = "options"
    TRANSMISSION = "transmission"
    CLOSED = "closed"


class Handshake:
    """One handshake: send `greeting`, then what `receive` returns, until the phase is an end.

    `export` is what the client chose, `structured` whether it wants structured replies, and
    `rest` what it has sent behind its last option.

    Args:
        exports: by name; the one named `b""` is the default.
    """

    def __init__(self, exports: Mapping[bytes, Export]) -> None:
        self._exports = exports
        self._buffer = bytearray()
        self._zeroes = True
        self._options = 0
        self.phase = Phase.FLAGS
        self.export: Export | None = None
        self.structured = False

    @property
    def rest(self) -> bytes:
        """What came behind the handshake."""
        return bytes(self._buffer)

    def greeting(self) -> bytes:
        """Return what the server says first."""
        return _GREETING.pack(_GREETING_MAGIC, _OPTION_MAGIC, _FIXED_NEWSTYLE | _NO_ZEROES)

    def receive(self, data: bytes) -> bytes:
        """Take what a client sent, and return the answers to it.

        Raises:
            ProtocolError: after which there is nothing to answer.
        """
        self._buffer += data
        answers = bytearray()
        if self.phase is Phase.FLAGS:
            self._take_flags()
        while self.phase is Phase.OPTIONS:
            option = self._next_option()
            if option is None:
                break
            answers += self._answer(*option)
        return bytes(answers)

    def _take(self, length: int) -> bytes:
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        return data

    def _take_flags(self) -> None:
        if len(self._buffer) < _CLIENT_FLAGS.size:
            return
        (flags,) = _CLIENT_FLAGS.unpack(self._take(_CLIENT_FLAGS.size))
        if flags & ~(_FIXED_NEWSTYLE | _NO_ZEROES):
            raise ProtocolError("client with unknown flags", got=hex(flags))
        self._zeroes = not flags & _NO_ZEROES
        self.phase = Phase.OPTIONS

    def _next_option(self) -> tuple[int, bytes] | None:
        if len(self._buffer) < _OPTION.size:
            return None
        magic, option, length = _OPTION.unpack_from(self._buffer)
        if magic != _OPTION_MAGIC:
            raise ProtocolError("option with a wrong magic", got=hex(magic))
        if length > _MAX_OPTION:
            raise ProtocolError("option is too long", expected=_MAX_OPTION, got=length)
        if len(self._buffer) < _OPTION.size + length:
            return None
        self._options += 1
        if self._options > _MAX_OPTIONS:
            raise ProtocolError("too many options", expected=_MAX_OPTIONS)
        return option, self._take(_OPTION.size + length)[_OPTION.size :]

    def _answer(self, option: int, data: bytes) -> bytes:
        match option:
            case Option.EXPORT_NAME:
                return self._export_name(data)
            case Option.ABORT:
                self.phase = Phase.CLOSED
                return _reply(option, ReplyKind.ACK)
            case Option.LIST:
                return self._list(data)
            case Option.INFO | Option.GO:
                return self._info(option, data)
            case Option.STRUCTURED_REPLY:
                if data:
                    return _reply(option, ReplyKind.INVALID)
                self.structured = True
                return _reply(option, ReplyKind.ACK)
        return _reply(option, ReplyKind.UNSUPPORTED)

    def _export_name(self, name: bytes) -> bytes:
        """Begin with an export in the old way, which has no reply for errors."""
        export = self._exports.get(name)
        if export is None:
            raise ProtocolError("no export of that name", got=repr(name))
        self._begin(export)
        zeroes = _EXPORT_ZEROES if self._zeroes else b""
        return _EXPORT.pack(export.size, self._flags(export)) + zeroes

    def _begin(self, export: Export) -> None:
        self.export = export
        self.phase = Phase.TRANSMISSION

    def _flags(self, export: Export) -> ExportFlags:
        # Without structured replies there is nothing to be fragmented.
        return export.flags | (ExportFlags.SEND_DF if self.structured else 0)

    def _list(self, data: bytes) -> bytes:
        if data:
            return _reply(Option.LIST, ReplyKind.INVALID)
        answers = [
            _reply(Option.LIST, ReplyKind.SERVER, _LENGTH.pack(len(name)) + name)
            for name in self._exports
        ]
        return b"".join([*answers, _reply(Option.LIST, ReplyKind.ACK)])

    def _info(self, option: int, data: bytes) -> bytes:
        asked = _parse_info(data)
        if asked is None:
            return _reply(option, ReplyKind.INVALID)
        name, wanted = asked
        export = self._exports.get(name)
        if export is None:
            return _reply(option, ReplyKind.UNKNOWN)
        infos = [_INFO_EXPORT.pack(_Info.EXPORT, export.size, self._flags(export))]
        if _Info.NAME in wanted:
            infos.append(_SHORT.pack(_Info.NAME) + name)
        if _Info.BLOCK_SIZE in wanted:
            # Any byte can be read; what is asked for in larger pieces costs less.
            sizes = (1, _PREFERRED_BLOCK, MAX_PAYLOAD)
            infos.append(_INFO_BLOCK_SIZE.pack(_Info.BLOCK_SIZE, *sizes))
        if option == Option.GO:
            self._begin(export)
        answers = [_reply(option, ReplyKind.INFO, info) for info in infos]
        return b"".join([*answers, _reply(option, ReplyKind.ACK)])


def _parse_info(data: bytes) -> tuple[bytes, tuple[int, ...]] | None:
    """Return name and wanted information of INFO and GO, None when they are broken."""
    if len(data) < _LENGTH.size + _SHORT.size:
        return None
    (length,) = _LENGTH.unpack_from(data)
    behind = _LENGTH.size + length
    if len(data) < behind + _SHORT.size:
        return None
    (count,) = _SHORT.unpack_from(data, behind)
    wanted = data[behind + _SHORT.size :]
    if len(wanted) != count * _SHORT.size:
        return None
    return data[_LENGTH.size : behind], struct.unpack(f">{count}H", wanted)


def _reply(option: int, kind: ReplyKind, data: bytes = b"") -> bytes:
    return _REPLY.pack(_REPLY_MAGIC, option, kind, len(data)) + data
