"""Checked access to the objects of a configuration; knows nothing of what keys mean.

A key that nobody asks for is warned about, with its path; a value of the wrong type is an error
with its path. Values are never quoted: some are secrets.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from erofs.errors import NydusError

__all__ = ["WITHOUT_EFFECT", "ConfigError", "ConfigTable", "is_plain"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Keys that are known and change nothing in this version: each one is warned about when its value
# is not the default. Ends of paths, of all forms of the configuration; the one list there is.
WITHOUT_EFFECT = (
    # Data is cached as the kernel reads it, and not encrypted.
    "cache.compressed",
    "disable_indexed_map",
    "enable_encryption",
    "enable_convergent_encryption",
    "encryption_key",
    # The kernel parses the metadata and reads ahead by itself.
    "mode",
    # All blobs of an image come from one backend.
    "external_backends",
    # A plain HTTP proxy is used, Dragonfly's own protocol is not.
    "dragonfly_scheduler_endpoint",
)

_LARGEST = 1 << 63


class ConfigError(NydusError):
    """A configuration that cannot be used; the text begins with the JSON path."""


def is_plain(text: str) -> bool:
    """Return whether text can be in a path: JSON can write what no file name has."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


class ConfigTable:
    """A JSON object with its path; knows which keys were asked for."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path or 'configuration'}: expected an object, got {_kind(value)}")
        self._items: Mapping[str, object] = value
        self._path = path
        self._seen: set[str] = set()

    def _at(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def __contains__(self, key: str) -> bool:
        return self._items.get(key) is not None

    def get(self, key: str, kind: type[_T], default: _T) -> _T:
        """Return a value of the given type, or the default when it is absent or null."""
        self._seen.add(key)
        value = self._items.get(key)
        if value is None:
            return default
        # In JSON true is no number, though in Python it is.
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            # Not every one has a float, and none so large is within bounds.
            value = float(max(-_LARGEST, min(value, _LARGEST)))
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self._at(key)}: expected {_NAMES[kind]}, got {_kind(value)}")
        if isinstance(value, str) and not is_plain(value):
            raise self.error(key, "text with a NUL, or with half of a character")
        if value != default:
            self._warn_without_effect(key)
        return value

    def require(self, key: str) -> str:
        """Return a string that has to be there."""
        value = self.get(key, str, "")
        if not value:
            raise ConfigError(f"{self._at(key)}: missing")
        return value

    def number(self, key: str, default: int, lowest: int, highest: int) -> int:
        """Return a whole number within bounds."""
        value = self.get(key, int, default)
        if not lowest <= value <= highest:
            raise self.error(key, f"expected {lowest} to {highest}, got {value}")
        return value

    def seconds(self, key: str, default: float) -> float:
        """Return a time above 0 and up to an hour."""
        value = self.get(key, float, default)
        if not 0 < value <= 3600:
            raise self.error(key, f"expected seconds above 0 and up to 3600, got {value}")
        return value

    def table(self, key: str) -> ConfigTable:
        """Return an object below this one, empty when it is absent."""
        self._seen.add(key)
        value = self._items.get(key)
        if value:
            self._warn_without_effect(key)
        return ConfigTable({} if value is None else value, self._at(key))

    def tables(self, key: str) -> list[ConfigTable]:
        """Return a list of objects, empty when it is absent."""
        items: list[object] = self.get(key, list, [])
        return [ConfigTable(item, f"{self._at(key)}[{n}]") for n, item in enumerate(items)]

    def paths(self, key: str) -> tuple[Path, ...]:
        """Return a list of paths."""
        found = []
        for number, item in enumerate(self.get(key, list, [])):
            if not isinstance(item, str):
                raise ConfigError(f"{self._at(key)}[{number}]: expected text, got {_kind(item)}")
            if not is_plain(item):
                raise self.error(f"{key}[{number}]", "no path")
            found.append(Path(item))
        return tuple(found)

    def texts(self, key: str) -> dict[str, str]:
        """Return an object whose values are all text."""
        table = self.table(key)
        return {name: table.get(name, str, "") for name in table._items}

    def merged(self, key: str, other: str) -> ConfigTable:
        """Return the object `key` with what only the object `other` has."""
        table, more = self.table(key), self.table(other)
        return ConfigTable({**more._items, **table._items}, table._path)

    def error(self, key: str, what: str) -> ConfigError:
        """Return an error about one key."""
        return ConfigError(f"{self._at(key)}: {what}")

    def warn(self, key: str, what: str) -> None:
        """Log a warning about one key."""
        logger.warning("configuration: %s %s", self._at(key), what)

    def skip(self, *keys: str) -> None:
        """Leave keys alone that are for others."""
        self._seen.update(keys)

    def finish(self) -> None:
        """Warn about the keys that nobody asked for."""
        for key in self._items:
            if key not in self._seen:
                logger.warning("configuration: unknown key %s", self._at(key))

    def _warn_without_effect(self, key: str) -> None:
        path = f".{self._at(key)}"
        if any(path.endswith(f".{end}") for end in WITHOUT_EFFECT):
            self.warn(key, "has no effect in this version")


_NAMES: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
}


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    return _NAMES.get(type(value), type(value).__name__)
