"""Configurations of the backends as frozen values (tools 4.4); nothing is decoded or opened here.

What may be secret has no place in `repr`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from erofs.values import EMPTY, Value, field

__all__ = [
    "BackendConfig",
    "Credentials",
    "HttpProxyConfig",
    "LocalDiskConfig",
    "LocalFsConfig",
    "MirrorConfig",
    "NetworkConfig",
    "ObjectStoreConfig",
    "ProxyConfig",
    "RegistryConfig",
]


class Credentials(Value):
    """A user's name and password, or the identity token that a login gave in their place."""

    username: str = field(repr=False)
    password: str = field(repr=False)
    identity_token: str = field(default="", repr=False)

    @classmethod
    def from_base64(cls, text: str) -> Self:
        """Decode base64 of `user:password`; raise `ValueError` that does not quote it."""
        try:
            username, colon, password = (
                base64.b64decode(text.strip(), validate=True).decode().partition(":")
            )
        except (binascii.Error, ValueError):
            colon = ""
        if not colon or not username:
            raise ValueError("expected base64 of user:password")
        return cls(username, password)

    @property
    def basic(self) -> str:
        """Value of an Authorization header."""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"


class LocalFsConfig(Value):
    """Backend `localfs` (tools 4.4): one file for every id, or directories of files by id."""

    dir: Path | None = None
    blob_file: Path | None = None
    alt_dirs: tuple[Path, ...] = ()


class LocalDiskConfig(Value):
    """Backend `localdisk` (tools 4.4): blobs as partitions of a disk, or the disk as one blob."""

    device_path: Path
    disable_gpt: bool = False


class ProxyConfig(Value):
    """An HTTP proxy (tools 4.4.1); times in seconds.

    Args:
        url: `http://host:port`, possibly with `user:password@`.
        ping_url: asked for health; empty for no checks.
        fallback: go direct when the proxy is unhealthy or answers 5xx.
        check_interval: pause between checks.
        check_pause_elapsed: idle time after which checks pause.
        use_http: ask the proxy for https addresses as http.
    """

    url: str = field(repr=False)
    ping_url: str = field(default="", repr=False)
    fallback: bool = True
    check_interval: float = 5.0
    check_pause_elapsed: float = 300.0
    use_http: bool = False


class MirrorConfig(Value):
    """A mirror of a backend's host (tools 4.4.2); times in seconds.

    Args:
        host: `http://host:port`, put in the place of the backend's scheme and host.
        headers: added to every request to the mirror.
        ping_url: asked for health; empty for `<host>/v2`.
        health_check_interval: pause between checks.
        failure_limit: failures in a row until the mirror is left out.
        health_check_pause_elapsed: idle time after which checks pause.
        base_path: what stands for `/v2` there; empty for the same.
        skip_verify: accept any certificate of it.
        ca_cert_files: PEM files of its authorities.
        resolves: whether it knows what a tag stands for now.
        shares_credentials: whether it is shown what the registry itself is shown.
    """

    host: str
    headers: Mapping[str, str] = field(default=EMPTY, repr=False)
    ping_url: str = field(default="", repr=False)
    health_check_interval: float = 5.0
    failure_limit: int = 5
    health_check_pause_elapsed: float = 300.0
    base_path: str = ""
    skip_verify: bool = False
    ca_cert_files: tuple[Path, ...] = ()
    resolves: bool = True
    shares_credentials: bool = True


class NetworkConfig(Value, kw_only=True):
    """What all network backends have; times in seconds.

    Args:
        timeout: longest wait for the next bytes of an answer.
        connect_timeout: longest wait for a connection.
        retry_limit: repetitions of a failed read, 0 for the default of `RetryPolicy`.
        skip_verify: accept any certificate.
        ca_cert_files: PEM files of further authorities.
        transfer_timeout: longest time for one read altogether, so that a server which
            sends a byte now and then does not hold a reader for ever.
        proxy: a proxy for every request; not together with mirrors.
        mirrors: tried in this order before the backend's own host.
        headers: added to every request (`NYDUS_HEADER_<name>`).
    """

    timeout: float = 5.0
    connect_timeout: float = 5.0
    retry_limit: int = 0
    skip_verify: bool = False
    ca_cert_files: tuple[Path, ...] = ()
    transfer_timeout: float = 45.0
    proxy: ProxyConfig | None = None
    mirrors: tuple[MirrorConfig, ...] = ()
    headers: Mapping[str, str] = field(default=EMPTY, repr=False)


class HttpProxyConfig(NetworkConfig):
    """Backend `http-proxy` (tools 4.4).

    Args:
        addr: `http://` or `https://` address, or the absolute path of a unix socket.
        path: prefix; a blob is `<path>/<blob id>`.
    """

    addr: str
    path: str = ""


class RegistryConfig(NetworkConfig):
    """Backend `registry` (tools 4.4): blobs of one repository.

    Args:
        host: `host` or `host:port`.
        repo: the repository.
        scheme: `https`, `http`, or empty: try https, take http from a host without TLS.
        credentials: for a Basic challenge or the token service; None for anonymous.
        registry_token: a bearer token that is used as it is.
        blob_url_scheme: scheme that replaces the one of redirected addresses.
        blob_redirected_host: host that replaces the one of redirected addresses.
    """

    host: str
    repo: str
    scheme: str = "https"
    credentials: Credentials | None = field(default=None, repr=False)
    registry_token: str = field(default="", repr=False)
    blob_url_scheme: str = ""
    blob_redirected_host: str = ""


class ObjectStoreConfig(NetworkConfig):
    """Backends `oss` and `s3` (tools 4.4): objects of one bucket.

    Args:
        kind: `oss` or `s3`.
        endpoint: `host` or `host:port`.
        bucket_name: the bucket.
        object_prefix: before every blob id.
        scheme: `https` or `http`.
        region: of `s3`.
        keys: access key and its secret; None for requests that are not signed.
    """

    kind: str
    endpoint: str
    bucket_name: str
    object_prefix: str = ""
    scheme: str = "https"
    region: str = ""
    keys: Credentials | None = field(default=None, repr=False)


BackendConfig = (
    LocalFsConfig | LocalDiskConfig | HttpProxyConfig | RegistryConfig | ObjectStoreConfig
)
