"""Configuration of the daemon: nydusd's JSON version 1, and version 2 in JSON or TOML.

Pure functions from text to frozen dataclasses (spec tools section 4). A key that nydusd
does not know is warned about, with its path; a value of the wrong type is an error with its
path; a key whose effect is not there yet is warned about, too.
"""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from erofs.errors import NydusError
from fscache.backend.base import BackendConfig, HttpProxyConfig, LocalFsConfig

__all__ = ["ConfigError", "DaemonConfig", "load_config", "parse_config"]

logger = logging.getLogger(__name__)

SIZE_LIMIT = 1 << 20
_NETWORK_LATER = ("localdisk", "oss", "s3", "registry")
_CACHE_TYPES = ("blobcache", "filecache")
_T = TypeVar("_T")


class ConfigError(NydusError):
    """A configuration that cannot be used; the text begins with the JSON path."""


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """What the daemon needs to know to serve one image.

    Args:
        backend: where the blobs are.
        work_dir: cache directory, on ext4, xfs or btrfs for lazy reading.
        id: label of the instance, key of its cache counters.
    """

    backend: BackendConfig
    work_dir: Path
    id: str = ""


class _Table:
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

    def table(self, key: str) -> _Table:
        """Return an object below this one, empty when it is absent."""
        self._seen.add(key)
        value = self._items.get(key)
        return _Table({} if value is None else value, self._at(key))

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


def _backend(kind: str, table: _Table, place: _Table) -> BackendConfig:
    if kind == "localfs":
        return _localfs(table)
    if kind == "http-proxy":
        return _http_proxy(table)
    if kind in _NETWORK_LATER:
        raise place.error("type", f"backend '{kind}' is not supported in this version")
    raise place.error("type", f"unknown backend '{kind}'")


def _localfs(table: _Table) -> LocalFsConfig:
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


def _seconds(table: _Table, key: str, default: float) -> float:
    value = table.get(key, float, default)
    if not 0 < value <= 3600:
        raise table.error(key, f"expected seconds above 0 and up to 3600, got {value}")
    return value


def _http_proxy(table: _Table) -> HttpProxyConfig:
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


def _work_dir(cache: _Table, kind: str, place: _Table) -> Path:
    if kind not in _CACHE_TYPES:
        raise cache.error("type", f"expected {' or '.join(_CACHE_TYPES)}, got '{kind}'")
    return Path(place.require("work_dir"))


_CACHE_FILE_KEYS = (
    "disable_indexed_map",
    "enable_encryption",
    "enable_convergent_encryption",
    "encryption_key",
)


def _version1(top: _Table) -> DaemonConfig:
    device = top.table("device")
    backend, cache = device.table("backend"), device.table("cache")
    kind = backend.require("type")
    backend_config = _backend(kind, backend.table("config"), backend)
    backend.finish()
    place = cache.table("config")
    work_dir = _work_dir(cache, cache.get("type", str, ""), place)
    place.finish(_CACHE_FILE_KEYS)
    # Chunks are always verified here, whatever these say.
    cache.get("validate", bool, False)
    cache.finish(("compressed",))
    config = DaemonConfig(backend_config, work_dir, device.get("id", str, ""))
    device.finish(("external_backends",))
    for flag in ("digest_validate", "enable_xattr"):
        top.get(flag, bool, False)
    top.get("mode", str, "direct")
    top.finish(
        ("iostats_files", "access_pattern", "latest_read_files", "amplify_io", "fs_prefetch")
    )
    return config


def _version2(top: _Table) -> DaemonConfig:
    top.get("version", int, 2)
    backend, cache = top.table("backend"), top.table("cache")
    kind = backend.require("type")
    backend_config = _backend(kind, backend.table(kind), backend)
    backend.finish(("localfs", "http-proxy", *_NETWORK_LATER))
    cache_kind = cache.get("type", str, "")
    place = cache.table("filecache")
    work_dir = _work_dir(cache, cache_kind, place)
    place.finish(_CACHE_FILE_KEYS)
    cache.get("validate", bool, False)
    cache.finish(("compressed", "prefetch", "fscache"))
    rafs = top.table("rafs")
    for flag in ("validate", "enable_xattr"):
        rafs.get(flag, bool, False)
    rafs.get("mode", str, "direct")
    rafs.finish(("batch_size", "iostats_files", "access_pattern", "latest_read_files", "prefetch"))
    config = DaemonConfig(backend_config, work_dir, top.get("id", str, ""))
    top.finish(("external_backends", "overlay"))
    return config


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as json_error:
        try:
            return tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError):
            raise ConfigError(f"neither JSON nor TOML ({json_error})") from json_error


def parse_config(text: str) -> DaemonConfig:
    """Decode a configuration of version 1 (JSON) or 2 (JSON or TOML).

    Raises:
        ConfigError: names the path of the key and what is wrong with it.
    """
    value = _decode(text)
    top = _Table(value, "")
    if "version" not in value:
        return _version1(top)
    if value["version"] != 2:
        raise ConfigError(f"version: expected 2, got {value['version']!r}")
    return _version2(top)


def load_config(path: Path) -> DaemonConfig:
    """Read a configuration file of at most 1 MiB; raise `ConfigError`."""
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", path=path) from error
    if len(data) > SIZE_LIMIT:
        raise ConfigError("configuration is larger than 1 MiB", path=path)
    try:
        return parse_config(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError("configuration is not UTF-8", path=path) from error
    except ConfigError as error:
        error.add_context(path=path)
        raise
