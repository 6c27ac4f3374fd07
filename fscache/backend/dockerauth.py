"""Credentials as Docker keeps them: `config.json`, and the helpers that it names."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fscache.backend.settings import Credentials

__all__ = ["docker_credentials"]

logger = logging.getLogger(__name__)

SIZE_LIMIT = 1 << 20
HELPER_SECONDS = 15.0

_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HUB_KEY = "https://index.docker.io/v1/"
# User name that says: the secret is an identity token, no password.
_TOKEN_USER = "<token>"  # noqa: S105 - Docker's word for it


def docker_credentials(directory: Path, host: str) -> Credentials | None:
    """Return the credentials for a registry, None when there are none.

    The helper for the host comes first, then the general one, then what the file itself has.
    What is broken is logged without its content and counts as none.

    Args:
        directory: `$DOCKER_CONFIG` or `~/.docker`.
        host: `host[:port]` of the registry.
    """
    config = _load(directory / "config.json")
    key = _HUB_KEY if host in _DOCKER_HUB else host
    helper = _section(config, "credHelpers").get(host) or config.get("credsStore")
    if isinstance(helper, str) and helper:
        found = _ask_helper(helper, key)
        if found is not None:
            return found
    for name, entry in _section(config, "auths").items():
        if _host(name) == _host(key) and isinstance(entry, Mapping):
            return _entry(entry, host)
    return None


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(SIZE_LIMIT))
    except FileNotFoundError:
        return {}
    except OSError as error:
        logger.warning("%s cannot be read (%s)", path, error.strerror)
        return {}
    except (ValueError, RecursionError):
        logger.warning("%s is not JSON", path)
        return {}
    return value if isinstance(value, dict) else {}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


def _host(name: str) -> str:
    return name.partition("://")[2].partition("/")[0] if "://" in name else name.partition("/")[0]


def _entry(entry: Mapping[str, Any], host: str) -> Credentials | None:
    auth, username, password = (entry.get(key) for key in ("auth", "username", "password"))
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credentials(_TOKEN_USER, "", token)
    if isinstance(auth, str) and auth:
        try:
            return Credentials.from_base64(auth)
        except ValueError:
            logger.warning("Docker's credentials for %s are damaged", host)
            return None
    if isinstance(username, str) and isinstance(password, str) and username:
        return Credentials(username, password)
    return None


def _ask_helper(name: str, key: str) -> Credentials | None:
    """Run `docker-credential-<name> get`; what it writes to standard error is dropped."""
    if not _HELPER.fullmatch(name):
        logger.warning("refused name of a Docker credential helper")
        return None
    # Imported here: few configurations name a helper, and it takes 5 ms of every start.
    import subprocess

    program = f"docker-credential-{name}"
    try:
        done = subprocess.run(
            [program, "get"],
            input=key.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=HELPER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        logger.warning("%s takes longer than %d s", program, HELPER_SECONDS)
        return None
    except OSError as error:
        logger.warning("%s cannot be run (%s)", program, error.strerror)
        return None
    if done.returncode != 0:
        # The normal answer of a helper that knows nothing about this host.
        logger.info("%s has no credentials for %s", program, key)
        return None
    try:
        value = json.loads(done.stdout)
        username, secret = value["Username"], value["Secret"]
    except (ValueError, RecursionError, KeyError, TypeError):
        logger.warning("%s gives an answer that is none", program)
        return None
    if not isinstance(username, str) or not isinstance(secret, str) or not username:
        return None
    if username == _TOKEN_USER:
        return Credentials(username, "", secret)
    return Credentials(username, secret)
