"""Go's gob encoding, as far as net/rpc needs it: structures out, headers and numbers back.

Source: package documentation of encoding/gob. Each value travels as a message of its own, behind
messages that describe its types; a type is described once in a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from builder.nydusify.hook.errors import PluginError

__all__ = ["BOOL", "INT", "STRING", "UINT", "Decoder", "Encoder", "SliceOf", "Struct", "Type"]

MESSAGE_MAX = 1 << 20
_ITEMS_MAX = 1000
_FIRST_ID = 65
# Fields of `wireType`, as deltas from the one before the first.
_WIRE_SLICE, _WIRE_STRUCT = 2, 3


@dataclass(frozen=True, slots=True)
class Basic:
    """A type that needs no description; `number` is what gob calls it."""

    number: int


@dataclass(frozen=True, slots=True)
class Struct:
    """A structure: its name and the types of its fields, in order."""

    name: str
    fields: Mapping[str, Type]

    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True)
class SliceOf:
    """A list of values of one type."""

    item: Type

    __hash__ = object.__hash__


Type = Basic | Struct | SliceOf
BOOL, INT, UINT, STRING = Basic(1), Basic(2), Basic(3), Basic(6)


def _uint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    data = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return bytes((0x100 - len(data),)) + data


def _int(value: int) -> bytes:
    return _uint(value << 1 if value >= 0 else (~value << 1) | 1)


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")
    return _uint(len(data)) + data


def _message(content: bytes) -> bytes:
    return _uint(len(content)) + content


class Encoder:
    """Encodes values of one stream."""

    def __init__(self) -> None:
        self._numbers: dict[Type, int] = {}

    def encode(self, kind: Type, value: object) -> bytes:
        """Return the messages of a value: a dict for a structure, a list, or a plain value."""
        described = b"".join(self._describe(kind))
        # What is no structure has a zero in front, as if it were the only field of one.
        single = b"" if isinstance(kind, Struct) else b"\0"
        return described + _message(_int(self._number(kind)) + single + _value(kind, value))

    def _number(self, kind: Type) -> int:
        return kind.number if isinstance(kind, Basic) else self._numbers[kind]

    def _describe(self, kind: Type) -> list[bytes]:
        """Return the messages that describe a type and those in it, unless they were sent."""
        if isinstance(kind, Basic) or kind in self._numbers:
            return []
        number = self._numbers[kind] = _FIRST_ID + len(self._numbers)
        inner = kind.fields.values() if isinstance(kind, Struct) else (kind.item,)
        later = [message for one in inner for message in self._describe(one)]
        name = kind.name if isinstance(kind, Struct) else ""
        common = (b"\x01" + _text(name) + b"\x01" if name else b"\x02") + _int(number) + b"\0"
        if isinstance(kind, Struct):
            fields = b"".join(
                b"\x01" + _text(field) + b"\x01" + _int(self._number(one)) + b"\0"
                for field, one in kind.fields.items()
            )
            body = b"\x01" + common + b"\x01" + _uint(len(kind.fields)) + fields + b"\0"
            wire = bytes((_WIRE_STRUCT,)) + body
        else:
            body = b"\x01" + common + b"\x01" + _int(self._number(kind.item)) + b"\0"
            wire = bytes((_WIRE_SLICE,)) + body
        return [_message(_int(-number) + wire + b"\0"), *later]


def _value(kind: Type, value: object) -> bytes:
    if isinstance(kind, Struct):
        return _fields(kind, value)
    if isinstance(kind, SliceOf):
        if not isinstance(value, Sequence):
            raise TypeError("a list is wanted")
        return _uint(len(value)) + b"".join(_value(kind.item, one) for one in value)
    if kind == STRING:
        return _text(str(value))
    number = int(value)  # type: ignore[call-overload]
    return _int(number) if kind == INT else _uint(number)


def _fields(kind: Struct, value: object) -> bytes:
    """Return the fields that are not zero, each behind its distance from the last."""
    if not isinstance(value, Mapping):
        raise TypeError("fields are wanted")
    parts, last = [], -1
    for place, (name, one) in enumerate(kind.fields.items()):
        if value[name]:
            parts.append(_uint(place - last) + _value(one, value[name]))
            last = place
    return b"".join(parts) + b"\0"


class _Content:
    """The bytes of one message, read from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def take(self, length: int) -> bytes:
        piece = self._data[self._place : self._place + length]
        if len(piece) < length:
            raise PluginError("gob message is cut short", offset=self._place)
        self._place += length
        return piece

    def uint(self) -> int:
        first = self.take(1)[0]
        if first < 0x80:
            return first
        count = 0x100 - first
        if count > 8:
            raise PluginError("gob number of an impossible length", got=count)
        return int.from_bytes(self.take(count), "big")

    def int(self) -> int:
        value = self.uint()
        return ~(value >> 1) if value & 1 else value >> 1

    def text(self) -> str:
        length = self.uint()
        if length > MESSAGE_MAX:
            raise PluginError("gob text of an impossible length", got=length)
        return self.take(length).decode("utf-8", "replace")


