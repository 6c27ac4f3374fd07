"""Objects of a configuration, decoded to `fscache.settings` (spec tools section 4).

Both versions, and the parts of them that blob entries have; no files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fscache.backend.config import BACKEND_TYPES, backend_config
from fscache.backend.settings import BackendConfig
from fscache.backend.table import ConfigError, ConfigTable
from fscache.settings import (
    CacheConfig,
    DaemonConfig,
    ExternalBackend,
    OverlayConfig,
    PrefetchConfig,
    RafsConfig,
)

__all__ = [
    "cache_config",
    "decode_text",
    "external_backends",
    "prefetch_config",
    "version1",
    "version2",
]

_MAX_BATCH = 0x10000000
_CACHE_TYPES = ("blobcache", "filecache", "fscache", "dummycache", "")
_KEY = re.compile(r"[0-9A-Fa-f]{64}")


def decode_text(text: str) -> Any:
    """Return the value of JSON or TOML; raise `ConfigError`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as json_error:
        # Imported here: hardly any configuration is TOML, and it takes 8 ms of every start.
        import tomllib

        try:
            return tomllib.loads(text)
        except (ValueError, RecursionError):
            raise ConfigError(f"neither JSON nor TOML ({json_error})") from json_error


def external_backends(table: ConfigTable) -> tuple[ExternalBackend, ...]:
    """Decode `external_backends`, which both versions have."""
    found = []
    for item in table.tables("external_backends"):
        found.append(
            ExternalBackend(
                item.require("type"),
                patch=item.texts("patch"),
                config=item.texts("config"),
            )
        )
        item.finish()
    return tuple(found)


def _work_dir(table: ConfigTable) -> Path:
    text = table.get("work_dir", str, "")
    if not text:
        table.warn("work_dir", "is missing, the current directory is used")
    return Path(text or ".")


def cache_config(
    table: ConfigTable, kind: str, place: ConfigTable, key: str = "type"
) -> tuple[CacheConfig, Path]:
    """Decode what a cache has beside its type, in `table`, and its directory.

    Args:
        table: with the keys of tools 4.5.
        kind: type of the cache.
        place: the object that holds the type, for errors.
        key: of the type.
    """
    if kind not in _CACHE_TYPES:
        raise place.error(key, f"unknown cache '{kind}'")
    secret = table.get("encryption_key", str, "")
    if secret and not _KEY.fullmatch(secret):
        raise table.error("encryption_key", "expected 64 hex digits")
    cache = CacheConfig(
        type=kind,
        disable_indexed_map=table.get("disable_indexed_map", bool, False),
        enable_encryption=table.get("enable_encryption", bool, False),
        enable_convergent_encryption=table.get("enable_convergent_encryption", bool, False),
        encryption_key=secret,
    )
    work_dir = _work_dir(table) if kind not in ("", "dummycache") else Path()
    table.finish()
    return cache, work_dir


def prefetch_config(table: ConfigTable) -> PrefetchConfig:
    """Decode `fs_prefetch`, and `prefetch_config` of a blob entry."""
    return _prefetch(table, "threads_count", "merging_size", "bandwidth_rate", everything=True)


def _version2_prefetch(table: ConfigTable) -> PrefetchConfig:
    return _prefetch(table, "threads", "batch_size", "bandwidth_limit", everything=False)


def _prefetch(
    table: ConfigTable, threads: str, batch: str, bandwidth: str, *, everything: bool
) -> PrefetchConfig:
    """Decode the keys of either version: three have names of their own, one its own default."""
    enable = table.get("enable", bool, False)
    # As the original: what is switched off may have any number, and it shows zeros itself.
    lowest, most, largest = (1, 1024, _MAX_BATCH) if enable else (0, 1 << 64, 1 << 64)
    config = PrefetchConfig(
        enable=enable,
        threads=table.number(threads, 8, lowest, most),
        batch_size=table.number(batch, 1 << 20, 0, largest),
        bandwidth_limit=table.number(bandwidth, 0, 0, 1 << 63),
        prefetch_all=table.get("prefetch_all", bool, everything),
        stream_prefetch=table.get("stream_prefetch", bool, False),
    )
    table.finish()
    return config


