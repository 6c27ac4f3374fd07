"""Protocol buffers on the wire, as far as containerd's API needs them.

Source: protobuf.dev "Encoding". Requests are a few texts, of answers a few fields are read: neither
is worth generated code and the library below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from erofs.errors import BadMagic, OutOfBounds

__all__ = ["Fields", "pack_texts", "parse_message"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_VARINT_MAX_BYTES = 10


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def pack_texts(texts: Iterable[tuple[int, str]]) -> bytes:
    """Encode a message of texts by their field numbers."""
    parts = []
    for number, text in texts:
        data = text.encode("utf-8", "surrogateescape")
        parts.append(_varint(number << 3 | _BYTES) + _varint(len(data)) + data)
    return b"".join(parts)


class Fields:
    """The fields of a message; what is missing is empty or zero.

    Args:
        values: of each field, in order.
    """

    def __init__(self, values: Mapping[int, list[int | bytes]]) -> None:
        self._values = values

    def number(self, field: int) -> int:
        """Return a number."""
        found = self._values.get(field, [0])[-1]
        if not isinstance(found, int):
            raise BadMagic("message has bytes in place of a number", got=field)
        return found

    def all(self, field: int) -> list[bytes]:
        """Return every value of a repeated field of bytes, texts or messages."""
        found = []
        for value in self._values.get(field, []):
            if not isinstance(value, bytes):
                raise BadMagic("message has a number in place of bytes", got=field)
            found.append(value)
        return found

    def text(self, field: int) -> str:
        """Return a text."""
        found = self.all(field)
        return found[-1].decode("utf-8", "surrogateescape") if found else ""

    def message(self, field: int) -> Fields:
        """Return a message in the message."""
        found = self.all(field)
        return parse_message(found[-1] if found else b"")


def parse_message(data: bytes) -> Fields:
    """Decode a message; raise `FormatError`."""
    values: dict[int, list[int | bytes]] = {}
    place = 0
    while place < len(data):
        tag, place = _parse_varint(data, place)
        kind = tag & 7
        if kind == _VARINT:
            value: int | bytes
            value, place = _parse_varint(data, place)
        else:
            if kind == _BYTES:
                length, place = _parse_varint(data, place)
            elif kind in _FIXED:
                length = _FIXED[kind]
            else:
                raise BadMagic("message with a field of an unknown kind", offset=place, got=kind)
            if length > len(data) - place:
                raise OutOfBounds("message is cut short", offset=place, got=length)
            value = data[place : place + length]
            place += length
        values.setdefault(tag >> 3, []).append(value)
    return Fields(values)


def _parse_varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for number, byte in enumerate(data[place : place + _VARINT_MAX_BYTES]):
        value |= (byte & 0x7F) << 7 * number
        if byte < 0x80:
            return value, place + number + 1
    raise OutOfBounds("message with a number that does not end", offset=place)
