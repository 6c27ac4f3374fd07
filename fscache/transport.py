"""The ways to get an image to the kernel, by the words of the command line."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path

from fscache.cachefiles.support import unsafe_kernel

__all__ = ["Transport", "candidates", "is_root", "wants_holder"]


class Transport(StrEnum):
    """What a user asks for; `AUTO` is the best one that works."""

    AUTO = "auto"
    FANOTIFY = "fanotify"
    CACHEFILES = "cachefiles"
    NBD = "nbd"
    FUSE = "fuse"
    EAGER = "eager"


_UID_MAP = Path("/proc/self/uid_map")
_ALL_USERS = ["0", "0", "4294967295"]
# Mounts that outlive a killed daemon, for a successor to go on with.
_HELD = frozenset({Transport.FANOTIFY, Transport.CACHEFILES, Transport.NBD})


def candidates(asked: Transport) -> tuple[Transport, ...]:
    """Return what is to be tried, the best first; `EAGER` only for those who ask for it.

    Whoever is not root, or only that of a user namespace, can mount FUSE alone.
    """
    if asked is not Transport.AUTO:
        return (asked,)
    if not is_root():
        return (Transport.FUSE,)
    kernel = os.uname()
    # Who asks for it gets it; nobody is led to what is known to be unsafe.
    unsafe = unsafe_kernel(kernel.release, kernel.version)
    cachefiles = () if unsafe else (Transport.CACHEFILES,)
    return (Transport.FANOTIFY, *cachefiles, Transport.NBD, Transport.FUSE)


def is_root() -> bool:
    """Return whether this process is root, and not only of a user namespace."""
    return os.geteuid() == 0 and _UID_MAP.read_text().split() == _ALL_USERS


def wants_holder(asked: Transport) -> bool:
    """Return whether somebody may have to keep mounts for a successor."""
    return not _HELD.isdisjoint(candidates(asked))
