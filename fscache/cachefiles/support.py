"""What the running kernel has of cachefiles beside the device (spec ondemand 0, 2.9, 6.2)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from fscache import kernel
from fscache.cachefiles.errors import CachefilesMissing
from fscache.mounts.mountinfo import MountLine

__all__ = ["dead_mounts", "require_fscache_mounts", "takes_fsid", "unsafe_kernel"]

_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")
# From the stable releases of autumn 2024 on all that is listed in spec 6.2 is mended.
_SAFE = ((6, 6, 51), (6, 11, 0))


def takes_fsid() -> bool:
    """Return whether EROFS mounts over fscache: where compiled out, it only says so.

    Raises `OSError` without EROFS.
    """
    context = kernel.fsopen("erofs")
    try:
        kernel.fsconfig_string(context, "fsid", "nydusd-probe")
        return not kernel.read_log(context)
    except OSError:
        # Removed: the option is unknown.
        return False
    finally:
        os.close(context)


def require_fscache_mounts() -> None:
    """Raise `CachefilesMissing` where nobody could mount over the cache."""
    try:
        if takes_fsid():
            return
        reason = "CONFIG_EROFS_FS_ONDEMAND is not set, or Linux 7.1.8 or later has removed it"
    except OSError as error:
        reason = f"{error.strerror}: CONFIG_EROFS_FS"
    raise CachefilesMissing(f"this kernel's EROFS cannot be mounted over fscache ({reason})")


def unsafe_kernel(release: str, version: str) -> str:
    """Return a warning about a kernel whose cachefiles has known holes, else nothing.

    Args:
        release: `uname -r`.
        version: `uname -v`, where Debian tells the stable release.
    """
    found = [
        (int(match[1]), int(match[2]), int(match[3] or 0))
        for match in _RELEASE.finditer(f"{release} {version.rpartition('Debian')[2]}")
    ]
    if not found:
        return ""
    # Debian's `uname -r` has 0 for the last number.
    first = found[0]
    number = max([item for item in found if item[:2] == first[:2]])
    long_term, newer = _SAFE
    if number >= newer or (number[:2] == long_term[:2] and number >= long_term):
        return ""
    return (
        f"Linux {'.'.join(map(str, number))}: cachefiles on demand had use-after-free defects that"
        " were mended in 2024 (CVE-2024-40899, 39510, 40900, 40913, 41050, 41051, 41057, 41058,"
        " 41074, 41075, 45000); use 6.6.51 or a later 6.6, or 6.11 and later, unless your kernel"
        " has these fixes"
    )


def dead_mounts(mounts: Iterable[MountLine]) -> list[str]:
    """Return where file systems over fscache are mounted.

    When a cache is bound anew, these were another one's, and dead: no cache comes to life again
    (spec 2.8).
    """
    return [
        os.fsdecode(line.mountpoint)
        for line in mounts
        if line.kind == "erofs"
        and any(word.startswith(b"fsid=") for word in line.options.split(b","))
    ]