class Decoder:
    """Decodes values of one stream.

    Args:
        read: returns exactly so many bytes, or raises.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        # Names and type numbers of the fields of structures, by type number.
        self._structs: dict[int, list[tuple[str, int]]] = {}

    def struct(self) -> dict[str, int | str | bool]:
        """Return the next value, a structure of plain fields; raise `PluginError`."""
        content = self._next_value()
        fields = self._structs.get(content.int())
        if fields is None:
            raise PluginError("gob structure is wanted")
        found: dict[str, int | str | bool] = {}
        place = -1
        while delta := content.uint():
            place += delta
            if place >= len(fields):
                raise PluginError("gob structure has no such field", got=place)
            name, number = fields[place]
            found[name] = _plain(content, number)
        return found

    def number(self) -> int:
        """Return the next value, a number that is not negative; raise `PluginError`."""
        content = self._next_value()
        if content.int() != UINT.number or content.uint():
            raise PluginError("gob number is wanted")
        return content.uint()

    def skip(self) -> None:
        """Leave out the next value, whatever it is; raise `PluginError`."""
        self._next_value()

    def _next_value(self) -> _Content:
        """Return the next message that is a value; descriptions before it are remembered."""
        while True:
            data = self._read_message()
            content = _Content(data)
            number = content.int()
            if number >= 0:
                return _Content(data)
            if len(self._structs) >= _ITEMS_MAX:
                raise PluginError("too many gob types")
            self._structs[-number] = _described_fields(content)

    def _read_message(self) -> bytes:
        first = self._read(1)
        count = 0 if first[0] < 0x80 else 0x100 - first[0]
        if count > 8:
            raise PluginError("gob number of an impossible length", got=count)
        length = _Content(first + (self._read(count) if count else b"")).uint()
        if not 0 < length <= MESSAGE_MAX:
            raise PluginError("gob message of an impossible length", got=length)
        return self._read(length)


def _plain(content: _Content, number: int) -> int | str | bool:
    if number == STRING.number:
        return content.text()
    if number == UINT.number:
        return content.uint()
    if number == INT.number:
        return content.int()
    if number == BOOL.number:
        return bool(content.uint())
    raise PluginError("gob field of an unexpected type", got=number)


def _described_fields(content: _Content) -> list[tuple[str, int]]:
    """Return the fields of a described structure; other types have none."""
    if content.uint() != _WIRE_STRUCT:
        return []
    place, fields = -1, []
    while delta := content.uint():
        place += delta
        if place == 0:
            _common(content)
        elif place == 1:
            count = content.uint()
            if count > _ITEMS_MAX:
                raise PluginError("gob structure of too many fields", got=count)
            fields = [_common(content) for _ in range(count)]
        else:
            raise PluginError("gob description has no such field", got=place)
    return fields


def _common(content: _Content) -> tuple[str, int]:
    """Return name and number, of a type or of a field."""
    name, number, place = "", 0, -1
    while delta := content.uint():
        place += delta
        if place == 0:
            name = content.text()
        elif place == 1:
            number = content.int()
        else:
            raise PluginError("gob description has no such field", got=place)
    return name, number
