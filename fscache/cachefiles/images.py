"""The images that clients have registered for the kernel's cache, and those still in use.

An entry that is dropped is served until nobody has it mounted: clients drop first and unmount
then. With a holder each entry is noted for a successor, and its bootstrap kept open.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from erofs.errors import NydusError
from fscache.blobentry import BlobEntry, parse_blob_entry
from fscache.blobs import BlobRegistry, check_paths
from fscache.cachefiles.cache import KernelCache
from fscache.cachefiles.errors import CachefilesError
from fscache.cachefiles.image import KernelImage, Services
from fscache.fetch.demand import Demand
from fscache.fetch.fetcher import Fetcher
from fscache.holder.link import HeldRecord, HolderLink
from fscache.sharing import Domain

__all__ = ["KIND", "KernelImages"]

logger = logging.getLogger(__name__)

# Of the records that a holder keeps.
KIND = "kernel image"
_REAP_SECONDS = 1.0
_CLOSE_SECONDS = 10.0
# For what is left of a mount that has just gone.
_UNMOUNT_SECONDS = 2.0
_PAUSE_SECONDS = 0.05


class KernelImages:
    """All images of one kernel cache, beside the registry that clients see.

    Args:
        cache: owned by the caller, and closed before `close` is called.
        registry: what clients see; owned by the caller, changed only here.
        environment: adds to the configurations of entries.
        link: notes what a successor needs, if there is one; not owned.
    """

    def __init__(
        self,
        cache: KernelCache,
        registry: BlobRegistry,
        environment: Mapping[str, str],
        link: HolderLink | None,
    ) -> None:
        fetcher = Fetcher()
        self._services = Services(cache, fetcher, Demand(fetcher), environment)
        self._registry = registry
        self._link = link
        # Held while an image is added or dropped, which may wait for a backend.
        self._lock = threading.Lock()
        self._domains: dict[Path, Domain] = {}
        self._images: list[KernelImage] = []
        self._stop = threading.Event()
        self._reaper = threading.Thread(target=self._reap_loop, name="reaper", daemon=True)
        self._reaper.start()

    def _domain(self, work_dir: Path) -> Domain:
        place = work_dir.absolute()
        domain = self._domains.get(place)
        if domain is None:
            domain = self._domains[place] = Domain(place, self._services.fetcher)
        return domain

    # Entries

    def add(self, entry: BlobEntry) -> None:
        """Register an entry and let the kernel ask for it.

        An entry that a killed daemon served is taken once more, with the configuration that comes
        now: clients repeat themselves after a restart.

        Raises:
            NydusError: it cannot be served, or its name is taken; nothing is left.
        """
        with self._lock, ExitStack() as stack:
            check_paths(entry)
            old = self._find(entry.domain_id, entry.id)
            image = KernelImage(entry, self._services, self._domain(entry.config.work_dir))
            stack.callback(image.close)
            again = old if old is not None and old.is_adopted and not old.is_leaving else None
            if again is None:
                self._registry.restore(entry, image.blob_ids)
                stack.callback(self._registry.remove, entry.domain_id, entry.id)
                self._require_free(image)
            image.serve()
            stack.pop_all()
            self._images.append(image)
            self._keep(image)
            if again is not None:
                again.leave()
                self._reap()

    def _find(self, domain_id: str, name: str) -> KernelImage | None:
        found = [
            image
            for image in self._images
            if (image.entry.domain_id, image.entry.id) == (domain_id, name)
        ]
        return found[-1] if found else None

    def _require_free(self, image: KernelImage) -> None:
        """Make sure that the kernel has nothing of another image under a name.

        Waits a moment for one that was just unmounted. Raises `CachefilesError`.
        """
        end = time.monotonic() + _UNMOUNT_SECONDS
        while not self._is_free(image):
            if time.monotonic() > end:
                raise CachefilesError(
                    "name is in use by a mount of another image: unmount it first",
                    errno.EBUSY, blob=f"{image.scope}/{image.entry.id}",
                )  # fmt: skip
            time.sleep(_PAUSE_SECONDS)

    def _is_free(self, image: KernelImage) -> bool:
        self._reap()
        others = [other for other in self._images if self._key(other) == self._key(image)]
        if any(not other.is_leaving for other in others):
            # A domain that is called as an entry without one is.
            name = f"{image.scope}/{image.entry.id}"
            raise CachefilesError("name is in use by another entry", errno.EEXIST, blob=name)
        if others:
            return all(other.digest == image.digest for other in others)
        # What the kernel has cached under the name may be of an image that was here before.
        return self._services.cache.cull(image.scope, image.entry.id)

    def remove(self, domain_id: str, name: str) -> None:
        """Drop an entry, or with an empty name all of a domain; unknown ones are no error."""
        with self._lock:
            self._registry.remove(domain_id, name)
            for image in self._images:
                if image.entry.domain_id == domain_id and name in ("", image.entry.id):
                    image.leave()
                    self._keep(image)
            self._reap()

    # For a successor

    def _keep(self, image: KernelImage) -> None:
        if self._link is not None:
            values: dict[str, object] = {
                "kind": KIND, "text": image.entry.text, "leaving": image.is_leaving,
            }  # fmt: skip
            self._link.keep(self._key(image), values, [image.fd])

    @staticmethod
    def _key(image: KernelImage) -> str:
        return f"{KIND}:{image.scope}/{image.entry.id}"

    def adopt(self, held: HeldRecord) -> None:
        """Serve what a killed daemon served; raise `NydusError`, then its reads fail."""
        entry = parse_blob_entry(str(held.values.get("text")))
        (fd,) = held.descriptors
        kept = Path(f"/proc/self/fd/{fd}")
        with self._lock, ExitStack() as stack:
            image = KernelImage(entry, self._services, self._domain(entry.config.work_dir), kept)
            stack.callback(image.close)
            if not held.values.get("leaving"):
                self._registry.restore(entry, image.blob_ids)
                stack.callback(self._registry.remove, entry.domain_id, entry.id)
            image.serve()
            stack.pop_all()
            self._images.append(image)
            if held.values.get("leaving"):
                image.leave()
            self._keep(image)
        logger.info("took over %s", entry.id)

    # Life

    @property
    def any_mounted(self) -> bool:
        """Whether somebody may still read from one of them."""
        return any(image.is_mounted for image in list(self._images))

    @property
    def trouble(self) -> str:
        """What no longer works, empty when reads are answered."""
        return self._services.fetcher.trouble

    def _reap_loop(self) -> None:
        while not self._stop.wait(_REAP_SECONDS):
            if any(image.is_leaving for image in list(self._images)):
                with self._lock:
                    self._reap()

    def _reap(self) -> None:
        """Close dropped images that nobody uses; the lock is held."""
        for image in [item for item in self._images if item.is_leaving and item.is_unused]:
            self._images.remove(image)
            if self._link is not None and self._find_key(image) is None:
                self._link.drop(self._key(image))
            self._close(image)

    def _find_key(self, image: KernelImage) -> KernelImage | None:
        found = [other for other in self._images if self._key(other) == self._key(image)]
        return found[-1] if found else None

    def _close(self, image: KernelImage) -> None:
        try:
            image.withdraw()
            image.close()
        except NydusError as error:
            # Nobody reads from it any more, and the others have to be looked after.
            logger.error("%s is not closed properly: %s", image.entry.id, error)

    def close(self) -> None:
        """Let go of everything, after the cache was closed."""
        self._stop.set()
        self._reaper.join()
        for image in self._images:
            with suppress(NydusError):
                image.close()
        self._images.clear()
        self._services.fetcher.close(_CLOSE_SECONDS)
