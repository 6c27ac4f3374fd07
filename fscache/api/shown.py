"""Configurations as `GET /api/v1/daemon` shows them: version 2 with all keys, without secrets.

What may be secret is empty or null, as in the original (spec tools 7.1). Each key is named here:
one that is added to the settings is not shown before somebody has thought about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from fscache.backend.settings import (
    BackendConfig,
    HttpProxyConfig,
    LocalDiskConfig,
    LocalFsConfig,
    NetworkConfig,
    ObjectStoreConfig,
    ProxyConfig,
    RegistryConfig,
)
from fscache.settings import CacheConfig, DaemonConfig, OverlayConfig, PrefetchConfig, RafsConfig

__all__ = ["shown_config"]

_Shown = dict[str, object]


def shown_config(config: DaemonConfig) -> _Shown:
    """Return JSON values."""
    kind, backend = _backend(config.backend)
    kinds = ("localdisk", "localfs", "oss", "s3", "registry", "http-proxy")
    return {
        "version": 2,
        "id": config.id,
        "backend": {"type": kind, **dict.fromkeys(kinds), kind: backend},
        "external_backends": [
            # Both are merged into a configuration, of which nobody knows here what is secret.
            {"patch": {}, "type": item.type, "config": {}}
            for item in config.external_backends
        ],
        "cache": _cache(config.cache, config.work_dir),
        "rafs": _rafs(config.rafs),
        "overlay": _overlay(config.overlay),
    }


def _cache(cache: CacheConfig, work_dir: Path) -> _Shown:
    place = {"work_dir": str(work_dir)}
    files = {
        **place,
        "disable_indexed_map": cache.disable_indexed_map,
        "enable_encryption": cache.enable_encryption,
        "enable_convergent_encryption": cache.enable_convergent_encryption,
        "encryption_key": "",
    }
    kernel = cache.type == "fscache"
    return {
        "type": cache.type,
        "compressed": cache.compressed,
        "validate": cache.validate,
        "prefetch": _prefetch(cache.prefetch),
        "filecache": None if kernel else files,
        "fscache": place if kernel else None,
    }


def _rafs(rafs: RafsConfig) -> _Shown:
    return {
        "mode": rafs.mode,
        "batch_size": rafs.batch_size,
        "validate": rafs.validate,
        "enable_xattr": rafs.enable_xattr,
        "iostats_files": rafs.iostats_files,
        "access_pattern": rafs.access_pattern,
        "latest_read_files": rafs.latest_read_files,
        "prefetch": _prefetch(rafs.prefetch),
    }


def _prefetch(prefetch: PrefetchConfig) -> _Shown:
    return {
        "enable": prefetch.enable,
        "threads": prefetch.threads,
        "batch_size": prefetch.batch_size,
        "bandwidth_limit": prefetch.bandwidth_limit,
        "prefetch_all": prefetch.prefetch_all,
        "stream_prefetch": prefetch.stream_prefetch,
    }


def _overlay(overlay: OverlayConfig | None) -> _Shown | None:
    if overlay is None:
        return None
    return {"upper_dir": str(overlay.upper_dir), "work_dir": str(overlay.work_dir)}


def _backend(config: BackendConfig) -> tuple[str, _Shown]:
    """Return the type of a backend and its keys."""
    if isinstance(config, LocalFsConfig):
        return "localfs", {
            "blob_file": str(config.blob_file or ""),
            "dir": str(config.dir or ""),
            "alt_dirs": _texts(config.alt_dirs),
        }
    if isinstance(config, LocalDiskConfig):
        device = str(config.device_path)
        return "localdisk", {"device_path": device, "disable_gpt": config.disable_gpt}
    if isinstance(config, RegistryConfig):
        return "registry", {
            "scheme": config.scheme,
            "host": config.host,
            "repo": config.repo,
            "auth": None,
            **_network(config),
            "registry_token": None,
            "blob_url_scheme": config.blob_url_scheme,
            "blob_redirected_host": config.blob_redirected_host,
        }
    if isinstance(config, ObjectStoreConfig):
        region = {"region": config.region} if config.kind == "s3" else {}
        return config.kind, {
            "scheme": config.scheme,
            "endpoint": config.endpoint,
            **region,
            "bucket_name": config.bucket_name,
            "object_prefix": config.object_prefix,
            "access_key_id": "",
            "access_key_secret": "",
            **_network(config),
        }
    return "http-proxy", _http_proxy(config)


def _http_proxy(config: HttpProxyConfig) -> _Shown:
    is_socket = config.addr.startswith("/")
    addr = config.addr if is_socket else _address(config.addr)
    return {"addr": addr, "path": config.path.partition("?")[0], **_network(config)}


def _network(config: NetworkConfig) -> _Shown:
    """Return what all network backends have; mirrors are named by their hosts alone."""
    shown: _Shown = {
        "skip_verify": config.skip_verify,
        "ca_cert_files": _texts(config.ca_cert_files),
        "timeout": _seconds(config.timeout),
        "connect_timeout": _seconds(config.connect_timeout),
        "retry_limit": config.retry_limit,
        "proxy": _proxy(config.proxy or ProxyConfig("")),
    }
    if config.mirrors:
        shown["mirrors"] = [{"host": _address(mirror.host)} for mirror in config.mirrors]
    return shown


def _proxy(proxy: ProxyConfig) -> _Shown:
    return {
        "url": _address(proxy.url),
        "ping_url": _address(proxy.ping_url),
        "fallback": proxy.fallback,
        "check_interval": _seconds(proxy.check_interval),
        "use_http": proxy.use_http,
        "check_pause_elapsed": _seconds(proxy.check_pause_elapsed),
        "dragonfly_scheduler_endpoint": "",
    }


def _address(text: str) -> str:
    """Return scheme, host and port of an address: the rest may hold passwords and tokens."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if text else ""


def _texts(paths: Sequence[Path]) -> list[str]:
    return [str(path) for path in paths]


def _seconds(value: float) -> float:
    """Return whole seconds as a whole number, as the original writes them."""
    return int(value) if value == int(value) else value
