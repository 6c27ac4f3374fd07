"""Where blobs come from: `open_backend` turns a configuration into a `Backend`."""

from __future__ import annotations

from fscache.backend.base import (
    AuthError,
    Backend,
    BackendError,
    BackendMetrics,
    BlobReader,
    NotFound,
    ShortRead,
    Unavailable,
    check_blob_id,
)
from fscache.backend.localfs import LocalFsBackend
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

__all__ = [
    "AuthError",
    "Backend",
    "BackendConfig",
    "BackendError",
    "BackendMetrics",
    "BlobReader",
    "Credentials",
    "HttpProxyConfig",
    "LocalDiskConfig",
    "LocalFsConfig",
    "MirrorConfig",
    "NotFound",
    "ObjectStoreConfig",
    "ProxyConfig",
    "RegistryConfig",
    "ShortRead",
    "Unavailable",
    "check_blob_id",
    "open_backend",
]


def open_backend(config: BackendConfig) -> Backend:
    """Return the backend that `config` describes; the caller closes it.

    Nothing is connected yet. Raises `BackendError` for a configuration that names no place.
    """
    if isinstance(config, LocalFsConfig):
        return LocalFsBackend(config)
    # A daemon on local files needs no HTTP library, and none of what the others need.
    if isinstance(config, LocalDiskConfig):
        from fscache.backend.localdisk import LocalDiskBackend

        return LocalDiskBackend(config)
    if isinstance(config, RegistryConfig):
        from fscache.backend.registry import RegistryBackend

        return RegistryBackend(config)
    if isinstance(config, ObjectStoreConfig):
        from fscache.backend.objectstore import ObjectStoreBackend

        return ObjectStoreBackend(config)
    from fscache.backend.http import HttpProxyBackend

    return HttpProxyBackend(config)
