"""Configuration of the daemon: nydusd's JSON version 1, and version 2 in JSON or TOML.

From text or a file to the values of `fscache.settings` (spec tools section 4). A key that
nydusd does not know is warned about, with its path; a value of the wrong type is an error with
its path; keys without effect are listed in `fscache.backend.table`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fscache.backend.table import ConfigError, ConfigTable
from fscache.decode import decode_text, version1, version2
from fscache.settings import DaemonConfig

__all__ = ["ConfigError", "DaemonConfig", "load_config", "parse_config"]

_T = TypeVar("_T")

SIZE_LIMIT = 1 << 20
_SERVED_CACHE_TYPES = ("blobcache", "filecache")


def parse_config(text: str) -> DaemonConfig:
    """Decode a configuration of version 1 (JSON) or 2 (JSON or TOML), with a cache of files.

    Raises:
        ConfigError: names the path of the key and what is wrong with it.
    """
    value = decode_text(text)
    top = ConfigTable(value, "")
    old = "version" not in value
    config = version1(top) if old else version2(top)
    if config.cache.type not in _SERVED_CACHE_TYPES:
        expected = " or ".join(_SERVED_CACHE_TYPES)
        path = "device.cache.type" if old else "cache.type"
        raise ConfigError(f"{path}: expected {expected}, got '{config.cache.type}'")
    return config._replace(text=text)


def load_config(path: Path) -> DaemonConfig:
    """Read a configuration file of at most 1 MiB; raise `ConfigError`."""
    return load(path, parse_config)


def load(path: Path, parse: Callable[[str], _T]) -> _T:
    """Read a file of at most 1 MiB and have its text decoded; raise `ConfigError`."""
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", path=path) from error
    if len(data) > SIZE_LIMIT:
        raise ConfigError("configuration is larger than 1 MiB", path=path)
    try:
        return parse(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError("configuration is not UTF-8", path=path) from error
    except ConfigError as error:
        error.add_context(path=path)
        raise
