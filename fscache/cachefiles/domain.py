"""A cache directory whose images this process mounts over fscache: `--transport cachefiles`.

The kernel's cache lies in `<work dir>/cachefiles`, since there is one for each opening of the
device, and the device has one opener. Imported when this way is used.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from fscache import kernel
from fscache.cachefiles.cache import KernelCache
from fscache.cachefiles.device import Device
from fscache.cachefiles.errors import CachefilesError
from fscache.cachefiles.sources import BlobSource, BootstrapSource, Source
from fscache.cachefiles.support import require_fscache_mounts
from fscache.fetch.demand import Demand
from fscache.fetch.fetcher import Fetcher
from fscache.holder.link import HeldRecord, HolderLink
from fscache.mounting import Mount, MountJob
from fscache.mounts.mount import ErofsMount, MountError, attach_mount
from fscache.record import KERNEL_CACHE
from fscache.sharing import Domain, LazyUnsupported, prepare_work_dir
from fscache.transport import Transport

__all__ = ["CachefilesDomain", "keep_device"]

logger = logging.getLogger(__name__)

_SCOPE = "nydusd"
_THREADS = 4
_CLOSE_SECONDS = 10.0
_EROFS = Path("/sys/fs/erofs")


def keep_device(link: HolderLink, directory: Path, device: Device) -> None:
    """Have a holder keep the device, until no worker comes in time."""
    values: dict[str, object] = {
        "kind": KERNEL_CACHE, "directory": os.fsdecode(directory), "orphaned": "close",
    }  # fmt: skip
    link.keep(f"{KERNEL_CACHE}:{directory}", values, [device.fileno()])


class CachefilesMount(ErofsMount):
    """An EROFS mount over files of the kernel's cache; see `Mount`."""

    def __init__(self, mount: ErofsMount, let_go: Callable[[], None], *, held: bool) -> None:
        # Without a way to go on, a successor must not try.
        super().__init__(mount.mountpoint, mount.device, mount.name if held else None)
        self._entry = _EROFS / (mount.name or "")
        self._let_go = let_go

    def is_gone(self) -> bool:
        """Return whether the file system has ended, not only its place in the tree."""
        return not self._entry.exists()

    def close(self) -> None:
        """Let the kernel ask for its files no longer, when it is gone."""
        self._let_go()


