"""How a daemon goes on with the mounts of one that was killed, or that makes room for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from erofs.errors import NydusError
from erofs.values import Value
from fscache.config import DaemonConfig
from fscache.entry import Entry
from fscache.holder.link import HeldRecord, Inheritance
from fscache.image import ServedImage
from fscache.mounts.place import PlainMount, is_our_overlay, mounted_at
from fscache.record import KERNEL_CACHE, ImageRecord, PlainRecord
from fscache.runtime import Runtime

__all__ = ["Adopted", "adopt", "recorded_entries"]

logger = logging.getLogger(__name__)

# Gives the configuration of an inherited image.
ConfigFor = Callable[[ImageRecord], DaemonConfig]


class Adopted(Value):
    """A mount that was taken over and is in its place."""

    path: str
    mounted_at: float
    image: ServedImage | None
    plain: PlainMount | None
    key: str
    source: str = ""


def recorded_entries(inheritance: Inheritance) -> list[Entry]:
    """Return the table that is held for a successor; nothing of it is served yet."""
    entries = []
    for held in inheritance.records:
        kind, path = held.values.get("kind"), held.values.get("path")
        since, leaving = held.values.get("mounted_at"), held.values.get("leaving")
        if kind not in ("image", "bind") or leaving:
            continue
        if isinstance(path, str) and isinstance(since, float):
            entries.append(Entry(path, since, None, None, is_image=kind == "image"))
    return entries


def adopt(runtime: Runtime, inheritance: Inheritance, config_for: ConfigFor) -> list[Adopted]:
    """Take over everything that a holder kept, and begin to answer; the oldest mounts first.

    What cannot be served is logged: its reads fail, and those of the others go on. Images
    that are no longer in their place are served for their users only.

    Raises:
        NydusError: a group cannot be taken over.
    """
    for domain in inheritance.domains:
        runtime.inherit_domain(domain)
    inheritance.domains = []
    for held in inheritance.records:
        if held.values.get("kind") == KERNEL_CACHE:
            runtime.inherit_kernel_cache(held)
    found = []
    for held in inheritance.records:
        try:
            entry = _adopt_record(runtime, held, config_for)
        except NydusError as error:
            logger.error("an inherited mount cannot be served, its reads fail: %s", error)
            continue
        if entry is not None:
            found.append(entry)
    runtime.start_inherited()
    inheritance.close()
    return sorted(found, key=lambda entry: entry.mounted_at)


def _adopt_record(runtime: Runtime, held: HeldRecord, config_for: ConfigFor) -> Adopted | None:
    kind = held.values.get("kind")
    if kind == "image":
        return _adopt_image(runtime, held, config_for)
    if kind in ("bind", "tmpfs"):
        record = PlainRecord.from_dict(held.values)
        mount = PlainMount(Path(record.mountpoint))
        if mounted_at(mount.mountpoint) is not None:
            return Adopted(record.path, record.mounted_at, None, mount, held.key, record.source)
    return None


def _adopt_image(runtime: Runtime, held: HeldRecord, config_for: ConfigFor) -> Adopted | None:
    record = ImageRecord.from_dict(held.values)
    (fd,) = held.descriptors
    image = ServedImage(
        config_for(record),
        Path(record.bootstrap),
        Path(record.mountpoint),
        kept=Path(f"/proc/self/fd/{fd}"),
    )
    runtime.adopt(image, record, held.key)
    if record.leaving:
        return None
    if not image.is_attached and not is_our_overlay(image.mountpoint):
        logger.info("%s was unmounted: served for its users only", record.mountpoint)
        runtime.unmount(image)
        return None
    logger.info("took over %s at %s", record.bootstrap, record.mountpoint)
    return Adopted(record.path, record.mounted_at, image, None, held.key)
