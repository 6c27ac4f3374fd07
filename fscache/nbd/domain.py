"""The NBD way: one block device of the kernel for each image, and EROFS on it.

Needs no kernel events, only the module `nbd` and EROFS of Linux 6.4, which finds the blobs
in the flat address space. Imported when NBD is used.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from fscache.fetch.demand import Demand
from fscache.fetch.fetcher import Fetcher
from fscache.mounting import Mount, MountJob
from fscache.mounts.mount import ErofsMount, mount_erofs
from fscache.nbd.device import KernelDevice, device_index, identifier_of
from fscache.nbd.disk import Disk, image_disk, read_disk_plan
from fscache.nbd.errors import DeviceError
from fscache.nbd.probing import require_nbd
from fscache.nbd.server import DiskServer
from fscache.sharing import Domain, prepare_work_dir
from fscache.transport import Transport

__all__ = ["DiskMount", "NbdDomain"]

logger = logging.getLogger(__name__)

# As many as the real daemon's default; each has a queue of the kernel, and a thread.
CONNECTIONS = 4
_EROFS = Path("/sys/fs/erofs")
_DETACH_SECONDS = 5.0


class DiskMount(ErofsMount):
    """An EROFS mount of a block device that is served here; see `Mount`.

    The kernel detaches the device when the file system has ended.
    """

    def __init__(self, mount: ErofsMount, device: KernelDevice, server: DiskServer) -> None:
        name = device.path.name
        # Before Linux 6.9 the kernel does not tell; of a block device it is the name.
        known = mount.name or (name if (_EROFS / name).is_dir() else None)
        super().__init__(mount.mountpoint, mount.device, known)
        self.nbd = device
        self.server = server

    def is_gone(self) -> bool:
        """Return whether the file system has ended, not only its place in the tree."""
        # Another image may have got the number of the device since.
        return self.nbd.has_ended or super().is_gone()

    def close(self) -> None:
        """Stop to serve, when it is gone."""
        try:
            # It goes with its file system, a moment later.
            if not self.nbd.wait(_DETACH_SECONDS):
                self.nbd.detach()
        except DeviceError as error:
            logger.warning("%s: %s", self.nbd.path, error)
        self.server.close()


class NbdDomain(Domain):
    """Serves images as block devices.

    Args:
        work_dir, fetcher: see `Domain`.
        held: it is known that this machine can, since there are mounts to go on with.

    Raises:
        LazyUnsupported: this kernel lacks NBD, or mounts no flat images.
    """

    transport = Transport.NBD

    def __init__(self, work_dir: Path, fetcher: Fetcher, *, held: bool = False) -> None:
        super().__init__(work_dir, fetcher)
        if not held:
            require_nbd()
        prepare_work_dir(work_dir)
        self._demand = Demand(fetcher)
        self._stop = threading.Event()
        self._mounts: list[DiskMount] = []

    def _disk(self, job: MountJob) -> Disk:
        # The file that was looked at, whatever has its name meanwhile.
        plan = read_disk_plan(Path(f"/proc/self/fd/{job.bootstrap_fd}"))
        return image_disk(plan, job.bootstrap_fd, job.blobs, self._demand, self._stop)

    def _served(
        self, job: MountJob, begin: Callable[[DiskServer, str], KernelDevice], stack: ExitStack
    ) -> tuple[DiskServer, KernelDevice]:
        server = DiskServer(self._disk(job), CONNECTIONS)
        stack.callback(server.close)
        return server, begin(server, identifier_of(job.bootstrap_fd))

    def mount(self, job: MountJob) -> Mount:
        """Mount a device; see `Domain.mount`."""
        if job.options.directio:
            logger.warning("directio has no effect with NBD")
        mounts: list[DiskMount] = []
        with ExitStack() as stack:
            server, device = self._served(
                job,
                lambda server, identifier: KernelDevice.attach(
                    server, None, identifier, CONNECTIONS
                ),
                stack,
            )
            stack.callback(device.detach)

            def before_attach(mount: ErofsMount) -> None:
                # From here on it goes with its file system, whoever is left to see to it.
                device.detach_on_close()
                mounts.append(DiskMount(mount, device, server))
                job.attaching(mounts[0])

            mount_erofs(device.path, [], job.mountpoint, before_attach=before_attach)
            stack.pop_all()
        return self._added(mounts[0])

    def adopt(self, job: MountJob, device: int, name: str) -> Mount:
        """Go on with a device that a killed worker has attached; see `Domain.adopt`."""
        index = device_index(Path("/dev") / name)
        with ExitStack() as stack:
            server, nbd = self._served(
                job,
                lambda server, identifier: KernelDevice.take_over(
                    server, index, identifier, CONNECTIONS
                ),
                stack,
            )
            stack.pop_all()
        return self._added(DiskMount(ErofsMount(job.mountpoint, device, name), nbd, server))

    def _added(self, mount: DiskMount) -> DiskMount:
        with self._lock:
            self._mounts = [known for known in self._mounts if not known.nbd.has_ended]
            self._mounts.append(mount)
        return mount

    def pause(self) -> None:
        """Take no further reads: a successor will; raises nothing."""
        for mount in self._mounts:
            mount.nbd.leave()
            mount.server.pause()

    @property
    def waiting(self) -> int:
        """How many reads were taken and wait for answers."""
        return sum(mount.server.waiting for mount in self._mounts)

    def close(self) -> None:
        """Let go of everything; only after all mounts are gone."""
        self._stop.set()
