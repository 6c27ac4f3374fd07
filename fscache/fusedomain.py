"""A cache directory that is served through FUSE. Imported when FUSE is used."""

from __future__ import annotations

import logging
from pathlib import Path

from fscache.channel.fuse import FuseMount, mount_fuse, require_fuse
from fscache.fetch.demand import Demand
from fscache.fetch.fetcher import Fetcher
from fscache.mounting import MountJob
from fscache.sharing import Domain, prepare_work_dir
from fscache.transport import Transport

__all__ = ["FuseDomain"]

logger = logging.getLogger(__name__)


class FuseDomain(Domain):
    """Answers the kernel's FUSE from the data files: needs neither EROFS nor privilege.

    Raises `LazyUnsupported` without FUSE or libfuse.
    """

    transport = Transport.FUSE

    def __init__(self, work_dir: Path, fetcher: Fetcher) -> None:
        super().__init__(work_dir, fetcher)
        require_fuse()
        prepare_work_dir(work_dir)
        self._demand = Demand(fetcher)

    def mount(self, job: MountJob) -> FuseMount:
        """Mount a file system of this process; see `Domain.mount`."""
        if job.options.directio:
            logger.warning("directio has no effect with FUSE")
        # The file that was looked at, whatever has its name meanwhile.
        bootstrap = Path(f"/proc/self/fd/{job.bootstrap_fd}")
        return mount_fuse(bootstrap, job.blobs, self._demand, job.mountpoint)
