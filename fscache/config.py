"""Configuration of the daemon: nydusd's JSON version 1, and version 2 in JSON or TOML.

Pure functions from text to frozen dataclasses (spec tools section 4). A key that nydusd
does not know is warned about, with its path; a value of the wrong type is an error with its
path; a key whose effect is not there yet is warned about, too.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fscache.backend.base import BackendConfig
from fscache.backend.config import BACKENDS_TO_COME, ConfigError, ConfigTable, backend_config

__all__ = ["ConfigError", "DaemonConfig", "load_config", "parse_config"]

SIZE_LIMIT = 1 << 20
_CACHE_TYPES = ("blobcache", "filecache")


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


def _work_dir(cache: ConfigTable, kind: str, place: ConfigTable) -> Path:
    if kind not in _CACHE_TYPES:
        raise cache.error("type", f"expected {' or '.join(_CACHE_TYPES)}, got '{kind}'")
    return Path(place.require("work_dir"))


_CACHE_FILE_KEYS = (
    "disable_indexed_map",
    "enable_encryption",
    "enable_convergent_encryption",
    "encryption_key",
)


def _version1(top: ConfigTable) -> DaemonConfig:
    device = top.table("device")
    backend, cache = device.table("backend"), device.table("cache")
    kind = backend.require("type")
    found = backend_config(kind, backend.table("config"), backend)
    backend.finish()
    place = cache.table("config")
    work_dir = _work_dir(cache, cache.get("type", str, ""), place)
    place.finish(_CACHE_FILE_KEYS)
    # Chunks are always verified here, whatever these say.
    cache.get("validate", bool, False)
    cache.finish(("compressed",))
    config = DaemonConfig(found, work_dir, device.get("id", str, ""))
    device.finish(("external_backends",))
    for flag in ("digest_validate", "enable_xattr"):
        top.get(flag, bool, False)
    top.get("mode", str, "direct")
    top.finish(
        ("iostats_files", "access_pattern", "latest_read_files", "amplify_io", "fs_prefetch")
    )
    return config


def _version2(top: ConfigTable) -> DaemonConfig:
    top.get("version", int, 2)
    backend, cache = top.table("backend"), top.table("cache")
    kind = backend.require("type")
    found = backend_config(kind, backend.table(kind), backend)
    backend.finish(("localfs", "http-proxy", *BACKENDS_TO_COME))
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
    config = DaemonConfig(found, work_dir, top.get("id", str, ""))
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
    top = ConfigTable(value, "")
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
