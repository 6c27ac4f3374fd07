"""The fanotify way: one marked cache directory, its channel, and EROFS mounts over its files."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path

from erofs.errors import NydusError
from fscache.cache.cachedblob import CachedBlob
from fscache.cache.cachefile import DATA_SUFFIX
from fscache.channel.fanotify import FanotifyChannel
from fscache.fetch.fetcher import Fetcher
from fscache.holder.journal import Journal
from fscache.holder.link import HeldDomain, HolderLink
from fscache.mounting import MountJob
from fscache.mounts.mount import ErofsMount, MountError, mount_erofs
from fscache.service import Service
from fscache.sharing import Domain, LazyUnsupported, Shared, prepare_work_dir
from fscache.store import Orphan, ServeDirectory, take_stale
from fscache.transport import Transport

__all__ = ["CacheDomain"]

logger = logging.getLogger(__name__)


class CacheDomain(Domain):
    """Serves the blobs below one cache directory to the kernel; close it after all mounts.

    Args:
        work_dir: the cache directory, on a file system that takes pre-content marks.
        fetcher: fetches for all domains of the process; not owned.
        link: the holder that keeps the group, if there is one; not owned.
        held: what a holder kept of a killed worker; call `start` when its images are open.

    Raises:
        LazyUnsupported: the text names what the machine lacks.
        NydusError: the channel or the directories cannot be made.
    """

    transport = Transport.FANOTIFY

    def __init__(
        self,
        work_dir: Path,
        fetcher: Fetcher,
        link: HolderLink | None = None,
        held: HeldDomain | None = None,
        *,
        proven: bool = False,
    ) -> None:
        super().__init__(work_dir, fetcher)
        self._proven = proven
        self._link = link
        self._inherited = held is not None
        self._orphans: list[Orphan] = []
        self._service = Service(fetcher)
        with ExitStack() as stack:
            if held is None:
                self._create(stack)
            else:
                self._store = ServeDirectory(held.serve, held.lock)
                stack.callback(self._store.remove)
                self._channel = FanotifyChannel(
                    held.serve,
                    self._service.handle,
                    inherited=(held.group, Journal(held.journal)),
                )
                stack.callback(self._channel.close)
            if link is not None:
                link.keep_domain(
                    work_dir,
                    self._store.directory,
                    self._channel.fileno(),
                    self._store.fd,
                    self._channel.journal.fd,
                )
            # In reverse: the group closes, then the links go.
            self._stack = stack.pop_all()
        if held is None:
            self._channel.start()

    def _create(self, stack: ExitStack) -> None:
        prepare_work_dir(self.work_dir)
        if not self._proven:
            # Imported here: most starts know.
            from fscache.probe import end_behind, lazy_supported, probe

            verdict = lazy_supported(probe(self.work_dir, end_behind))
            if not verdict.ok:
                raise LazyUnsupported(f"no pre-content events: {verdict.detail}")
        self._orphans = take_stale(self.work_dir)
        self._store = ServeDirectory.create(self.work_dir)
        stack.callback(self._store.remove)
        self._channel = FanotifyChannel(self._store.directory, self._service.handle)
        stack.callback(self._channel.close)
        for orphan in self._orphans:
            # What is not in their cache is denied or fetched from now on, no longer zeros.
            self._channel.mark_too(orphan.store.directory)
            logger.error(
                "UNSAFE: nydusd and its holder were killed under %s: programs that read there"
                " since may have got zeros and have to be restarted",
                ", ".join(orphan.mounts.values()),
            )
            if self._link is not None:
                for name in orphan.mounts:
                    self._link.keep(f"orphan:{name}", {"kind": "orphan", "erofs": name})

    def start(self) -> None:
        """Answer what a killed worker left, and begin to take events, after `held`."""
        for reply, known in self._channel.inherit():
            handle = self._service.handle if known else self._service.handle_anywhere
            try:
                handle(reply.request, reply)
            except NydusError as error:
                reply.deny(error)
        self._channel.start()

    def require_unmarked(self, bootstrap: Path) -> None:
        """Raise `MountError` for a bootstrap in the marked directory.

        From Linux 7.1 on its metadata would raise events, which nobody could answer.
        """
        if bootstrap.resolve().parent == self._store.directory.resolve():
            raise MountError("bootstrap lies in the marked directory", path=bootstrap)

    def mount(self, job: MountJob) -> ErofsMount:
        """Mount plain files in the marked directory; see `Domain.mount`."""

        def before_attach(mount: ErofsMount) -> None:
            if mount.name is None:
                # After a lazy unmount nobody could tell when the last user is gone.
                raise LazyUnsupported("lazy reading needs /sys/fs/erofs: is sysfs mounted at /sys?")
            self._store.note_mount(mount.name, mount.mountpoint)
            job.attaching(mount)

        _require_whole(job.bootstrap_fd, job.bootstrap)
        return mount_erofs(
            job.bootstrap,
            [self._store.path(blob.blob_id) for blob in job.blobs],
            job.mountpoint,
            directio=job.options.directio,
            before_attach=before_attach,
        )

    def adopt(self, job: MountJob, device: int, name: str) -> ErofsMount:
        """Serve a mount whose group was inherited; see `Domain.adopt`."""
        return ErofsMount(job.mountpoint, device, name)

    def _opening(self, blob_id: str) -> None:
        if self._inherited:
            self._store.restore(blob_id, self.work_dir / f"{blob_id}{DATA_SUFFIX}")

    def _opened(self, blob: CachedBlob) -> None:
        self._store.link(blob.blob_id, blob.path)
        if self._inherited:
            # The mark is for what the killed worker knew, which need not be all.
            self._channel.unignore(blob.cache.fileno())
        self._service.add(blob)

    def _dropped(self, blob: CachedBlob) -> None:
        self._service.remove(blob)
        self._store.unlink(blob.blob_id)

    def _listen(self, shared: Shared) -> None:
        if shared.ignored:
            self._channel.unignore(shared.blob.cache.fileno())
            shared.ignored = False

    def _completed(self, blob_id: str) -> None:
        """Stop the events of a blob whose known chunks are all there and durable."""
        with self._lock:
            shared = self._shared.get(blob_id)
            # Meanwhile an image may have told of further chunks, or the channel has ended.
            if shared is None or not shared.blob.is_complete or self._channel.fileno() < 0:
                return
            # A trace wants every read, also of what is there; `unwatch` comes here again.
            if shared.blob.traces or shared.blob.wants_sync:
                return
            self._channel.ignore(shared.blob.cache.fileno())
            shared.ignored = True

    def pause(self) -> None:
        """Take no further events: a successor will; raises nothing."""
        self._channel.pause()

    @property
    def trouble(self) -> str:
        """What is wrong with the intake of events, empty when nothing is."""
        return self._channel.trouble

    @property
    def waiting(self) -> int:
        """How many events were taken and wait for answers."""
        return self._channel.waiting

    def close(self) -> None:
        """Close the channel and remove the directory; only after all mounts are gone."""
        # With the lock, so that no blob becomes complete between a look at the channel and its use.
        with self._lock:
            self._stack.close()
            # With orphans in use the holder keeps the group, and goes on denying.
            if self._link is not None and not any(orphan.alive for orphan in self._orphans):
                self._link.drop_domain(self.work_dir)
            for orphan in self._orphans:
                os.close(orphan.store.fd)


def _require_whole(fd: int, bootstrap: Path) -> None:
    """Raise `MountError` for a file with holes: as metadata they are read as zeros."""
    size = os.fstat(fd).st_size
    hole = os.lseek(fd, 0, os.SEEK_HOLE) if size else 0
    if hole < size:
        raise MountError(
            "bootstrap has a hole; cp --sparse=never makes it whole", path=bootstrap, offset=hole
        )
