"""The eager channel: no kernel events at all, mounts of files that are complete.

Only the mounting; the data path downloads and verifies before.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from fscache.mounts.loop import LoopDevice
from fscache.mounts.mount import ErofsMount, MountError, mount_erofs

__all__ = ["mount_complete"]

logger = logging.getLogger(__name__)


def mount_complete(
    bootstrap: Path, data_files: Sequence[Path], mountpoint: Path, *, directio: bool = False
) -> ErofsMount:
    """Mount complete files: from the files, or over loop devices where the kernel cannot.

    Loop devices go away with the mount. `directio` concerns plain files; loop devices
    read past the page cache anyway.

    Raises:
        MountError: the image cannot be mounted.
        LoopError: no loop device to be had.
    """
    try:
        return mount_erofs(bootstrap, data_files, mountpoint, directio=directio)
    except MountError as error:
        if error.errno != errno.ENOTBLK:
            raise
        logger.info("using loop devices: %s", error)
    with ExitStack() as stack:
        devices = [
            stack.enter_context(LoopDevice.attach(file)).path for file in (bootstrap, *data_files)
        ]
        return mount_erofs(devices[0], devices[1:], mountpoint)