class CachefilesDomain(Domain):
    """Serves images over the kernel's cachefiles.

    Args:
        work_dir, fetcher: see `Domain`.
        link: the holder that keeps the device, if there is one; not owned.
        held: what it kept of a killed worker; call `start` when its images are open.

    Raises:
        LazyUnsupported: this kernel has no cachefiles on demand, or somebody has them.
    """

    transport = Transport.CACHEFILES

    def __init__(
        self,
        work_dir: Path,
        fetcher: Fetcher,
        link: HolderLink | None = None,
        held: HeldRecord | None = None,
    ) -> None:
        super().__init__(work_dir, fetcher)
        self._link = link
        self._demand = Demand(fetcher)
        directory = work_dir / "cachefiles"
        device = Device(held.descriptors.pop()) if held is not None else _bound(directory)
        try:
            # Nothing is taken from the device yet, so this harms nobody.
            self._held = device.restore() and link is not None
        except BaseException:
            device.close()
            raise
        self._cache = KernelCache(device, directory, _THREADS)
        if link is not None and self._held:
            keep_device(link, directory, device)
        if held is None:
            self.start()

    def start(self) -> None:
        """Begin to answer the kernel, after `held`."""
        self._cache.start()

    # Mounts

    def mount(self, job: MountJob) -> Mount:
        """Mount over fscache; see `Domain.mount`."""
        if job.options.directio:
            logger.warning("directio has no effect with cachefiles")
        boot = BootstrapSource(job.bootstrap_fd)
        digest = boot.digest()
        fsid = _free_name(digest)
        mounts: list[CachefilesMount] = []
        with ExitStack() as stack:
            let_go = self._serve(job, fsid, boot, digest)
            stack.callback(let_go)

            def before_attach(mount: ErofsMount) -> None:
                mounts.append(CachefilesMount(mount, let_go, held=self._held))
                job.attaching(mounts[0])

            descriptor = _create_mount(fsid, [blob.blob_id for blob in job.blobs], job.bootstrap)
            # Nothing tells which window is this one's, and a chunk is copied as a whole anyway.
            attach_mount(
                descriptor, job.mountpoint, name=f"{_SCOPE},{fsid}", read_ahead_kb=None,
                before_attach=before_attach,
            )  # fmt: skip
            stack.pop_all()
        return mounts[0]

    def adopt(self, job: MountJob, device: int, name: str) -> Mount:
        """Go on with files that the kernel has open; see `Domain.adopt`."""
        boot = BootstrapSource(job.bootstrap_fd)
        let_go = self._serve(job, name.rpartition(",")[2], boot, boot.digest())
        return CachefilesMount(ErofsMount(job.mountpoint, device, name), let_go, held=self._held)

    def _serve(
        self, job: MountJob, fsid: str, boot: BootstrapSource, digest: bytes
    ) -> Callable[[], None]:
        """Make the files of an image known; return what undoes it."""
        names: list[tuple[str, Source, bytes]] = [(fsid, boot, digest)]
        names += [
            (blob.blob_id, BlobSource(blob, self._demand, eager=False), b"") for blob in job.blobs
        ]
        with ExitStack() as stack:
            for name, source, content in names:
                self._cache.add(_SCOPE, name, source, content)
                stack.callback(self._cache.remove, _SCOPE, name, source)
            return stack.pop_all().close

    # Life

    def pause(self) -> None:
        """Answer what was taken, and leave everything to a successor, which then may begin."""
        self._cache.close(_CLOSE_SECONDS, leave=True)

    @property
    def trouble(self) -> str:
        """What is wrong with the channel, empty when nothing is."""
        return self._cache.trouble

    @property
    def waiting(self) -> int:
        """How many reads were taken and wait for answers."""
        return self._cache.waiting

    def close(self) -> None:
        """Let go of the device; only after all mounts are gone."""
        self._cache.close(_CLOSE_SECONDS)
        if self._link is not None and self._held:
            self._link.drop(f"{KERNEL_CACHE}:{self._cache.directory}")


def _bound(directory: Path) -> Device:
    """Return the device, bound to a directory; raise `LazyUnsupported` where it cannot be."""
    prepare_work_dir(directory)
    try:
        require_fscache_mounts()
        device = Device.open()
        try:
            device.bind(directory.absolute(), None)
        except BaseException:
            device.close()
            raise
    except CachefilesError as error:
        raise LazyUnsupported(f"no cachefiles on demand: {error}") from error
    return device


def _free_name(digest: bytes) -> str:
    """Return a name that no mount has, the same for the same bootstrap as far as possible."""
    number = 0
    while (_EROFS / f"{_SCOPE},{digest.hex()}-{number}").exists():
        number += 1
    return f"{digest.hex()}-{number}"


def _create_mount(fsid: str, blob_ids: Sequence[str], bootstrap: Path) -> int:
    """Create a mount that is attached nowhere; its descriptor is the caller's.

    Raises `MountError`.
    """
    try:
        context = kernel.fsopen("erofs")
        try:
            kernel.fsconfig_flag(context, "ro")
            kernel.fsconfig_string(context, "fsid", fsid)
            kernel.fsconfig_string(context, "domain_id", _SCOPE)
            for blob_id in blob_ids:
                kernel.fsconfig_string(context, "device", blob_id)
            kernel.fsconfig_create(context)
            return kernel.fsmount(context, kernel.MOUNT_ATTR_RDONLY)
        finally:
            os.close(context)
    except OSError as error:
        raise MountError(
            f"cannot mount over fscache: {error.filename}: {error.strerror}",
            error.errno or errno.EIO, path=bootstrap,
        ) from error  # fmt: skip
