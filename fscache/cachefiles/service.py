"""One cache directory served to the kernel, begun anew or taken over from a killed daemon."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

from erofs.errors import NydusError
from erofs.values import Value
from fscache.blobentry import BlobEntry
from fscache.blobs import BlobRegistry
from fscache.cachefiles.cache import KernelCache
from fscache.cachefiles.device import DEVICE, Device
from fscache.cachefiles.domain import keep_device
from fscache.cachefiles.errors import CachefilesError, CachefilesMissing
from fscache.cachefiles.images import KIND, KernelImages
from fscache.cachefiles.support import (
    dead_mounts,
    require_fscache_mounts,
    unsafe_kernel,
)
from fscache.holder.link import HolderLink, Inheritance
from fscache.mounts.mountinfo import mounts
from fscache.record import KERNEL_CACHE

__all__ = ["CacheOptions", "KernelService"]

logger = logging.getLogger(__name__)

# A predecessor that just ends has the device for a moment yet.
_DEVICE_SECONDS = 2.0
_CLOSE_SECONDS = 10.0
_INSTEAD = (
    "; instead of singleton --fscache use nydusd erofs or nydusd fuse, which read lazily by"
    " fanotify from Linux 6.14 on, by --transport nbd or fuse on any kernel, or --transport eager"
)


class CacheOptions(Value):
    """The kernel's cache.

    Args:
        directory: on ext4, xfs or btrfs.
        tag: its name in `/proc/fs/fscache/caches`.
        threads: how many fill it at once.
    """

    directory: Path
    tag: str | None = None
    threads: int = 4


class KernelService:
    """Owner of the device, the cache and its images; from the constructor on it serves.

    Args:
        options: see the class.
        registry: what clients see of the images; not owned.
        environment: adds to the configurations of entries.
        link: the holder that keeps what a successor needs, not owned.
        inheritance: what it kept; all of it is taken.

    Raises:
        CachefilesError: this kernel, or this directory, cannot; the text names alternatives.
    """

    def __init__(
        self,
        options: CacheOptions,
        registry: BlobRegistry,
        environment: Mapping[str, str],
        link: HolderLink,
        inheritance: Inheritance,
    ) -> None:
        self.directory = options.directory.absolute()
        self._link = link
        with closing(inheritance), ExitStack() as undo:
            device = _inherited_device(inheritance)
            fresh = device is None
            if device is None:
                device = _bound_device(self.directory, options.tag)
            undo.callback(device.close)
            # Nothing is taken from the device yet, so this harms nobody.
            self.can_be_taken_over = device.restore()
            undo.pop_all()
            self._cache = KernelCache(device, self.directory, options.threads)
            kept = link if self.can_be_taken_over else None
            self._images = KernelImages(self._cache, registry, environment, kept)
            if kept is not None:
                keep_device(kept, self.directory, device)
            self._adopt(inheritance)
        self._cache.start()
        self._tell(fresh=fresh)

    def _adopt(self, inheritance: Inheritance) -> None:
        for held in inheritance.records:
            if held.values.get("kind") == KIND:
                try:
                    self._images.adopt(held)
                except NydusError as error:
                    logger.error("an inherited image cannot be served, its reads fail: %s", error)

    def _tell(self, *, fresh: bool) -> None:
        if not fresh:
            logger.info("took over the cache in %s", self.directory)
            return
        kernel = os.uname()
        warning = unsafe_kernel(kernel.release, kernel.version)
        if warning:
            logger.warning("%s", warning)
        if not self.can_be_taken_over:
            logger.warning(
                "this kernel has no 'restore' (Linux 6.8): when nydusd ends or is killed, mounts"
                " are dead"
            )
        for place in dead_mounts(mounts()):
            logger.error(
                "%s is the dead mount of an earlier daemon: unmount it and mount it again", place
            )

    # Entries

    def add(self, entry: BlobEntry) -> None:
        """Register an entry and let the kernel ask for it; raise `NydusError`."""
        self._images.add(entry)

    def remove(self, domain_id: str, name: str) -> None:
        """Drop an entry, or all of a domain; mounted ones are served on."""
        self._images.remove(domain_id, name)

    def cull(self, name: str) -> None:
        """Remove an idle blob from the kernel's cache; raise `CachefilesError`."""
        self._cache.cull_everywhere(name)

    # Life

    @property
    def trouble(self) -> str:
        """What no longer works, empty when reads are answered."""
        return self._cache.trouble or self._images.trouble

    @property
    def summary(self) -> str:
        """What there is, for people."""
        return f"{self._cache.open_files} files open, {self._cache.waiting} reads wait"

    def close(self, *, leave: bool) -> bool:
        """End; return whether all is left to a successor, as it is while images are mounted."""
        in_use = self._images.any_mounted or self._cache.open_files > 0
        leave = (in_use or leave) and self.can_be_taken_over
        if in_use:
            logger.warning(
                "images are mounted: %s",
                "a successor has to come, or their readers fail" if leave else "they are dead now",
            )
        self._cache.close(_CLOSE_SECONDS, leave=leave)
        self._images.close()
        return leave


def _inherited_device(inheritance: Inheritance) -> Device | None:
    for held in inheritance.records:
        if held.values.get("kind") == KERNEL_CACHE:
            fd = held.descriptors.pop()
            return Device(fd)
    return None


def _bound_device(directory: Path, tag: str | None) -> Device:
    if not directory.is_dir():
        raise CachefilesError("--fscache needs a directory", path=directory)
    with ExitStack() as stack:
        try:
            device = Device.open(DEVICE, _DEVICE_SECONDS)
            stack.callback(device.close)
            device.bind(directory, tag)
            require_fscache_mounts()
        except CachefilesMissing as error:
            raise CachefilesError(error.what + _INSTEAD, error.errno, **error.where) from error
        stack.pop_all()
        return device
