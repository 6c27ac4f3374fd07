"""What `nydusd doctor` looks at: facts of this machine, read or tried, without a verdict.

Nothing is changed: what is tried is undone at once, and lies in a temporary directory below
the work directory. Source: spec ondemand 0 (detection), 5.3 and 6.1.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import re
import resource
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fscache import kernel
from fscache.cachefiles.support import takes_fsid
from fscache.channel.fuse import require_fuse
from fscache.mounts.loop import LoopDevice, LoopError
from fscache.probe import Finding, filesystem_type, probe
from fscache.sharing import LazyUnsupported

__all__ = ["CAP_SYS_ADMIN", "CAP_SYS_RESOURCE", "Facts", "gather"]

CAP_SYS_ADMIN = 1 << 21
CAP_SYS_RESOURCE = 1 << 24

_DEVICES = ("/dev/cachefiles", "/dev/fuse", "/dev/nbd0", "/dev/ublk-control")
_SYSCTLS = (
    "fs/fanotify/max_user_groups",
    "fs/fanotify/watchdog_timeout",
    "fs/nr_open",
    "kernel/hung_task_timeout_secs",
)
_CONFIG_LIMIT = 4 << 20
_ALL_USERS = ["0", "0", "4294967295"]
_OPTION = re.compile(r"^(?:# )?(CONFIG_\w+)(?:=(.*)| is not set)$", re.MULTILINE)


class Facts(NamedTuple):
    """What is known of a machine.

    Args:
        release: of the kernel, as `uname -r`.
        machine: as `uname -m`.
        config: options of the kernel's configuration, `n` for unset; None when nowhere readable.
        capabilities: effective ones, as bits.
        in_user_namespace: whether root here is not root outside.
        work_dir: the directory that was tried: the wanted one, or its parent that is there.
        filesystem: type of the file system that holds it.
        writable: whether files can be made in it.
        free_bytes: on that file system.
        findings: of `fscache.probe`, by name.
        devices: errno of opening a device node, 0 when it opens.
        filesystems: errno of using a type of file system, 0 when it is there.
        fscache_mounts: whether EROFS takes the option `fsid`; None when it was not asked.
        fuse: why FUSE cannot be used, empty when it can.
        loop: why no loop device could be made, empty when it could.
        sysfs: whether `/sys/fs/erofs` is there.
        open_files: soft and hard limit.
        sysctls: by path below `/proc/sys`, without those that are not there.
    """

    release: str
    machine: str
    config: Mapping[str, str] | None
    capabilities: int
    in_user_namespace: bool
    work_dir: Path
    filesystem: str
    writable: bool
    free_bytes: int
    findings: Mapping[str, Finding]
    devices: Mapping[str, int]
    filesystems: Mapping[str, int]
    fscache_mounts: bool | None
    fuse: str
    loop: str
    sysfs: bool
    open_files: tuple[int, int]
    sysctls: Mapping[str, int]


def gather(work_dir: Path) -> Facts:
    """Look at this machine; takes some milliseconds. Raises `OSError` for a useless directory."""
    system = os.uname()
    place = _existing(work_dir)
    space = os.statvfs(place)
    findings = probe(place)
    filesystems = {name: _try_filesystem(name) for name in ("erofs", "overlay")}
    return Facts(
        release=system.release,
        machine=system.machine,
        config=_config(system.release),
        capabilities=_capabilities(Path("/proc/self/status").read_text()),
        in_user_namespace=Path("/proc/self/uid_map").read_text().split() != _ALL_USERS,
        work_dir=place,
        filesystem=filesystem_type(place),
        writable=_is_writable(place),
        free_bytes=space.f_bavail * space.f_frsize,
        findings={finding.name: finding for finding in findings},
        devices={path: _try_device(path) for path in _DEVICES},
        filesystems=filesystems,
        fscache_mounts=None if filesystems["erofs"] else takes_fsid(),
        fuse=_try_fuse(),
        loop=_try_loop(place),
        sysfs=Path("/sys/fs/erofs").is_dir(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        sysctls=dict(_sysctls(Path("/proc/sys"), _SYSCTLS)),
    )


def _existing(path: Path) -> Path:
    """Return the directory, or the parent in which it would be made; raise `OSError`."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return path


def _is_writable(directory: Path) -> bool:
    try:
        tempfile.TemporaryFile(prefix="probe-", dir=directory).close()
    except OSError:
        return False
    return True


def parse_config(text: str) -> dict[str, str]:
    """Return the options of a kernel configuration, `n` for those that are not set."""
    return {name: value or "n" for name, value in _OPTION.findall(text)}


def _config(release: str) -> dict[str, str] | None:
    """Return the configuration of the running kernel, from where distributions leave it."""
    for name in (
        "/proc/config.gz",
        f"/boot/config-{release}",
        f"/usr/lib/modules/{release}/config",
        f"/lib/modules/{release}/config",
    ):
        with contextlib.suppress(OSError, EOFError), open(name, "rb") as file:
            text = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
            return parse_config(text.read(_CONFIG_LIMIT).decode("utf-8", "replace"))
    return None


def _capabilities(status: str) -> int:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return int(found[1], 16) if found else 0


def _try_device(path: str) -> int:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _try_filesystem(name: str) -> int:
    """Open a context for a type of file system; the kernel loads its module for that."""
    try:
        os.close(kernel.fsopen(name))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _try_fuse() -> str:
    try:
        require_fuse()
    except LazyUnsupported as error:
        return error.what
    return ""


def _try_loop(work_dir: Path) -> str:
    try:
        with tempfile.NamedTemporaryFile(prefix="probe-", dir=work_dir) as file:
            file.truncate(4096)
            LoopDevice.attach(Path(file.name)).close()
    except LoopError as error:
        return error.what
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _sysctls(top: Path, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            yield name, int((top / name).read_text())
