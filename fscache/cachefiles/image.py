"""One registered image: its bootstrap and blobs as files of the kernel's cache.

Clients mount it themselves (`mount -t erofs none M -o fsid=ID[,domain_id=DOMAIN]`), so whether it
is mounted is asked of the kernel.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from erofs.layout import BLOCK_SIZE
from fscache.blobentry import BlobEntry
from fscache.cachefiles.cache import KernelCache
from fscache.cachefiles.errors import CachefilesError
from fscache.cachefiles.names import check_name
from fscache.cachefiles.sources import BlobSource, BootstrapSource, Source
from fscache.environment import with_environment
from fscache.fetch.demand import Demand
from fscache.fetch.fetcher import Fetcher
from fscache.image import ServedImage
from fscache.sharing import Domain

__all__ = ["KernelImage", "Services"]

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
        path = entry.metadata_path
        if path is None:
            raise CachefilesError("metadata_path is missing", errno.EINVAL)
        self.is_leaving = False
        # Of a killed daemon, until a client registers it again.
        self.is_adopted = kept is not None
        self._services = services
        self._lock = threading.Lock()
        self._prefetching = False
        backend = with_environment(entry.config.backend, services.environment)
        config = entry.config._replace(backend=backend)
        # Where it is mounted is nobody's business here.
        self._image = ServedImage(config, path, Path("/"), kept)
        with ExitStack() as stack:
            stack.callback(self._image.close)
            self._names = self._open(domain, path)
            stack.pop_all()

    def _open(self, domain: Domain, path: Path) -> list[_Name]:
        plan = self._image.plan
        if plan.block_size != BLOCK_SIZE:
            raise CachefilesError(
                "images of other block sizes cannot be mounted through cachefiles",
                errno.EINVAL, path=path, expected=BLOCK_SIZE, got=plan.block_size,
            )  # fmt: skip
        bootstrap = BootstrapSource(self.fd, self._begin_prefetch)
        names = [_Name(self.entry.id, bootstrap, bootstrap.digest())]
        blobs = self._image.open_blobs(domain, self._services.fetcher, prefetch=False)
        for item, blob in zip(plan.blobs, blobs, strict=True):
            source = BlobSource(blob, self._services.demand, eager=self._image.wants_prefetch)
            names.append(_Name(check_name("blob id", item.entry.id), source, b""))
        return names

    @property
    def fd(self) -> int:
        """The open bootstrap."""
        return self._image.bootstrap_fd

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
        with self._lock:
            if self._prefetching:
                return
            self._prefetching = True
        self._image.begin_prefetch(self._services.fetcher)

    def close(self) -> None:
        """Let go of files and blobs, after `serve` only when `is_unused`."""
        self._image.close()

    def withdraw(self) -> None:
        """Let the kernel ask for it no longer."""
        self._served.close()
