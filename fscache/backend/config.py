"""Backends as configurations name them: checked access to JSON objects, and the keys of 4.4.

A key that nydusd does not know is warned about, with its path; a value of the wrong type is
an error with its path. Values are never quoted: some are secrets.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from erofs.errors import NydusError
from fscache.backend.base import BackendConfig, HttpProxyConfig, LocalFsConfig

__all__ = ["BACKENDS_TO_COME", "ConfigError", "ConfigTable", "backend_config"]

logger = logging.getLogger(__name__)

BACKENDS_TO_COME = ("localdisk", "oss", "s3", "registry")
_T = TypeVar("_T")


class ConfigError(NydusError):
    """A configuration that cannot be used; the text begins with the JSON path."""


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

    def get(self, key: str, kind: type[_T], default: _T) -> _T:
        """Return a value of the given type, or the default when it is absent or null."""
        self._seen.add(key)
        value = self._items.get(key)
        if value is None:
            return default
        # In JSON true is no number, though in Python it is.
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self._at(key)}: expected {_NAMES[kind]}, got {_kind(value)}")
        return value

    def require(self, key: str) -> str:
        """Return a string that has to be there."""
        value = self.get(key, str, "")
        if not value:
            raise ConfigError(f"{self._at(key)}: missing")
        return value

    def table(self, key: str) -> ConfigTable:
        """Return an object below this one, empty when it is absent."""
        self._seen.add(key)
        value = self._items.get(key)
        return ConfigTable({} if value is None else value, self._at(key))

    def paths(self, key: str) -> tuple[Path, ...]:
        """Return a list of paths."""
        found = []
        for number, item in enumerate(self.get(key, list, [])):
            if not isinstance(item, str):
                raise ConfigError(f"{self._at(key)}[{number}]: expected text, got {_kind(item)}")
            found.append(Path(item))
        return tuple(found)

    def error(self, key: str, what: str) -> ConfigError:
        """Return an error about one key."""
        return ConfigError(f"{self._at(key)}: {what}")

    def finish(self, without_effect: tuple[str, ...] = ()) -> None:
        """Warn about the keys that nobody asked for."""
        for key in self._items:
            if key in self._seen:
                continue
            if key in without_effect:
                logger.warning("configuration: %s has no effect in this version", self._at(key))
            else:
                logger.warning("configuration: unknown key %s", self._at(key))


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


def backend_config(kind: str, table: ConfigTable, place: ConfigTable) -> BackendConfig:
    """Return the configuration of a backend.

    Args:
        kind: its type, as nydusd calls it.
        table: its keys.
        place: the object that holds `type`, for errors.

    Raises:
        ConfigError: a type that is unknown or still to come, a missing or wrong key.
    """
    if kind == "localfs":
        return _localfs(table)
    if kind == "http-proxy":
        return _http_proxy(table)
    if kind in BACKENDS_TO_COME:
        raise place.error("type", f"backend '{kind}' is not supported in this version")
    raise place.error("type", f"unknown backend '{kind}'")


def _localfs(table: ConfigTable) -> LocalFsConfig:
    directory, file = table.get("dir", str, ""), table.get("blob_file", str, "")
    config = LocalFsConfig(
        dir=Path(directory) if directory else None,
        blob_file=Path(file) if file else None,
        alt_dirs=table.paths("alt_dirs"),
    )
    if config.dir is None and config.blob_file is None:
        raise table.error("dir", "missing, and there is no blob_file")
    table.finish(("readahead", "readahead_sec"))
    return config


def _seconds(table: ConfigTable, key: str, default: float) -> float:
    value = table.get(key, float, default)
    if not 0 < value <= 3600:
        raise table.error(key, f"expected seconds above 0 and up to 3600, got {value}")
    return value


def _http_proxy(table: ConfigTable) -> HttpProxyConfig:
    config = HttpProxyConfig(
        addr=table.require("addr"),
        path=table.get("path", str, ""),
        timeout=_seconds(table, "timeout", 5.0),
        connect_timeout=_seconds(table, "connect_timeout", 5.0),
        retry_limit=table.get("retry_limit", int, 0),
        skip_verify=table.get("skip_verify", bool, False),
        ca_cert_files=table.paths("ca_cert_files"),
    )
    table.finish(("proxy", "mirrors"))
    return config
