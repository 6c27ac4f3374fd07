"""Blob entries: what registers one image with a daemon of many, or names it (tools 10.1).

Pure functions from text to a frozen value, as `fscache.config`.
"""

from __future__ import annotations

import json
from pathlib import Path

from erofs.values import Value, field
from fscache.backend.config import backend_config
from fscache.backend.table import ConfigError, ConfigTable
from fscache.decode import (
    cache_config,
    decode_text,
    external_backends,
    prefetch_config,
    version2,
)
from fscache.settings import DaemonConfig

__all__ = ["BlobEntry", "EntryError", "parse_blob_entry", "parse_blob_list"]

_CACHE_TYPES = ("fscache", "filecache")


class EntryError(ConfigError):
    """An entry whose type or name is understood, and refused."""


class BlobEntry(Value):
    """One image.

    Args:
        id: name of the image, without a slash.
        domain_id: scope in which blobs are shared, without a slash; may be empty.
        config: backend and cache.
        metadata_path: the bootstrap, None when the entry names none.
        text: what all this was decoded from, for a successor of a killed daemon.
    """

    id: str
    domain_id: str
    config: DaemonConfig
    metadata_path: Path | None
    text: str = field(default="", repr=False, compare=False)


def parse_blob_entry(value: object, path: str = "") -> BlobEntry:
    """Decode an entry, as text (JSON or TOML) or as an object that was decoded already.

    Args:
        value: the entry.
        path: where it is in a larger object, for errors.

    Raises:
        EntryError: the type is not `bootstrap`, or a name has a slash.
        ConfigError: names the path of the key and what is wrong with it.
    """
    top = ConfigTable(decode_text(value) if isinstance(value, str) else value, path)
    kind = top.require("type")
    names = {key: top.get(key, str, "") for key in ("id", "domain_id")}
    if "config_v2" in top:
        config, metadata = _long_form(top.table("config_v2"))
    elif "config" in top:
        config, metadata = _short_form(top.table("config"))
    else:
        raise top.error("config", "missing, and there is no config_v2")
    if config.cache.type not in _CACHE_TYPES:
        raise ConfigError(f"cache type: expected fscache or filecache, got '{config.cache.type}'")
    top.finish()
    if kind != "bootstrap":
        raise EntryError(f"type: expected bootstrap, got '{kind}'")
    for key, name in names.items():
        if "/" in name:
            raise EntryError(f"{key}: contains a slash")
    text = value if isinstance(value, str) else json.dumps(value)
    return BlobEntry(names["id"], names["domain_id"], config, metadata, text)


def parse_blob_list(text: str) -> tuple[BlobEntry, ...]:
    """Decode the configuration of a singleton daemon, `{"blobs": […]}`; raise `ConfigError`."""
    top = ConfigTable(decode_text(text), "")
    items: list[object] = top.get("blobs", list, [])
    top.finish()
    return tuple(parse_blob_entry(item, f"blobs[{n}]") for n, item in enumerate(items))


def _metadata(table: ConfigTable) -> Path | None:
    path = table.get("metadata_path", str, "")
    # A published sample has this name.
    other = table.get("metadata_file", str, "")
    if other:
        table.warn("metadata_file", "is taken for metadata_path")
    text = path or other
    return Path(text) if text else None


def _long_form(table: ConfigTable) -> tuple[DaemonConfig, Path | None]:
    metadata = _metadata(table)
    return version2(table), metadata


def _short_form(table: ConfigTable) -> tuple[DaemonConfig, Path | None]:
    kind = table.require("backend_type")
    backend = backend_config(kind, table.table("backend_config"), table, "backend_type")
    cache_type = table.get("cache_type", str, "")
    cache, work_dir = cache_config(table.table("cache_config"), cache_type, table, "cache_type")
    cache = cache._replace(prefetch=prefetch_config(table.table("prefetch_config")))
    config = DaemonConfig(
        backend,
        work_dir,
        table.get("id", str, ""),
        cache,
        external_backends=external_backends(table),
    )
    metadata = _metadata(table)
    table.finish()
    return config, metadata
