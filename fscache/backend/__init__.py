"""Where blobs come from: `open_backend` turns a configuration into a `Backend`."""

from __future__ import annotations

from fscache.backend.base import (
    AuthError,
    Backend,
    BackendConfig,
    BackendError,
    BackendMetrics,
    BlobReader,
    HttpProxyConfig,
    LocalFsConfig,
    NotFound,
    ShortRead,
    Unavailable,
    check_blob_id,
)
from fscache.backend.localfs import LocalFsBackend

__all__ = [
    "AuthError",
    "Backend",
    "BackendConfig",
    "BackendError",
    "BackendMetrics",
    "BlobReader",
    "HttpProxyConfig",
    "LocalFsConfig",
    "NotFound",
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
    # A daemon on local files needs no HTTP library.
    from fscache.backend.http import HttpProxyBackend

    return HttpProxyBackend(config)
