"""One served image: its backend, its blobs, its mount; opened whole or not at all."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fscache.backend import Backend, BlobReader, open_backend
from fscache.backend.base import TakesCredentials
from fscache.backend.retry import retry_policy
from fscache.backend.settings import Credentials
from fscache.cachedblob import CachedBlob
from fscache.channel.eager import mount_complete
from fscache.config import DaemonConfig
from fscache.domain import CacheDomain, LazyUnsupported, prepare_work_dir
from fscache.fetcher import Fetcher
from fscache.metrics import CacheMetrics
from fscache.mount import ErofsMount, MountBusy, MountError, mount_erofs
from fscache.plan import BlobPlan, read_plan
from fscache.prefetch import Prefetch

__all__ = ["ImageOptions", "Progress", "ServedImage"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How an image is mounted.

    Args:
        directio: read data files past the page cache.
        progress: called with (bytes done, all bytes) while an eager start fetches.
        before_mount: called when the fetching is over and the mount begins.
    """

    directio: bool = False
    progress: Progress | None = None
    before_mount: Callable[[], None] | None = None


class ServedImage:
    """A mounted image and what it holds open; call `mount_lazily` or `mount_eagerly`.

    Args:
        config: backend and cache directory.
        bootstrap: on a file system that EROFS can be mounted from (ext4, xfs, btrfs).
        mountpoint: an existing directory.
    """

    def __init__(self, config: DaemonConfig, bootstrap: Path, mountpoint: Path) -> None:
        # Looked at first: nobody wants to fetch an image and then hear of a wrong path.
        if not mountpoint.is_dir():
            raise MountError("mount point is not a directory", errno.ENOTDIR, path=mountpoint)
        self.config = config
        self.bootstrap = bootstrap
        self.mountpoint = mountpoint
        prefetch = config.rafs.prefetch if config.rafs.prefetch.enable else config.cache.prefetch
        self._prefetch_config = prefetch
        self.cache_metrics = CacheMetrics(
            config.work_dir, prefetch.threads if prefetch.enable else 0
        )
        self._plan = read_plan(bootstrap)
        self._stack = ExitStack()
        self.backend: Backend = open_backend(config.backend)
        self._stack.callback(self.backend.close)
        self._retry = retry_policy(config.backend)
        self._mount: ErofsMount | None = None
        self._needs_daemon = True

    def mount_lazily(self, domain: CacheDomain, fetcher: Fetcher, options: ImageOptions) -> None:
        """Mount it and fetch what is read; raise `NydusError`, then nothing is left open."""
        with ExitStack() as stack:
            stack.callback(self._stack.close)
            devices, readers = [], []
            for plan in self._plan.blobs:
                reader = self.backend.open(plan.entry.id)
                devices.append(domain.acquire(plan, reader, self.cache_metrics, self._retry))
                self._stack.callback(domain.release, reader)
                readers.append(reader)
            mount = mount_erofs(self.bootstrap, devices, self.mountpoint, directio=options.directio)
            self._mount = mount
            stack.pop_all()
        if mount.name is None:
            # After a lazy unmount nobody could tell when the last user is gone.
            self.unmount()
            self.close()
            raise LazyUnsupported("lazy reading needs /sys/fs/erofs: is sysfs mounted at /sys?")
        self._prefetch(fetcher, [domain.blob(reader) for reader in readers])

    def _prefetch(self, fetcher: Fetcher, blobs: list[CachedBlob]) -> None:
        if self._prefetch_config.enable:
            run = Prefetch(fetcher, blobs, self._plan.listed, self._prefetch_config)
            self._stack.callback(run.stop)

    def mount_eagerly(self, fetcher: Fetcher, options: ImageOptions) -> None:
        """Fetch and verify everything, then mount; raise `NydusError`, nothing is left open."""
        with ExitStack() as stack:
            stack.callback(self._stack.close)
            prepare_work_dir(self.config.work_dir)
            blobs = [self._open_blob(plan, fetcher) for plan in self._plan.blobs]
            total = sum(sum(blob.map.uncompressed_sizes) for blob in blobs)
            before = 0
            for blob in blobs:
                fetcher.fetch_all(blob, _progress(options.progress, before, total))
                before += sum(blob.map.uncompressed_sizes)
            if options.before_mount is not None:
                options.before_mount()
            paths = [blob.path for blob in blobs]
            mount = mount_complete(
                self.bootstrap, paths, self.mountpoint, directio=options.directio
            )
            # Complete files need nobody from here on.
            self._needs_daemon = False
            self._mount = mount
            stack.pop_all()

    def _open_blob(self, plan: BlobPlan, fetcher: Fetcher) -> CachedBlob:
        reader: BlobReader = self.backend.open(plan.entry.id)
        blob = CachedBlob.open(
            self.config.work_dir, plan.entry, plan.chunks, reader, self.cache_metrics
        )
        blob.retry = self._retry
        fetcher.attach(blob)
        self._stack.callback(fetcher.detach, blob)
        return blob

    def set_credentials(self, credentials: Credentials) -> None:
        """Use other credentials from now on, where the backend has any."""
        if isinstance(self.backend, TakesCredentials):
            self.backend.set_credentials(credentials)

    def unmount(self) -> None:
        """Take the mount out of the tree; its users, if there are any, go on (see `is_gone`)."""
        if self._mount is None:
            return
        try:
            self._mount.unmount()
        except MountBusy:
            self._mount.detach()
            if self._needs_daemon:
                logger.warning(
                    "%s is in use: unmounted lazily, served on until its last user ends",
                    self.mountpoint,
                )

    @property
    def is_gone(self) -> bool:
        """Whether nobody can read from the image any more, so that `close` is safe."""
        return self._mount is None or not self._needs_daemon or self._mount.is_gone()

    def close(self) -> None:
        """Let go of blobs and backend; only when `is_gone`."""
        self._stack.close()


def _progress(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)
