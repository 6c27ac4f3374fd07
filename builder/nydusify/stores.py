"""Storage backends as flags name them: `--…backend-type`, `-config`, `-config-file`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict

from builder.nydusify.flags import UsageError, Values
from builder.oci.errors import ImageError
from builder.oci.layout import BlobFolder
from builder.oci.objects import ObjectBlobs, object_backend
from builder.oci.place import BlobStore
from fscache.backend import Backend, BackendConfig, LocalFsConfig, ObjectStoreConfig, open_backend
from fscache.backend.config import ConfigTable, backend_config
from fscache.backend.retry import RetryPolicy

__all__ = [
    "StoreValues",
    "blob_reader",
    "blob_store",
    "decode_store",
    "store_values",
]

STORES = ("oss", "s3", "localfs")
_S3_ENDPOINT = "s3.amazonaws.com"


class StoreValues(TypedDict):
    """A backend in nydusd's words."""

    type: str
    config: dict[str, Any]


def store_values(values: Values, prefix: str) -> StoreValues | None:
    """Return type and configuration in nydusd's words, None when no backend is named.

    The text may hold secrets and is never quoted.

    Raises:
        UsageError: a type that is none, or no configuration.
        ImageError: it is no JSON object.
    """
    kind = values.text(f"{prefix}-type")
    if not kind:
        return None
    if kind not in STORES:
        raise UsageError(f"--{prefix}-type should be one of [{' '.join(STORES)}]")
    text: str | bytes = values.text(f"{prefix}-config")
    file = f"{prefix}-config-file"
    if not text and file in values.values and values.text(file):
        text = Path(values.text(file)).read_bytes()
    if not text:
        raise UsageError(
            f"backend configuration is empty, please specify option '--{prefix}-config'"
        )
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        # Without the cause: it quotes the text.
        raise ImageError("backend configuration is not a JSON object") from None
    if kind == "s3" and not config.get("endpoint"):
        config["endpoint"] = _S3_ENDPOINT
    return {"type": kind, "config": config}


def _config(values: Values, prefix: str) -> BackendConfig | None:
    """Return the backend that flags name, None for none; raise `NydusError`."""
    found = store_values(values, prefix)
    return None if found is None else decode_store(found, f"{prefix}-config")


def decode_store(found: StoreValues, path: str) -> BackendConfig:
    """Return what type and configuration describe; `path` is for errors; raise `ConfigError`."""
    return backend_config(
        found["type"], ConfigTable(found["config"], path), ConfigTable(found, path)
    )


def blob_reader(values: Values, prefix: str, stack: ExitStack) -> Backend | None:
    """Open the backend that flags name to read from it; raise `NydusError`."""
    config = _config(values, prefix)
    if config is None:
        return None
    backend: Backend
    if isinstance(config, ObjectStoreConfig):
        backend = object_backend(config)
    else:
        backend = open_backend(config)
    stack.callback(backend.close)
    return backend


def blob_store(
    values: Values, prefix: str, work: Path, retry: RetryPolicy, stack: ExitStack
) -> BlobStore | None:
    """Open the backend that flags name to write to it, None for none; raise `NydusError`."""
    config = _config(values, prefix)
    if config is None:
        return None
    force = bool(values.values.get("backend-force-push"))
    store: BlobStore
    if isinstance(config, ObjectStoreConfig):
        store = ObjectBlobs(config, work, retry, force=force)
    elif isinstance(config, LocalFsConfig) and config.dir is not None:
        store = BlobFolder(config.dir, force=force)
    else:
        raise ImageError("backend configuration of localfs needs 'dir'")
    stack.callback(store.close)
    return store
