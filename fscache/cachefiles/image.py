"""One registered image: its bootstrap and blobs as files of the kernel's cache.

Clients mount it themselves (`mount -t erofs none M -o fsid=ID[,domain_id=DOMAIN]`), so whether it
is mounted is asked of the kernel.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from erofs.layout import BLOCK_SIZE
from fscache.backend import BlobReader, open_backend
from fscache.backend.retry import retry_policy
from fscache.blobentry import BlobEntry
from fscache.bootfile import mountable_bootstrap
from fscache.cachedblob import CachedBlob
from fscache.cachefiles.cache import KernelCache
from fscache.cachefiles.errors import CachefilesError
from fscache.cachefiles.names import check_name
from fscache.cachefiles.sources import BlobSource, BootstrapSource, Source
from fscache.demand import Demand
from fscache.dictionary import resolve
from fscache.environment import with_environment
from fscache.fetcher import Fetcher
from fscache.layer import open_reader
from fscache.metrics import CacheMetrics
from fscache.plan import ImagePlan, read_plan
from fscache.prefetch import Prefetch
from fscache.sharing import Domain
from fscache.streamprefetch import StreamPrefetch

__all__ = ["KernelImage", "Services"]

logger = logging.getLogger(__name__)

_SYSFS = Path("/sys/fs/erofs")


class Services(NamedTuple):
    """What all images of a process share; none of it is an image's own."""

    cache: KernelCache
    fetcher: Fetcher
    demand: Demand
    environment: Mapping[str, str]


class _Name(NamedTuple):
    """A source under its name in the kernel's cache."""

    name: str
    source: Source
    digest: bytes


class KernelImage:
    """An entry whose files are open; `serve` makes them known to the kernel.

    Args:
        entry: as a client gave it.
        services: see the class.
        domain: the entry's work directory.
        kept: another path of the bootstrap, of an image that is served already.

    Raises:
        CachefilesError: the kernel cannot mount such an image, or its names are none.
        NydusError: bootstrap, backend or work directory cannot be used; nothing is left open.
    """

    def __init__(
        self, entry: BlobEntry, services: Services, domain: Domain, kept: Path | None = None
    ) -> None:
        self.entry = entry
        # The kernel's name for where blobs are shared; without a domain it is the fsid.
        self.scope = check_name("domain_id", entry.domain_id or entry.id)
        check_name("id", entry.id)
        self.is_leaving = False
        # Of a killed daemon, until a client registers it again.
        self.is_adopted = kept is not None
        self._services = services
        self._domain = domain
        self._names: list[_Name] = []
        self._blobs: list[tuple[CachedBlob, BlobReader]] = []
        self._prefetching = False
        self._lock = threading.Lock()
        config = entry.config
        config = replace(config, backend=with_environment(config.backend, services.environment))
        self._config = config
        prefetch = config.rafs.prefetch if config.rafs.prefetch.enable else config.cache.prefetch
        self._prefetch_config = prefetch
        self.metrics = CacheMetrics(config.work_dir, prefetch.threads if prefetch.enable else 0)
        with ExitStack() as stack:
            self._open(stack, kept)
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack, kept: Path | None) -> None:
        path = kept or self._bootstrap_path()
        plan = read_plan(path, self.entry.metadata_path)
        if plan.block_size != BLOCK_SIZE:
            raise CachefilesError(
                "images of other block sizes cannot be mounted through cachefiles",
                errno.EINVAL, path=path, expected=BLOCK_SIZE, got=plan.block_size,
            )  # fmt: skip
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self.fd)
            bootstrap = BootstrapSource(self.fd, self._begin_prefetch)
            self._names.append(_Name(self.entry.id, bootstrap, bootstrap.digest()))
        except OSError as error:
            raise CachefilesError(
                f"bootstrap cannot be read ({error.strerror})", error.errno or errno.EIO, path=path
            ) from error
        self._open_blobs(stack, plan)

    def _bootstrap_path(self) -> Path:
        path = self.entry.metadata_path
        if path is None:
            raise CachefilesError("metadata_path is missing", errno.EINVAL)
        return mountable_bootstrap(path, self._config.work_dir)

    def _open_blobs(self, stack: ExitStack, plan: ImagePlan) -> None:
        self.backend = open_backend(self._config.backend)
        stack.callback(self.backend.close)
        retry = retry_policy(self._config.backend)
        eager = self._prefetch_config.enable
        for item in plan.blobs:
            check_name("blob id", item.entry.id)
            reader = open_reader(self.backend, item)
            resolved = resolve(item, self._config.work_dir, reader, retry)
            blob = self._domain.acquire(resolved, reader, self.metrics, retry)
            stack.callback(self._domain.release, reader)
            self._blobs.append((blob, reader))
            source = BlobSource(blob, self._services.demand, eager=eager)
            self._names.append(_Name(item.entry.id, source, b""))

    @property
    def blob_ids(self) -> list[str]:
        """The ids of its blobs, in device order."""
        return [item.name for item in self._names[1:]]

    @property
    def digest(self) -> bytes:
        """The sha256 of its bootstrap."""
        return self._names[0].digest

    # In the kernel's cache

    def serve(self) -> None:
        """Let the kernel ask for it; raise `CachefilesError`, then it cannot."""
        cache = self._services.cache
        with ExitStack() as stack:
            for item in self._names:
                cache.add(self.scope, item.name, item.source, item.digest)
                stack.callback(cache.remove, self.scope, item.name, item.source)
            self._served = stack.pop_all()

    def leave(self) -> None:
        """Serve it for its users only: its files may go away soon."""
        self.is_leaving = True
        for item in self._names:
            self._services.cache.put_last(self.scope, item.name, item.source)

    @property
    def is_mounted(self) -> bool:
        """Whether a file system of its name exists, attached or not."""
        names = (self.entry.id, f"{self.scope},{self.entry.id}")
        return any((_SYSFS / name).exists() for name in names)

    @property
    def is_unused(self) -> bool:
        """Whether the kernel can do without it, perhaps because others give the same."""
        cache = self._services.cache
        alone = cache.is_alone(self.scope, self.entry.id)
        return not (alone and self.is_mounted) and not any(
            cache.is_alone(self.scope, item.name) and cache.is_open(self.scope, item.name)
            for item in self._names
        )

    def _begin_prefetch(self) -> None:
        """Prefetch as the configuration says, once, when it is mounted."""
        config = self._prefetch_config
        with self._lock:
            if not config.enable or self._prefetching:
                return
            self._prefetching = True
        fetcher = self._services.fetcher
        run: Prefetch | StreamPrefetch
        if config.stream_prefetch:
            run = StreamPrefetch(fetcher, self._blobs, config)
        else:
            blobs = [blob for blob, _ in self._blobs]
            bootstrap = Path(f"/proc/self/fd/{self.fd}")
            run = Prefetch(fetcher, bootstrap, blobs, self._config.prefetch_files, config)
        self._stack.callback(run.stop)

    def close(self) -> None:
        """Let go of files and blobs, after `serve` only when `is_unused`."""
        self._stack.close()

    def withdraw(self) -> None:
        """Let the kernel ask for it no longer."""
        self._served.close()
