"""Backends as command lines name them: a type and JSON in nydusd's words (spec tools 4.4)."""

from __future__ import annotations

from pathlib import Path

from builder.errors import BuildError
from fscache.backend import Backend, LocalFsConfig, open_backend
from fscache.backend.base import BlobReader, check_blob_id
from fscache.backend.settings import BackendConfig

__all__ = [
    "BACKEND_TYPES",
    "BlobPlaces",
    "blob_directory",
    "blob_file",
    "config_text",
    "configured_backend",
    "daemon_backend",
]

# The types of the real tool; `localfs` is what --blob-dir is for.
BACKEND_TYPES = ("oss", "s3", "registry", "localdisk", "http-proxy")


class BlobPlaces:
    """Blobs of a directory, and those that it does not have from another backend.

    Both backends stay the caller's.
    """

    def __init__(self, directory: Path, local: Backend, remote: Backend | None) -> None:
        self._directory = directory
        self._local = local
        self._remote = remote

    def open(self, blob_id: str) -> BlobReader:
        """Return a reader of one blob; raise `NydusError` when that id is refused."""
        if self._remote is None or (self._directory / check_blob_id(blob_id)).is_file():
            return self._local.open(blob_id)
        return self._remote.open(blob_id)


def blob_file(path: Path) -> Backend:
    """Return a backend that has one file for every id."""
    return open_backend(LocalFsConfig(blob_file=path))


def blob_directory(path: Path) -> Backend:
    """Return a backend whose blobs are files named by id; raise `BuildError`."""
    if not path.is_dir():
        raise BuildError("directory of blobs does not exist", path=path)
    return open_backend(LocalFsConfig(dir=path))


def configured_backend(kind: str, text: str | bytes) -> Backend:
    """Return the backend that JSON describes; the text may hold secrets and is never quoted.

    Raises:
        BuildError: JSON that is none.
        ConfigError: a type that is not there yet, a missing or wrong key.
        BackendError: an address that is none.
    """
    # Imported here: what is in a directory needs no configuration.
    import json

    from fscache.backend.config import ConfigTable, backend_config

    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BuildError("backend configuration is not JSON") from error
    place = ConfigTable({"type": kind}, "backend")
    return open_backend(backend_config(kind, ConfigTable(values, "backend.config"), place))


def config_text(path: Path) -> str:
    """Return the text of a configuration of nydusd; raise `ConfigError`."""
    from fscache.backend.table import ConfigError

    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read ({error})", path=path) from error


def daemon_backend(path: Path) -> BackendConfig:
    """Return the backend that a configuration of nydusd names, of version 1 or 2.

    Raises:
        ConfigError: the file cannot be read, or is no configuration.
    """
    # Imported here: decoding whole configurations is what nearly nobody asks for.
    from fscache.backend.config import ConfigTable
    from fscache.backend.table import ConfigError
    from fscache.decode import decode_text, version1, version2

    try:
        value = decode_text(config_text(path))
        table = ConfigTable(value, "")
        config = version2(table) if "version" in value else version1(table)
    except ConfigError as error:
        error.add_context(path=path)
        raise
    return config.backend
