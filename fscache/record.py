"""What a daemon has its holder note of each mount, so that a successor can go on with it.

The records hold configurations, with their credentials: they stay in the memory of two
processes of the same user and are never logged or written to a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from erofs.values import Value, field
from fscache.holder.link import HolderError

__all__ = ["KERNEL_CACHE", "ImageRecord", "PlainRecord"]

# The device of the kernel's cachefiles: `directory` is that of its cache.
KERNEL_CACHE = "kernel cache"


def _take(values: Mapping[str, object], key: str, kind: type) -> object:
    value = values.get(key)
    if kind is float and isinstance(value, int):
        value = float(value)
    if not isinstance(value, kind):
        raise HolderError(f"record of a mount without {key}: another version wrote it")
    return value


class _Record(Value):
    """A flat record of JSON values."""

    def to_dict(self) -> dict[str, object]:
        """Return the values for the holder."""
        return self._asdict()

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Check and take the values of a holder; raise `HolderError`."""
        kinds = {"str": str, "int": int, "float": float, "bool": bool}
        fields = cls.__annotations__
        return cls(**{name: _take(values, name, kinds[kind]) for name, kind in fields.items()})


class ImageRecord(_Record):
    """A lazily served image; its bootstrap goes along as a descriptor.

    Args:
        path: its place in the table of mounts.
        mountpoint: its directory on the host.
        bootstrap: the path it had.
        work_dir: the cache directory.
        config: the text of its configuration.
        prefetch_files: the list that was given with the mount, joined by NUL, empty without one.
        auth: base64 of credentials that replaced those of the configuration, or empty.
        erofs: name below `/sys/fs/erofs`.
        device: `st_dev` of its files.
        mounted_at: seconds since the epoch.
        leaving: unmounted, and only served for the users it still has.
        transport: how the kernel asks for its data.
    """

    path: str
    mountpoint: str
    bootstrap: str
    work_dir: str
    config: str = field(repr=False)
    prefetch_files: str = field(repr=False)
    auth: str = field(repr=False)
    erofs: str
    device: int
    mounted_at: float
    leaving: bool
    transport: str
    kind: str = "image"


class PlainRecord(_Record):
    """A mount that needs nobody to serve it: `bind` of a source, or `tmpfs`."""

    path: str
    mountpoint: str
    mounted_at: float
    kind: str
    source: str
