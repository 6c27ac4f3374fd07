"""All images of one process: what they share, and what outlives an unmount.

An unmounted image whose file system still has users stays here and is served until they
are gone; `close` waits for that, because a channel that ends turns holes into zeros.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from erofs.errors import NydusError
from fscache.config import DaemonConfig
from fscache.domain import CacheDomain
from fscache.fetcher import Fetcher
from fscache.image import ImageOptions, ServedImage

__all__ = ["Runtime"]

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
_POLL_SECONDS = 0.05
_TELL_SECONDS = 10.0


class Runtime:
    """Owner of the fetcher, of the cache domains, and of images that are mounted or leaving."""

    def __init__(self) -> None:
        self._fetcher = Fetcher()
        self._lock = threading.Lock()
        self._domains: dict[Path, CacheDomain] = {}
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
        *,
        eager: bool = False,
    ) -> ServedImage:
        """Mount an image and serve it; raise `NydusError`, then nothing of it is left."""
        image = ServedImage(config, bootstrap, mountpoint)
        if eager:
            image.mount_eagerly(self._fetcher, options)
        else:
            try:
                domain = self._domain(config.work_dir)
            except NydusError:
                image.close()
                raise
            image.mount_lazily(domain, self._fetcher, options)
        with self._lock:
            self._images.append(image)
        return image

    def _domain(self, work_dir: Path) -> CacheDomain:
        key = work_dir.absolute()
        with self._lock:
            domain = self._domains.get(key)
            if domain is None:
                domain = self._domains[key] = CacheDomain(key, self._fetcher)
            return domain

    def unmount(self, image: ServedImage) -> None:
        """Take an image out of the tree and let go of it when its last user is gone.

        Raises `MountError`; the image is served on all the same until it is gone.
        """
        with self._lock:
            if image in self._images:
                self._images.remove(image)
                self._leaving.append(image)
        image.unmount()
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
        return left

    def _reap_loop(self) -> None:
        while not self._stop.wait(1.0):
            self._reap()

    def close(self) -> None:
        """Unmount everything and end; waits for the users of mounts, however long they take."""
        with self._lock:
            images = list(self._images)
        for image in reversed(images):
            try:
                self.unmount(image)
            except NydusError as error:
                # Waited for below like the rest: a channel that ends early gives zeros.
                logger.error("%s", error)
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
