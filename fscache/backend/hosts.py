"""Mirrors as containerd knows them: a folder with a `hosts.toml` for each registry (tools 17.4)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

from erofs.values import Value
from fscache.backend.base import BackendError
from fscache.backend.config import is_header
from fscache.backend.sender import split_address
from fscache.backend.settings import MirrorConfig, RegistryConfig
from fscache.backend.table import ConfigError, ConfigTable

__all__ = ["HOSTS_VARIABLE", "RegistryHosts", "registry_hosts", "with_hosts"]

logger = logging.getLogger(__name__)

HOSTS_VARIABLE = "NYDUS_HOSTS_DIR"
FILE = "hosts.toml"
SIZE_LIMIT = 1 << 20
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")


class RegistryHosts(Value):
    """What a file says of a registry.

    Args:
        mirrors: asked before it, in order.
        skip_verify: accept any certificate of the registry itself.
        ca_cert_files: further authorities for the registry itself.
        scheme: of the registry itself, empty when nothing is said.
    """

    mirrors: tuple[MirrorConfig, ...] = ()
    skip_verify: bool = False
    ca_cert_files: tuple[Path, ...] = ()
    scheme: str = ""


def registry_hosts(directory: Path, host: str) -> RegistryHosts:
    """Return what containerd's folder says of a registry, nothing when it has no file for it.

    Args:
        directory: such as `/etc/containerd/certs.d`.
        host: `host[:port]` of the registry.

    Raises:
        ConfigError: a file that cannot be read or is none; values are not quoted.
    """
    # Imported here: it takes 9 ms of every start, and few have such a folder.
    import tomllib

    for name in _names(host):
        path = directory / name / FILE
        try:
            with path.open("rb") as file:
                data = file.read(SIZE_LIMIT)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ConfigError(f"cannot be read ({error.strerror})", path=path) from error
        try:
            return _decode(tomllib.loads(data.decode()), path, host)
        except ConfigError as error:
            error.add_context(path=path)
            raise
        except (ValueError, RecursionError):
            # Without the cause: it quotes the text, which may hold secret headers.
            raise ConfigError("is not TOML", path=path) from None
    return RegistryHosts()


def with_hosts(config: RegistryConfig, directory: Path) -> RegistryConfig:
    """Return a configuration with what the folder says, unless it has mirrors or a proxy.

    Raises:
        ConfigError: see `registry_hosts`.
    """
    if config.mirrors or config.proxy is not None:
        return config
    if not os.access(directory, os.F_OK):
        logger.warning("the folder of mirrors is not there: %s", directory)
    hosts = registry_hosts(directory, config.host)
    return config._replace(
        mirrors=hosts.mirrors,
        skip_verify=config.skip_verify or hosts.skip_verify,
        ca_cert_files=(*config.ca_cert_files, *hosts.ca_cert_files),
        scheme="http" if hosts.scheme == "http" else config.scheme,
    )


def _names(host: str) -> Iterator[str]:
    hub = host in _DOCKER_HUB
    for one in ("docker.io", *_DOCKER_HUB[1:]) if hub else (host,):
        name, colon, port = one.rpartition(":")
        if colon and port.isdigit():
            yield f"{name}_{port}_"
            yield one
            yield name
        else:
            yield one
    yield "_default"


def _decode(value: dict[str, Any], path: Path, host: str) -> RegistryHosts:
    table = ConfigTable(value, "")
    found = RegistryHosts()
    mirrors = []
    hosts = table.table("host")
    for url in value.get("host") or {}:
        _split(url)
        entry = hosts.table(url)
        if _is_origin(url, host):
            found = found._replace(
                skip_verify=entry.get("skip_verify", bool, False),
                ca_cert_files=_authorities(entry, value["host"][url], path.parent),
                scheme=_split(url).scheme,
            )
            continue
        mirror = _mirror(url, entry, value["host"][url], path.parent)
        if mirror is not None:
            mirrors.append(mirror)
    server = table.get("server", str, "")
    if server and not _is_origin(server, host):
        mirror = _mirror(server, table, value, path.parent)
        if mirror is not None:
            mirrors.append(mirror)
    return found._replace(mirrors=tuple(mirrors))


def _split(url: str) -> SplitResult:
    """Split an address that may come without a scheme; raise `ConfigError` without quoting it."""
    try:
        parts = split_address(url if "://" in url else f"https://{url}", "host")
    except BackendError as error:
        raise ConfigError(error.what) from error
    if parts.username is not None:
        raise ConfigError("host has a user's name or password in it")
    return parts


def _is_origin(url: str, host: str) -> bool:
    netloc = _split(url).netloc
    return netloc == host or (netloc in _DOCKER_HUB and host in _DOCKER_HUB)


def _mirror(
    url: str, table: ConfigTable, value: dict[str, Any], folder: Path
) -> MirrorConfig | None:
    """Return a mirror, None for one that nothing may be pulled from."""
    capabilities = table.get("capabilities", list, ["pull", "resolve", "push"])
    if "pull" not in capabilities:
        return None
    parts = _split(url)
    path = parts.path.rstrip("/")
    if "client" in table:
        logger.warning("certificates of clients are not supported: %s", parts.netloc)
    return MirrorConfig(
        host=f"{parts.scheme}://{parts.netloc}",
        base_path=path if table.get("override_path", bool, False) else f"{path}/v2",
        headers=_headers(value.get("header") or {}),
        ping_url=table.get("ping_url", str, ""),
        health_check_interval=table.seconds("health_check_interval", 5.0),
        failure_limit=table.number("failure_limit", 5, 1, 255),
        skip_verify=table.get("skip_verify", bool, False),
        ca_cert_files=_authorities(table, value, folder),
        resolves="resolve" in capabilities,
        shares_credentials=False,
    )


def _headers(value: Any) -> dict[str, str]:
    """Return header fields; of several values of one they are joined by commas."""
    if not isinstance(value, dict):
        raise ConfigError("header: expected a table")
    found = {}
    for name, one in value.items():
        texts = one if isinstance(one, list) else [one]
        joined = ", ".join(text for text in texts if isinstance(text, str))
        if not all(isinstance(text, str) for text in texts) or not is_header(name, joined):
            raise ConfigError(f"header: {name!a} cannot be a field of an HTTP head")
        found[name] = joined
    return found


def _authorities(table: ConfigTable, value: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    """Return the files of authorities: one or a list, relative ones beside `hosts.toml`."""
    if isinstance(value.get("ca"), str):
        return (folder / table.get("ca", str, ""),)
    return tuple(folder / path for path in table.paths("ca"))
