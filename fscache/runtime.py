"""All images of one process: what they share, and what outlives an unmount.

An unmounted image whose file system still has users stays here and is served until they
are gone; `close` waits for that, because a channel that ends turns holes into zeros.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from erofs.errors import NydusError
from fscache.backend.settings import Credentials
from fscache.config import DaemonConfig
from fscache.domain import CacheDomain
from fscache.domains import open_domain
from fscache.fetch.fetcher import Fetcher
from fscache.holder.link import HeldDomain, HeldRecord, HolderError, HolderLink
from fscache.image import ImageOptions, ServedImage
from fscache.record import ImageRecord
from fscache.sharing import Domain, LazyUnsupported, prepare_work_dir
from fscache.transport import Transport, candidates
from fscache.verdict import forget_verdict, known_verdict, remember_verdict

__all__ = ["Runtime"]

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
_POLL_SECONDS = 0.05
_TELL_SECONDS = 10.0


class Runtime:
    """Owner of the fetcher, of the cache domains, and of images that are mounted or leaving.

    Args:
        link: the holder that keeps what a successor needs, if there is one; not owned.
    """

    def __init__(self, link: HolderLink | None = None) -> None:
        self._link = link
        self._fetcher = Fetcher()
        self._lock = threading.Lock()
        self._domains: dict[tuple[Path, Transport], Domain] = {}
        self._images: list[ServedImage] = []
        self._leaving: list[ServedImage] = []
        self._stop = threading.Event()
        self._reaper = threading.Thread(target=self._reap_loop, name="reaper", daemon=True)
        self._reaper.start()

    def mount(
        self,
        config: DaemonConfig,
        bootstrap: Path,
        mountpoint: Path,
        options: ImageOptions,
        transport: Transport = Transport.AUTO,
    ) -> ServedImage:
        """Mount an image and serve it; raise `NydusError`, then nothing of it is left."""
        # Before it is opened: this very process would have to answer the events.
        for known in list(self._domains.values()):
            known.require_unmarked(bootstrap)
        image = ServedImage(config, bootstrap, mountpoint)
        try:
            domain = self._domain(config.work_dir, transport)
        except NydusError:
            image.close()
            raise
        try:
            image.mount(domain, self._fetcher, options, self._keep)
        except BaseException:
            self._forget(image)
            raise
        if domain.serves:
            image.prepare()
        with self._lock:
            self._images.append(image)
        return image

    def _domain(self, work_dir: Path, asked: Transport) -> Domain:
        """Return what serves a cache directory in the best way that works.

        Raises:
            LazyUnsupported: none of those asked for does.
            NydusError: anything else.
        """
        place = work_dir.absolute()
        ways = candidates(asked)
        with self._lock:
            for transport in ways:
                if (place, transport) in self._domains:
                    return self._domains[place, transport]
            prepare_work_dir(place)
            known = known_verdict(place)
            if known in ways:
                domain = self._open_known(place, known)
                if domain is not None:
                    return domain
            return self._open_first(place, ways)

    def _open_known(self, place: Path, transport: Transport) -> Domain | None:
        """Open what an earlier start found to work, without trying others; None if it does not."""
        try:
            domain = open_domain(transport, place, self._fetcher, self._link, proven=True)
        except NydusError as error:
            logger.info("transport %s for %s no longer works: %s", transport, place, error)
            forget_verdict(place)
            return None
        self._domains[place, transport] = domain
        logger.info("transport %s for %s, as found before", transport, place)
        return domain

    def _open_first(self, place: Path, ways: Sequence[Transport]) -> Domain:
        """Open the first way that works; raise `LazyUnsupported` with the reasons of all."""
        missing = []
        for transport in ways:
            try:
                domain = open_domain(transport, place, self._fetcher, self._link)
            except LazyUnsupported as error:
                missing.append(str(error))
                continue
            self._domains[place, transport] = domain
            logger.info("transport %s for %s: %s", transport, place, "; ".join([*missing, "works"]))
            if len(ways) > 1 or transport is Transport.FANOTIFY:
                remember_verdict(place, transport)
            return domain
        raise LazyUnsupported(
            f"lazy reading is not possible here: {'; '.join(missing)}"
            " (--transport eager fetches everything first)"
        )

    def _keep(self, image: ServedImage) -> None:
        if self._link is not None and image.is_kept:
            self._link.keep(image.key, image.record.to_dict(), [image.bootstrap_fd])

    def _forget(self, image: ServedImage) -> None:
        if self._link is not None:
            self._link.drop(image.key)

    def set_credentials(self, image: ServedImage, credentials: Credentials) -> None:
        """Use other credentials for an image from now on."""
        image.set_credentials(credentials)
        self._keep(image)

    # Take-over

    def inherit_domain(self, held: HeldDomain) -> None:
        """Take over a work directory of a killed worker, before its images."""
        domain = CacheDomain(held.work_dir, self._fetcher, self._link, held)
        self._domains[held.work_dir, Transport.FANOTIFY] = domain

    def inherit_kernel_cache(self, held: HeldRecord) -> None:
        """Take over the kernel's cache of a work directory, before its images."""
        from fscache.cachefiles.domain import CachefilesDomain

        place = Path(str(held.values.get("directory"))).parent
        domain = CachefilesDomain(place, self._fetcher, self._link, held)
        self._domains[place, Transport.CACHEFILES] = domain

    def _inherit_disks(self, place: Path) -> None:
        """Serve the block devices of a work directory: the kernel, not the holder, has them."""
        from fscache.nbd.domain import NbdDomain

        if (place, Transport.NBD) not in self._domains:
            self._domains[place, Transport.NBD] = NbdDomain(place, self._fetcher, held=True)

    def adopt(self, image: ServedImage, record: ImageRecord, key: str) -> None:
        """Take over an image of a killed worker; raise `NydusError`, then its reads fail."""
        place = Path(record.work_dir)
        if record.transport == Transport.NBD:
            self._inherit_disks(place)
        ways = {str(way): way for way in Transport}
        domain = self._domains.get((place, ways.get(record.transport, Transport.AUTO)))
        if domain is None:
            raise HolderError("the holder does not have this cache directory", path=place)
        image.adopt(domain, record, key)
        self._keep(image)
        with self._lock:
            (self._leaving if record.leaving else self._images).append(image)

    def start_inherited(self) -> None:
        """Begin to answer, when all images are adopted."""
        for domain in self._domains.values():
            domain.start()
        with self._lock:
            images = list(self._images)
        for image in images:
            image.begin_prefetch(self._fetcher)

    def leave(self, seconds: float) -> None:
        """Stop to take events and answer those that were taken; mounts stay, for a successor.

        Those that nobody could go on with are unmounted.
        """
        with self._lock:
            lost = [image for image in self._images if not image.is_kept]
        for image in lost:
            try:
                self.unmount(image)
            except NydusError as error:
                logger.error("%s", error)
        domains = list(self._domains.values())
        for domain in domains:
            domain.pause()
        end = time.monotonic() + seconds
        while any(domain.waiting for domain in domains) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        self._fetcher.close(CLOSE_SECONDS)

    @property
    def trouble(self) -> str:
        """What no longer works, for a watchdog; empty when reads are answered."""
        troubles = [self._fetcher.trouble]
        troubles += [domain.trouble for domain in list(self._domains.values())]
        return next(filter(None, troubles), "")

    @property
    def waiting(self) -> int:
        """How many reads of the kernel wait for their answers."""
        return sum(domain.waiting for domain in list(self._domains.values()))

    def unmount(self, image: ServedImage) -> None:
        """Take an image out of the tree and let go of it when its last user is gone.

        Raises `MountError`; the image is served on all the same until it is gone.
        """
        try:
            image.unmount()
        except NydusError as error:
            # Told now: whoever closes everything goes on to wait for those who use it.
            logger.error("%s", error)
            raise
        finally:
            with self._lock:
                if image in self._images:
                    # From here on it may be closed at any time, and then cannot be noted.
                    self._keep(image)
                    self._images.remove(image)
                    self._leaving.append(image)
        self._reap()

    def _reap(self) -> bool:
        """Close the images that are gone; return whether some are still leaving."""
        with self._lock:
            gone = [image for image in self._leaving if image.is_gone]
            self._leaving = [image for image in self._leaving if image not in gone]
            left = bool(self._leaving)
        for image in gone:
            try:
                image.close()
            except NydusError as error:
                # Nobody reads from it any more, and the others have to be looked after.
                logger.error("%s is not closed properly: %s", image.mountpoint, error)
            self._forget(image)
        return left

    def _reap_loop(self) -> None:
        while not self._stop.wait(1.0):
            self._reap()

    def close(self) -> None:
        """Unmount everything and end; waits for the users of mounts, however long they take."""
        with self._lock:
            images = list(self._images)
        for image in reversed(images):
            # Waited for below like the rest: a channel that ends early gives zeros.
            with suppress(NydusError):
                self.unmount(image)
        told = time.monotonic()
        while self._reap():
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                logger.warning("%d mounts still have users, waiting", len(self._leaving))
            time.sleep(_POLL_SECONDS)
        self._stop.set()
        self._reaper.join()
        for domain in self._domains.values():
            domain.close()
        self._fetcher.close(CLOSE_SECONDS)
