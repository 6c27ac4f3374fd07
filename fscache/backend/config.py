"""Backends as configurations name them: the keys of tools 4.4, decoded to `settings`.

Values are never quoted in errors: some are secrets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fscache.backend.settings import (
    BackendConfig,
    Credentials,
    HttpProxyConfig,
    LocalDiskConfig,
    LocalFsConfig,
    MirrorConfig,
    ObjectStoreConfig,
    ProxyConfig,
    RegistryConfig,
)
from fscache.backend.table import ConfigError, ConfigTable

__all__ = ["BACKEND_TYPES", "ConfigError", "ConfigTable", "backend_config"]

BACKEND_TYPES = ("localfs", "localdisk", "registry", "http-proxy", "oss", "s3")

_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_REPOSITORY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_REGION = re.compile(r"[A-Za-z0-9-]{1,64}")
_BEARER = re.compile(r"[\x21-\x7e]+")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


def backend_config(
    kind: str, table: ConfigTable, place: ConfigTable, key: str = "type"
) -> BackendConfig:
    """Return the configuration of a backend.

    Args:
        kind: its type, as nydusd calls it.
        table: its keys.
        place: the object that holds the type, for errors.
        key: of the type.

    Raises:
        ConfigError: an unknown type, a missing or wrong key.
    """
    if kind == "localfs":
        config: BackendConfig = _localfs(table)
    elif kind == "localdisk":
        config = LocalDiskConfig(
            Path(table.require("device_path")), table.get("disable_gpt", bool, False)
        )
    elif kind == "http-proxy":
        config = _http_proxy(table)
    elif kind == "registry":
        config = _registry(table)
    elif kind in ("oss", "s3"):
        config = _object_store(kind, table)
    else:
        raise place.error(key, f"unknown backend '{kind}'")
    # Old keys without effect in the original, too; nydus-snapshotter still writes one.
    table.get("readahead", bool, False)
    table.get("readahead_sec", int, 0)
    table.finish()
    return config


def is_header(name: str, value: str) -> bool:
    """Tell whether this can be a field of an HTTP head."""
    return bool(_HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value))


def _localfs(table: ConfigTable) -> LocalFsConfig:
    directory, file = table.get("dir", str, ""), table.get("blob_file", str, "")
    config = LocalFsConfig(
        dir=Path(directory) if directory else None,
        blob_file=Path(file) if file else None,
        alt_dirs=table.paths("alt_dirs"),
    )
    if config.dir is None and config.blob_file is None:
        raise table.error("dir", "missing, and there is no blob_file")
    return config


def _network(table: ConfigTable) -> dict[str, Any]:
    """Return the keys that all network backends have, as arguments of `NetworkConfig`."""
    proxy = _proxy(table.table("proxy"))
    mirrors = tuple(_mirror(item) for item in table.tables("mirrors"))
    if proxy is not None and mirrors:
        raise table.error("mirrors", "cannot be used together with proxy")
    return {
        "timeout": table.seconds("timeout", 5.0),
        "connect_timeout": table.seconds("connect_timeout", 5.0),
        "retry_limit": table.number("retry_limit", 0, 0, 255),
        "skip_verify": table.get("skip_verify", bool, False),
        "ca_cert_files": table.paths("ca_cert_files"),
        "proxy": proxy,
        "mirrors": mirrors,
    }


def _proxy(table: ConfigTable) -> ProxyConfig | None:
    url = table.get("url", str, "")
    config = ProxyConfig(
        url=url,
        ping_url=table.get("ping_url", str, ""),
        fallback=table.get("fallback", bool, True),
        check_interval=table.seconds("check_interval", 5.0),
        check_pause_elapsed=table.seconds("check_pause_elapsed", 300.0),
        use_http=table.get("use_http", bool, False),
    )
    table.get("dragonfly_scheduler_endpoint", str, "")
    table.finish()
    return config if url else None


def _mirror(table: ConfigTable) -> MirrorConfig:
    config = MirrorConfig(
        host=table.require("host"),
        headers=_headers(table, "headers"),
        ping_url=table.get("ping_url", str, ""),
        health_check_interval=table.seconds("health_check_interval", 5.0),
        failure_limit=table.number("failure_limit", 5, 1, 255),
        health_check_pause_elapsed=table.seconds("health_check_pause_elapsed", 300.0),
    )
    table.finish()
    return config


def _headers(table: ConfigTable, key: str) -> Mapping[str, str]:
    headers = table.texts(key)
    for name, value in headers.items():
        if not is_header(name, value):
            raise table.error(key, f"{name!a} cannot be a field of an HTTP head")
    return headers


def _http_proxy(table: ConfigTable) -> HttpProxyConfig:
    return HttpProxyConfig(
        addr=table.require("addr"), path=table.get("path", str, ""), **_network(table)
    )


def _registry(table: ConfigTable) -> RegistryConfig:
    config = RegistryConfig(
        host=_checked(table, "host", table.require("host"), _HOST, "host or host:port"),
        repo=_checked(table, "repo", table.require("repo"), _REPOSITORY, "a repository"),
        scheme=_scheme(table, "scheme", "https"),
        credentials=_credentials(table),
        registry_token=_optional(table, "registry_token", _BEARER, "a token"),
        blob_url_scheme=_scheme(table, "blob_url_scheme", ""),
        blob_redirected_host=_optional(table, "blob_redirected_host", _HOST, "host or host:port"),
        **_network(table),
    )
    if config.blob_redirected_host.startswith("["):
        raise table.error("blob_redirected_host", "expected a name or an IPv4 address")
    return config


def _object_store(kind: str, table: ConfigTable) -> ObjectStoreConfig:
    prefix = table.get("object_prefix", str, "")
    if not prefix.isprintable():
        raise table.error("object_prefix", "expected printable text")
    if kind == "s3":
        region = _checked(table, "region", table.require("region"), _REGION, "a region")
    else:
        region = ""
    return ObjectStoreConfig(
        kind=kind,
        endpoint=_checked(table, "endpoint", table.require("endpoint"), _HOST, "host or host:port"),
        bucket_name=_checked(
            table, "bucket_name", table.require("bucket_name"), _BUCKET, "a bucket"
        ),
        object_prefix=prefix,
        scheme=_scheme(table, "scheme", "https") or "https",
        region=region,
        keys=_keys(table),
        **_network(table),
    )


def _keys(table: ConfigTable) -> Credentials | None:
    """Return the access key; both halves or none."""
    name = _optional(table, "access_key_id", _BEARER, "an access key")
    secret = _optional(table, "access_key_secret", _BEARER, "a secret key")
    if bool(name) != bool(secret):
        raise table.error("access_key_secret" if name else "access_key_id", "missing")
    return Credentials(name, secret) if name else None


def _checked(table: ConfigTable, key: str, value: str, form: re.Pattern[str], expected: str) -> str:
    if not form.fullmatch(value):
        raise table.error(key, f"expected {expected}")
    return value


def _optional(table: ConfigTable, key: str, form: re.Pattern[str], expected: str) -> str:
    value = table.get(key, str, "")
    return _checked(table, key, value, form, expected) if value else ""


def _scheme(table: ConfigTable, key: str, default: str) -> str:
    value = table.get(key, str, default)
    if value not in ("https", "http", ""):
        raise table.error(key, "expected https, http or nothing")
    return value


def _credentials(table: ConfigTable) -> Credentials | None:
    text = table.get("auth", str, "")
    if not text:
        return None
    try:
        return Credentials.from_base64(text)
    except ValueError as error:
        raise table.error("auth", str(error)) from error
