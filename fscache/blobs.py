"""Blob entries that clients have registered, by domain and id (spec tools 7.2 and 10.1).

Bookkeeping only: what serves the blobs asks for them here.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from erofs.errors import NydusError
from erofs.reader import open_bootstrap
from erofs.values import Value
from fscache.blobentry import BlobEntry

__all__ = ["BlobRegistry", "RegistryError", "check_paths"]


class RegistryError(NydusError):
    """An entry that cannot be registered."""


class _Registered(Value):
    """An entry, and the keys of the data blobs of its bootstrap."""

    entry: BlobEntry
    blobs: tuple[str, ...]


def _key(domain_id: str, name: str) -> str:
    return f"{domain_id}/{name}" if domain_id else name


def check_paths(entry: BlobEntry) -> Path:
    """Return the bootstrap; raise `RegistryError` unless an entry's file and directory exist."""
    path = entry.metadata_path
    if path is None or not path.is_file():
        raise RegistryError("metadata_path is no file", path=path)
    if not entry.config.work_dir.is_dir():
        raise RegistryError("work_dir is no directory", path=entry.config.work_dir)
    return path


class BlobRegistry:
    """Bootstraps, each once, and their data blobs, which entries of a domain share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, _Registered] = {}
        self._blobs: Counter[str] = Counter()

    def add(self, entry: BlobEntry) -> None:
        """Register a bootstrap and its data blobs.

        Raises:
            RegistryError: a path of the entry cannot serve, or its name is taken.
            FormatError: the bootstrap is none of RAFS v6.
        """
        path = check_paths(entry)
        with open_bootstrap(path) as bootstrap:
            self.restore(entry, [blob.id for blob in bootstrap.blobs])

    def restore(self, entry: BlobEntry, blob_ids: Sequence[str]) -> None:
        """Register a bootstrap whose data blobs are known; raise `RegistryError` as `add`."""
        blobs = tuple(_key(entry.domain_id, name) for name in blob_ids)
        key = _key(entry.domain_id, entry.id)
        with self._lock:
            if key in self._entries or key in self._blobs or key in blobs:
                raise RegistryError("blob_cache: bootstrap blob already exists", blob=key)
            for blob in blobs:
                if blob in self._entries:
                    raise RegistryError("a data blob has the name of a bootstrap", blob=blob)
            self._entries[key] = _Registered(entry, blobs)
            self._blobs.update(blobs)

    def remove(self, domain_id: str, name: str) -> None:
        """Drop an entry, or with an empty name all of a domain; unknown ones are no error."""
        with self._lock:
            keys = [_key(domain_id, name)]
            if not name:
                keys = [key for key, item in self._entries.items() if _is_of(item, domain_id)]
            for key in keys:
                registered = self._entries.pop(key, None)
                if registered is not None:
                    self._blobs -= Counter(registered.blobs)

    def as_list(self, domain_id: str, name: str) -> list[dict[str, object]]:
        """Return the entries of a domain and its data blobs, all or those of one name."""
        with self._lock:
            entries = [item for item in self._entries.values() if _is_of(item, domain_id)]
            counts = {
                key: self._blobs[key] for item in entries for key in item.blobs
            }  # in the order of the entries
        found: list[dict[str, object]] = [
            {
                "type": "bootstrap",
                "id": item.entry.id,
                "domain_id": domain_id,
                "metadata_path": str(item.entry.metadata_path),
                "blobs": [_name(key) for key in item.blobs],
            }
            for item in entries
        ]
        found += [
            {"type": "datablob", "id": _name(key), "domain_id": domain_id, "ref_count": count}
            for key, count in counts.items()
        ]
        return [item for item in found if not name or item["id"] == name]


def _is_of(registered: _Registered, domain_id: str) -> bool:
    return registered.entry.domain_id == domain_id


def _name(key: str) -> str:
    return key.rpartition("/")[2]
