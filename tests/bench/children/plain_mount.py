"""Mount complete files by the kernel alone, after the same imports as the daemon's.

Arguments: bootstrap, mount point, data files. The mount outlives this process, which waits to
be ended like a daemon.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import fscache.cli.nydusd  # noqa: F401 -- its time is part of the floor
from fscache.mounts.mount import mount_erofs


def main() -> None:
    bootstrap, mountpoint, *devices = map(Path, sys.argv[1:])
    mount_erofs(bootstrap, devices, mountpoint)
    signal.sigwait({signal.SIGTERM})


signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
main()
