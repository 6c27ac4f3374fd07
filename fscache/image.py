"""One served image: its backend, its blobs, its mount; opened whole or not at all."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from erofs.codec import load as load_codec
from erofs.digest import function as digest_function
from erofs.errors import NydusError
from erofs.rafs import Compressor, Digester
from fscache.backend import Backend, BlobReader, open_backend
from fscache.backend.base import Prepares, TakesCredentials
from fscache.backend.retry import retry_policy
from fscache.backend.settings import Credentials
from fscache.cache.bootfile import mountable_bootstrap
from fscache.cache.cachedblob import CachedBlob
from fscache.cache.dictionary import resolve
from fscache.cache.layer import open_reader
from fscache.cache.plan import ImagePlan, read_plan
from fscache.config import DaemonConfig
from fscache.fetch.fetcher import Fetcher
from fscache.fetch.prefetch import Prefetch
from fscache.fetch.streamprefetch import StreamPrefetch
from fscache.metrics import CacheMetrics
from fscache.mounting import ROOT, ImageOptions, Mount, MountJob, Progress
from fscache.mounts.mount import MountBusy, MountError
from fscache.record import ImageRecord
from fscache.sharing import Domain
from fscache.trace import Trace, open_trace

__all__ = ["ROOT", "ImageOptions", "Keep", "Progress", "ServedImage"]

logger = logging.getLogger(__name__)

# Has a holder note an image that is about to be reachable.
Keep = Callable[["ServedImage"], None]


class ServedImage:
    """A mounted image and what it holds open; `mount` it, or `adopt` one that is mounted.

    Args:
        config: backend and cache directory.
        bootstrap: on a file system that EROFS can be mounted from (ext4, xfs, btrfs), or a blob
            that has its metadata inside.
        mountpoint: an existing directory.
        kept: another path of the bootstrap, of an image that is mounted already.
    """

    def __init__(
        self,
        config: DaemonConfig,
        bootstrap: Path,
        mountpoint: Path,
        kept: Path | None = None,
    ) -> None:
        # Looked at first: nobody wants to fetch an image and then hear of a wrong path.
        if kept is None and not mountpoint.is_dir():
            raise MountError("mount point is not a directory", errno.ENOTDIR, path=mountpoint)
        self.config = config
        self.bootstrap = bootstrap
        self.mountpoint = mountpoint
        prefetch = config.rafs.prefetch if config.rafs.prefetch.enable else config.cache.prefetch
        self._prefetch_config = prefetch
        self.cache_metrics = CacheMetrics(
            config.work_dir, prefetch.threads if prefetch.enable else 0
        )
        # Of a blob with its metadata inside the kernel mounts a file that was taken out of it.
        self._mounted_file = kept or mountable_bootstrap(bootstrap, config.work_dir)
        self._plan = read_plan(self._mounted_file, bootstrap)
        self._stack = ExitStack()
        self.backend: Backend = open_backend(config.backend)
        self._stack.callback(self.backend.close)
        try:
            self.bootstrap_fd = os.open(self._mounted_file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._stack.close()
            raise MountError(f"bootstrap cannot be opened ({error})", path=bootstrap) from error
        self._stack.callback(os.close, self.bootstrap_fd)
        self._retry = retry_policy(config.backend)
        self._domain: Domain | None = None
        self._mount: Mount | None = None
        self._readers: list[BlobReader] = []
        self._needs_daemon = True
        # Of a lazily mounted image whose reads are recorded.
        self.trace: Trace | None = None
        self._auth = ""
        self._path = ROOT
        self._mounted_at = time.time()
        self._leaving = False
        self.key = f"image:{os.urandom(8).hex()}"

    def mount(self, domain: Domain, fetcher: Fetcher, options: ImageOptions, keep: Keep) -> None:
        """Mount it in the way of a domain; raise `NydusError`, then nothing is left open.

        `keep` is called when the mount exists and nobody can reach it yet, if a successor
        could go on with it.
        """
        self._path = options.path
        self._domain = domain

        def attaching(mount: Mount) -> None:
            self._mount = mount
            keep(self)

        with ExitStack() as stack:
            stack.callback(self._stack.close)
            job = self._job(self._acquire(domain), options, attaching)
            self._mount = domain.mount(job)
            self._stack.callback(self._mount.close)
            # Complete files need nobody from here on.
            self._needs_daemon = domain.serves
            stack.pop_all()
        if domain.serves:
            self._prefetch(fetcher, domain)

    def prepare(self) -> None:
        """Have a thread load what the first read takes, now that the mount need not wait for it."""
        threading.Thread(target=self._prepare, name="prepare", daemon=True).start()

    def _prepare(self) -> None:
        """Load what the first read takes, in its order; what cannot be loaded fails that read."""
        # A number that is none is refused where the blob is opened.
        with suppress(NydusError, ValueError):
            if isinstance(self.backend, Prepares):
                self.backend.prepare()
            for plan in self._plan.blobs:
                load_codec(Compressor(plan.entry.compressor))
                digest_function(Digester(plan.entry.digester))

    def open_blobs(
        self, domain: Domain, fetcher: Fetcher, *, prefetch: bool = True
    ) -> list[CachedBlob]:
        """Open all blobs for one who serves them without a mount.

        Args:
            domain: of the cache directory.
            fetcher: behind it.
            prefetch: begin it, if the configuration says so; else `begin_prefetch` will.

        Raises `NydusError`, then nothing is left open.
        """
        self._domain = domain
        with ExitStack() as stack:
            stack.callback(self._stack.close)
            blobs = self._acquire(domain)
            stack.pop_all()
        if prefetch:
            self._prefetch(fetcher, domain)
        return blobs

    @property
    def plan(self) -> ImagePlan:
        """What its bootstrap says."""
        return self._plan

    @property
    def wants_prefetch(self) -> bool:
        """Whether the configuration says so."""
        return self._prefetch_config.enable

    def _job(
        self, blobs: list[CachedBlob], options: ImageOptions, attaching: Callable[[Mount], None]
    ) -> MountJob:
        return MountJob(
            self._mounted_file, self.bootstrap_fd, self.mountpoint, blobs, options, attaching
        )

    def adopt(self, domain: Domain, record: ImageRecord, key: str) -> None:
        """Serve an image that a killed worker has mounted; raise `NydusError`."""
        self.key = key
        self._path = record.path
        self._auth = record.auth
        self._leaving = record.leaving
        self._mounted_at = record.mounted_at
        self._domain = domain
        if record.auth:
            self.set_credentials(Credentials.from_base64(record.auth))
        with ExitStack() as stack:
            stack.callback(self._stack.close)
            options = ImageOptions(path=record.path)
            job = self._job(self._acquire(domain), options, lambda mount: None)
            self._mount = domain.adopt(job, record.device, record.erofs)
            self._stack.callback(self._mount.close)
            stack.pop_all()

    def begin_prefetch(self, fetcher: Fetcher) -> None:
        """Prefetch as the configuration says, after `adopt`."""
        if self._domain is not None:
            self._prefetch(fetcher, self._domain)

    def _acquire(self, domain: Domain) -> list[CachedBlob]:
        """Open all blobs."""
        blobs = []
        if domain.serves:
            self.trace = open_trace(self.bootstrap_file, self.config.rafs)
        for plan in self._plan.blobs:
            reader = open_reader(self.backend, plan)
            resolved = resolve(plan, self.config.work_dir, reader, self._retry)
            blob = domain.acquire(resolved, reader, self.cache_metrics, self._retry)
            blob.window.limit = max(blob.window.limit, self.config.rafs.batch_size)
            blobs.append(blob)
            self._stack.callback(domain.release, reader)
            if self.trace is not None:
                domain.watch(reader, self.trace)
                self._stack.callback(domain.unwatch, reader, self.trace)
            self._readers.append(reader)
        return blobs

    @property
    def is_kept(self) -> bool:
        """Whether a successor could go on with the mount."""
        return self._needs_daemon and self._mount is not None and self._mount.name is not None

    @property
    def record(self) -> ImageRecord:
        """What a successor needs to go on with this image, once it is mounted."""
        if self._domain is None or self._mount is None or self._mount.name is None:
            raise MountError("image is not mounted", path=self.mountpoint)
        return ImageRecord(
            path=self._path,
            mountpoint=str(self._mount.mountpoint),
            bootstrap=str(self.bootstrap.absolute()),
            work_dir=str(self.config.work_dir.absolute()),
            config=self.config.text,
            prefetch_files="\0".join(map(os.fsdecode, self.config.prefetch_files or ())),
            auth=self._auth,
            erofs=self._mount.name,
            device=self._mount.device,
            mounted_at=self._mounted_at,
            leaving=self._leaving,
            transport=self._domain.transport,
        )

    def is_of(self, bootstrap: Path) -> bool:
        """Whether the image was mounted from this file."""
        return os.path.realpath(self.bootstrap) == os.path.realpath(bootstrap)

    @property
    def is_attached(self) -> bool:
        """Whether the image is on top at its mount point."""
        return self._mount is not None and self._mount.is_attached()

    @property
    def bootstrap_file(self) -> Path:
        """The bootstrap, whatever has its name meanwhile."""
        return Path(f"/proc/self/fd/{self.bootstrap_fd}")

    def _prefetch(self, fetcher: Fetcher, domain: Domain) -> None:
        config, files = self._prefetch_config, self.config.prefetch_files
        if files is not None and not (config.enable and not config.stream_prefetch):
            logger.warning("the list of files to prefetch is not used: no prefetch of files is on")
        if not config.enable:
            return
        blobs = [domain.blob(reader) for reader in self._readers]
        run: Prefetch | StreamPrefetch
        if config.stream_prefetch:
            run = StreamPrefetch(fetcher, list(zip(blobs, self._readers, strict=True)), config)
        else:
            run = Prefetch(fetcher, self.bootstrap_file, blobs, files, config)
        self._stack.callback(run.stop)

    def set_credentials(self, credentials: Credentials) -> None:
        """Use other credentials from now on, where the backend has any."""
        if isinstance(self.backend, TakesCredentials):
            self.backend.set_credentials(credentials)
            self._auth = credentials.basic.removeprefix("Basic ")

    def unmount(self) -> None:
        """Take the mount out of the tree; its users, if there are any, go on (see `is_gone`)."""
        self._leaving = True
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