def _rafs(table: ConfigTable, size: str, validate: str, prefetch: PrefetchConfig) -> RafsConfig:
    """Decode the keys that both versions have; two of them have names of their own."""
    mode = table.get("mode", str, "direct")
    if mode not in ("direct", "cached"):
        raise table.error("mode", "expected direct or cached")
    return RafsConfig(
        mode=mode,
        batch_size=table.number(size, 1 << 20, 0, _MAX_BATCH),
        validate=table.get(validate, bool, False),
        enable_xattr=table.get("enable_xattr", bool, False),
        iostats_files=table.get("iostats_files", bool, False),
        access_pattern=table.get("access_pattern", bool, False),
        latest_read_files=table.get("latest_read_files", bool, False),
        prefetch=prefetch,
    )


def _seeded(cache: CacheConfig, rafs: RafsConfig) -> CacheConfig:
    """Return the cache with the file system's prefetch, unless it has its own (tools 4.1)."""
    return cache if cache.prefetch.enable else cache._replace(prefetch=rafs.prefetch)


def version1(top: ConfigTable) -> DaemonConfig:
    """Decode a configuration of version 1; any type of cache."""
    device = top.table("device")
    place, cache_table = device.table("backend"), device.table("cache")
    backend = backend_config(place.require("type"), place.table("config"), place)
    place.finish()
    kind = cache_table.get("type", str, "")
    cache, work_dir = cache_config(cache_table.table("config"), kind, cache_table)
    cache = cache._replace(
        compressed=cache_table.get("compressed", bool, False),
        validate=cache_table.get("validate", bool, False),
    )
    cache_table.finish()
    prefetch = prefetch_config(top.table("fs_prefetch"))
    rafs = _rafs(top, "amplify_io", "digest_validate", prefetch)
    config = DaemonConfig(
        backend,
        work_dir,
        device.get("id", str, ""),
        _seeded(cache, rafs),
        rafs,
        external_backends=external_backends(device),
    )
    device.finish()
    top.finish()
    return config


def _version2_backend(place: ConfigTable) -> BackendConfig:
    kind = place.require("type")
    if "registy" in place:
        # As published samples spell it; they have parts of it under the right name.
        place.warn("registy", "is taken for registry")
        table = place.merged("registry", "registy") if kind == "registry" else None
        place.skip("registy")
    else:
        table = None
    config = backend_config(kind, table or place.table(kind), place)
    place.skip(*BACKEND_TYPES)
    place.finish()
    return config


def _version2_cache(table: ConfigTable) -> tuple[CacheConfig, Path]:
    kind = table.get("type", str, "")
    for key in ("enable_encryption", "enable_convergent_encryption", "encryption_key"):
        if key in table:
            table.warn(key, "has no effect here, its place is cache.filecache")
            table.skip(key)
    used = table.table("fscache" if kind == "fscache" else "filecache")
    cache, work_dir = cache_config(used, kind, table)
    table.skip("fscache", "filecache")
    cache = cache._replace(
        compressed=table.get("compressed", bool, False),
        validate=table.get("validate", bool, False),
        prefetch=_version2_prefetch(table.table("prefetch")),
    )
    table.finish()
    return cache, work_dir


def version2(top: ConfigTable) -> DaemonConfig:
    """Decode a configuration of version 2; any type of cache."""
    if top.get("version", int, 0) != 2:
        raise top.error("version", "expected 2")
    backend = _version2_backend(top.table("backend"))
    cache, work_dir = _version2_cache(top.table("cache"))
    rafs_table = top.table("rafs")
    prefetch = _version2_prefetch(rafs_table.table("prefetch"))
    rafs = _rafs(rafs_table, "batch_size", "validate", prefetch)
    rafs_table.finish()
    overlay = None
    if "overlay" in top:
        table = top.table("overlay")
        overlay = OverlayConfig(Path(table.require("upper_dir")), Path(table.require("work_dir")))
        table.finish()
    # For blob entries only; samples of whole configurations have it, too.
    top.get("metadata_path", str, "")
    config = DaemonConfig(
        backend,
        work_dir,
        top.get("id", str, ""),
        _seeded(cache, rafs),
        rafs,
        overlay,
        external_backends(top),
    )
    top.finish()
    return config
