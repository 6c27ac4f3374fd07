"""How each transport serves a cache directory."""

from __future__ import annotations

from pathlib import Path

from fscache.channel.eager import mount_complete
from fscache.domain import CacheDomain
from fscache.fetch.fetcher import Fetcher
from fscache.holder.link import HolderLink
from fscache.mounting import MountJob, Progress
from fscache.mounts.mount import ErofsMount
from fscache.sharing import Domain, prepare_work_dir
from fscache.transport import Transport

__all__ = ["EagerDomain", "open_domain"]


class EagerDomain(Domain):
    """Fetches and verifies everything, then mounts complete files, which need nobody any more."""

    serves = False
    transport = Transport.EAGER

    def __init__(self, work_dir: Path, fetcher: Fetcher) -> None:
        super().__init__(work_dir, fetcher)
        prepare_work_dir(work_dir)

    def mount(self, job: MountJob) -> ErofsMount:
        """Mount the data files themselves, or loop devices; see `Domain.mount`."""
        options = job.options
        sizes = [sum(blob.map.uncompressed_sizes) for blob in job.blobs]
        before = 0
        for blob, size in zip(job.blobs, sizes, strict=True):
            self._fetcher.fetch_all(blob, _progress(options.progress, before, sum(sizes)))
            before += size
        if options.before_mount is not None:
            options.before_mount()
        paths = [blob.path for blob in job.blobs]
        return mount_complete(job.bootstrap, paths, job.mountpoint, directio=options.directio)


def _progress(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


def open_domain(
    transport: Transport,
    work_dir: Path,
    fetcher: Fetcher,
    link: HolderLink | None,
    *,
    proven: bool = False,
) -> Domain:
    """Return what serves a cache directory in one way, `AUTO` excepted.

    Args:
        transport: the way.
        work_dir: the cache directory.
        fetcher: not owned.
        link: the holder, if there is one; not owned.
        proven: it has worked on this file system since the machine was started.

    Raises:
        LazyUnsupported: the machine lacks what it takes.
        NydusError: anything else.
    """
    if transport is Transport.EAGER:
        return EagerDomain(work_dir, fetcher)
    if transport is Transport.FUSE:
        # Imported here: libfuse and its binding are for those alone who use them.
        from fscache.fusedomain import FuseDomain

        return FuseDomain(work_dir, fetcher)
    if transport is Transport.CACHEFILES:
        # Imported here, as for the other ones.
        from fscache.cachefiles.domain import CachefilesDomain

        return CachefilesDomain(work_dir, fetcher, link)
    if transport is Transport.NBD:
        # Imported here: so is netlink.
        from fscache.nbd.domain import NbdDomain

        return NbdDomain(work_dir, fetcher)
    return CacheDomain(work_dir, fetcher, link, proven=proven)
