"""Mount options that carry JSON in base64: text to checked fields, and back as Go writes it.

Which fields there are is said by `kata.volume` and `kata.extraoption`. Nothing of a value is
shown in an error: the values hold credentials. Source: spec vm-runtimes 2.1, 2.2.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import NoReturn

from kata.errors import OptionError

__all__ = [
    "EXTRA_OPTION",
    "MAX_OPTION_BYTES",
    "VOLUME_OPTION",
    "Fields",
    "decode_json",
    "decode_option",
    "encode_option",
    "go_json",
]

EXTRA_OPTION = "extraoption="
VOLUME_OPTION = "io.katacontainers.volume="

# containerd's messages to a shim end at 4 MiB; an exec'd helper takes 128 KiB.
MAX_OPTION_BYTES = 1 << 20
_MAX_INTEGER_DIGITS = 20

# What Go's encoder escapes beyond what JSON demands.
_GO_ESCAPES = {
    ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026",
    0x2028: "\\u2028", 0x2029: "\\u2029",
}  # fmt: skip


def go_json(value: object) -> str:
    """Return compact JSON as Go's encoder writes it; the order of keys stays."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.translate(_GO_ESCAPES)


def encode_option(prefix: str, value: Mapping[str, object]) -> str:
    """Return a mount option: the prefix and the standard base64 of JSON, without line breaks.

    Raises:
        OptionError: a text holds what is not Unicode, or the option would be too long.
    """
    try:
        encoded = prefix + base64.b64encode(go_json(value).encode()).decode()
    except UnicodeEncodeError:
        # The error carries the whole text, which may be a secret; so do those below.
        raise OptionError(f"{prefix} holds text that is not Unicode") from None
    if len(encoded) > MAX_OPTION_BYTES:
        raise OptionError(f"{prefix} is too long", expected=MAX_OPTION_BYTES, got=len(encoded))
    return encoded


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a key that is given twice: readers do not agree on which one counts."""
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise OptionError("a key is given twice in the JSON object")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    raise OptionError("a number that JSON does not have", got=name)


def _integer(text: str) -> int:
    if len(text) > _MAX_INTEGER_DIGITS:
        raise OptionError("a number is too large")
    return int(text)


def decode_json(data: bytes, what: str) -> dict[str, object]:
    """Return the JSON object in `data`.

    Raises:
        OptionError: not UTF-8, not JSON, not an object, a key twice, or nested too deeply.
    """
    if len(data) > MAX_OPTION_BYTES:
        raise OptionError(f"{what} is too long", expected=MAX_OPTION_BYTES, got=len(data))
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise OptionError(f"{what} is not UTF-8", offset=error.start) from None
    except json.JSONDecodeError as error:
        # Its text shows a part of the document.
        raise OptionError(f"{what} is not JSON", offset=error.pos) from None
    except RecursionError:
        raise OptionError(f"{what} is nested too deeply") from None
    except OptionError as error:
        raise OptionError(f"{what}: {error.reason}") from None
    if not isinstance(value, dict):
        raise OptionError(f"{what} is not a JSON object")
    return value


def decode_option(prefix: str, option: str) -> dict[str, object]:
    """Return the JSON object of an option, given with or without its prefix.

    Only what strict decoders take is taken: padded standard base64 without white space.

    Raises:
        OptionError: not that, or what `decode_json` refuses.
    """
    name = prefix.removesuffix("=")
    text = option.removeprefix(prefix)
    if len(text) > MAX_OPTION_BYTES:
        raise OptionError(f"{name} is too long", expected=MAX_OPTION_BYTES, got=len(text))
    if not text:
        raise OptionError(f"{name} is empty")
    try:
        data = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except ValueError:
        raise OptionError(f"{name} is not standard padded base64") from None
    # Bits beyond the last byte have to be zero.
    if base64.b64encode(data).decode() != text:
        raise OptionError(f"{name} is not standard padded base64")
    return decode_json(data, name)


class Fields:
    """Checked access to the fields of a decoded JSON object; unknown ones are ignored.

    Args:
        value: the object.
        path: where it is, for errors; "" at the top.
    """

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, dict):
            raise OptionError(f"{path} is not an object")
        self._value: dict[str, object] = value
        self._path = path

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def has(self, key: str) -> bool:
        """Tell whether the key is there and not null."""
        return self._value.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text; without a default it has to be there."""
        value = self._value.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise OptionError(f"{self._name(key)} is missing")
        if not isinstance(value, str):
            raise OptionError(f"{self._name(key)} is not a text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts; none when the key is not there."""
        value = self._value.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise OptionError(f"{self._name(key)} is not a list of texts")
        return tuple(value)

    def mapping(self, key: str) -> dict[str, str] | None:
        """Return an object of texts, or None when the key is not there."""
        value = self._value.get(key)
        if value is None:
            return None
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise OptionError(f"{self._name(key)} is not an object of texts")
        return dict(value)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number; without a default it has to be there."""
        value = self._value.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise OptionError(f"{self._name(key)} is missing")
        if not isinstance(value, int) or isinstance(value, bool):
            raise OptionError(f"{self._name(key)} is not a whole number")
        return value

    def boolean(self, key: str) -> bool | None:
        """Return true or false, or None when the key is not there."""
        value = self._value.get(key)
        if value is not None and not isinstance(value, bool):
            raise OptionError(f"{self._name(key)} is neither true nor false")
        return value

    def child(self, key: str) -> Fields | None:
        """Return the fields of an object, or None when the key is not there."""
        value = self._value.get(key)
        return None if value is None else Fields(value, self._name(key))
