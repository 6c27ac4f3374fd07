"""What the environment adds to a configuration (tools 3.4); called by a command line only.

`IMAGE_PULL_AUTH` replaces a registry's `auth`, `NYDUS_HEADER_<name>` adds a header to every
request, Docker's configuration gives credentials when nothing else does, and the folder
`NYDUS_HOSTS_DIR` has containerd's mirrors of registries.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fscache.backend.config import is_header
from fscache.backend.dockerauth import docker_credentials
from fscache.backend.hosts import HOSTS_VARIABLE, with_hosts
from fscache.backend.settings import (
    BackendConfig,
    Credentials,
    NetworkConfig,
    RegistryConfig,
)
from fscache.backend.table import ConfigError

__all__ = ["with_environment"]

PULL_AUTH = "IMAGE_PULL_AUTH"
HEADER_PREFIX = "NYDUS_HEADER_"


def with_environment(config: BackendConfig, environment: Mapping[str, str]) -> BackendConfig:
    """Return a backend's configuration with what the environment adds.

    May run a Docker credential helper.

    Raises:
        ConfigError: names the variable whose value cannot be used, without the value, or the
            file.
    """
    if not isinstance(config, NetworkConfig):
        return config
    headers = _headers(environment)
    if headers:
        config = config._replace(headers={**config.headers, **headers})
    if isinstance(config, RegistryConfig):
        config = config._replace(credentials=_credentials(config, environment))
        folder = environment.get(HOSTS_VARIABLE)
        if folder:
            config = with_hosts(config, Path(folder))
    return config


def _headers(environment: Mapping[str, str]) -> dict[str, str]:
    headers = {}
    for variable, value in environment.items():
        if variable.startswith(HEADER_PREFIX):
            name = variable.removeprefix(HEADER_PREFIX)
            if not is_header(name, value):
                raise ConfigError(f"environment {variable!a}: cannot be an HTTP header")
            headers[name] = value
    return headers


def _credentials(config: RegistryConfig, environment: Mapping[str, str]) -> Credentials | None:
    text = environment.get(PULL_AUTH)
    if text:
        try:
            return Credentials.from_base64(text)
        except ValueError as error:
            raise ConfigError(f"environment {PULL_AUTH}: {error}") from error
    if config.credentials is not None or config.registry_token:
        return config.credentials
    directory = environment.get("DOCKER_CONFIG")
    home = environment.get("HOME")
    if directory:
        return docker_credentials(Path(directory), config.host)
    return docker_credentials(Path(home) / ".docker", config.host) if home else None
