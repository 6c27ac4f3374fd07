"""Verdicts about facts: what this machine can do, what that means, and what would enable more.

Pure. Source: spec ondemand 0, 5.3, 5.10, 5.15, 6.1, 6.3.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from fscache.cachefiles.support import unsafe_kernel
from fscache.doctor.facts import CAP_SYS_ADMIN, CAP_SYS_RESOURCE, Facts
from fscache.fetch.fetcher import FetcherOptions

__all__ = ["Row", "Transport", "Verdict", "rows", "transports"]

_EROFS_RELEASE = (5, 16)
_FILE_BACKED_RELEASE = (6, 12)
_LAZY_RELEASE = (6, 14)
_NBD_RELEASE = (6, 4)
_FSCACHE_RELEASES = ((5, 19), (7, 1))
_OPEN_FILES = 65_536
_GROUPS = 128
_FILESYSTEMS = ("ext4", "xfs", "btrfs")
_LATER = "not used by this version"
_ABOVE = "see above"


class Verdict(StrEnum):
    """`NOTE`: it works, but something about it should be known."""

    YES = "yes"
    NO = "no"
    NOTE = "note"


class Row(NamedTuple):
    """One line of the table.

    Args:
        name: what was looked at.
        verdict: whether it is there.
        found: the facts.
        meaning: what it is good for.
        remedy: the line that enables more; empty when there is nothing to do.
    """

    name: str
    verdict: Verdict
    found: str
    meaning: str
    remedy: str = ""


class Transport(NamedTuple):
    """A way to get data to the kernel: whether it reads lazily, is possible here, is built in."""

    name: str
    lazy: bool
    possible: bool
    served: bool


def _verdict(good: bool) -> Verdict:
    return Verdict.YES if good else Verdict.NO


def _release(facts: Facts) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", facts.release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _enable(facts: Facts, option: str, module: str = "") -> str:
    """Return the line that brings a part of the kernel: its module, or its option."""
    value = None if facts.config is None else facts.config.get(option, "n")
    if module and value == "m":
        return f"modprobe {module}"
    if module and value is None:
        return f"modprobe {module} (a kernel with {option})"
    if value == "y":
        return f"the kernel has it ({option}=y): is it hidden from this container?"
    return f"{option}=y in the kernel's configuration"


def _ok(facts: Facts, name: str) -> bool:
    return facts.findings[name].ok


def _detail(facts: Facts, name: str) -> str:
    return facts.findings[name].detail


def _privilege(facts: Facts) -> Row:
    good = _ok(facts, "privilege") and bool(facts.capabilities & CAP_SYS_ADMIN)
    found = "CAP_SYS_ADMIN" if good else _detail(facts, "privilege")
    remedy = "" if good else "run as root; in a container with --privileged"
    if not good and facts.in_user_namespace:
        found = "root of a user namespace alone"
        remedy = "run outside of the user namespace (of the rootless container)"
    return Row(
        "privilege", _verdict(good), found, "needed to mount, and for pre-content events", remedy
    )


def _kernel(facts: Facts) -> Row:
    release = _release(facts)
    good = release >= _LAZY_RELEASE
    least = Verdict.NOTE if release >= _EROFS_RELEASE else Verdict.NO
    return Row(
        "kernel",
        Verdict.YES if good else least,
        f"Linux {facts.release}, {facts.machine}",
        "lazy reading from 6.14, plain files from 6.12, loop devices from 5.16",
        "" if good else "Linux 6.14 or later (6.18 is a long-term one)",
    )


def _erofs(facts: Facts) -> Row:
    good = _ok(facts, "erofs")
    return Row(
        "EROFS",
        _verdict(good),
        _detail(facts, "erofs"),
        "the file system of every image",
        "" if good else _enable(facts, "CONFIG_EROFS_FS", "erofs"),
    )


def _directory(facts: Facts) -> Row:
    known = facts.filesystem in _FILESYSTEMS
    writable = "" if facts.writable else ", not writable"
    good = Verdict.YES if known else Verdict.NOTE
    remedy = "" if known else "a directory on ext4, xfs or btrfs: --work-dir, cache.work_dir"
    if not facts.writable:
        remedy = "a directory that can be written to: --work-dir, cache.work_dir"
    return Row(
        "cache directory",
        good if facts.writable else Verdict.NO,
        f"{facts.work_dir}: {facts.filesystem}, {facts.free_bytes / 1e9:.1f} GB free{writable}",
        "lazy reading is known to work on ext4, xfs and btrfs",
        remedy,
    )


def _file_backed(facts: Facts) -> Row:
    good = _ok(facts, "file-backed")
    remedy = ""
    if not good and _release(facts) < _FILE_BACKED_RELEASE:
        remedy = "Linux 6.12 or later"
    elif not good and all((facts.writable, _ok(facts, "privilege"), _ok(facts, "erofs"))):
        remedy = _ABOVE
        if facts.filesystem in _FILESYSTEMS:
            remedy = _enable(facts, "CONFIG_EROFS_FS_BACKED_BY_FILE")
    elif not good:
        remedy = _ABOVE
    return Row(
        "EROFS from files",
        _verdict(good),
        _detail(facts, "file-backed"),
        "mounts of bootstrap and data files as they are, without loop devices",
        remedy,
    )


def _fanotify(facts: Facts) -> Row:
    good = _ok(facts, "fanotify")
    config = facts.config or {}
    remedy = ""
    if not good and not _ok(facts, "privilege"):
        remedy = _ABOVE
    elif not good and _release(facts) < _LAZY_RELEASE:
        remedy = "Linux 6.14 or later"
    elif not good and config.get("CONFIG_FANOTIFY_ACCESS_PERMISSIONS", "y") == "n":
        remedy = _enable(facts, "CONFIG_FANOTIFY_ACCESS_PERMISSIONS")
    elif not good:
        remedy = _ABOVE
    return Row(
        "pre-content events",
        _verdict(good),
        f"{_detail(facts, 'fanotify')} on {facts.filesystem}"
        if good
        else _detail(facts, "fanotify"),
        "the kernel asks for what is read: lazy reading stands on it",
        remedy,
    )


def _self_test(facts: Facts) -> Row:
    good = _ok(facts, "self-test")
    remedy = "another release of the kernel; --eager needs no events"
    if any(not finding.ok for name, finding in facts.findings.items() if name != "self-test"):
        remedy = _ABOVE
    return Row(
        "lazy read, tried",
        _verdict(good),
        _detail(facts, "self-test"),
        "a tiny image is mounted and read all the way through",
        "" if good else remedy,
    )


def _sysfs(facts: Facts) -> Row:
    # Without EROFS nobody makes the directory: only a missing sysfs is worth a line then.
    good = facts.sysfs or not _ok(facts, "erofs")
    return Row(
        "sysfs",
        _verdict(good),
        "/sys/fs/erofs" if facts.sysfs else "no /sys/fs/erofs",
        "tells when an unmounted image has lost its last user",
        "" if good else "mount -t sysfs sysfs /sys",
    )


def _cachefiles(facts: Facts) -> Row:
    code = facts.devices["/dev/cachefiles"]
    good = code in (0, errno.EBUSY) and facts.fscache_mounts is True
    remedy = ""
    low, high = _FSCACHE_RELEASES
    if not good and not low <= _release(facts) <= high:
        remedy = "not in this kernel (Linux 5.19 to 7.1 have it)"
    elif facts.fscache_mounts is not True:
        remedy = _enable(facts, "CONFIG_EROFS_FS_ONDEMAND")
    elif not good:
        remedy = _enable(facts, "CONFIG_CACHEFILES", "cachefiles")
    elif code == errno.EBUSY:
        remedy = "systemctl disable --now cachefilesd (somebody holds the device)"
    unsafe = unsafe_kernel(facts.release, "")
    if good and not remedy:
        remedy = unsafe
    mounts = {True: "yes", False: "no", None: "not asked"}[facts.fscache_mounts]
    return Row(
        "cachefiles on demand",
        Verdict.NOTE if good and (code or unsafe) else _verdict(good),
        f"{_opened('/dev/cachefiles', code)}; EROFS over fscache: {mounts}",
        "lazy reading on Linux 5.19 to 7.1, for one process at a time",
        remedy,
    )


def _opened(path: str, code: int) -> str:
    return f"{path}: {os.strerror(code)}" if code else path


def _device(facts: Facts, name: str, path: str, meaning: str, option: str, module: str) -> Row:
    code = facts.devices[path]
    remedy = "" if not code else _enable(facts, option, module)
    if code in (errno.EPERM, errno.EACCES):
        remedy = _ABOVE if not _ok(facts, "privilege") else f"allow the device {path}"
    return Row(name, _verdict(not code), _opened(path, code), meaning, remedy)


def _fuse(facts: Facts) -> Row:
    meaning = "lazy reading by a process, for every user and on every kernel"
    device = _device(facts, "FUSE", "/dev/fuse", meaning, "CONFIG_FUSE_FS", "fuse")
    if device.verdict is Verdict.NO or not facts.fuse:
        return device
    return device._replace(verdict=Verdict.NO, found=facts.fuse, remedy="apt install fuse3")


def _loop(facts: Facts) -> Row:
    remedy = ""
    if facts.loop:
        remedy = _enable(facts, "CONFIG_BLK_DEV_LOOP", "loop")
        if not (facts.writable and _ok(facts, "privilege")):
            remedy = _ABOVE
    return Row(
        "loop devices",
        _verdict(not facts.loop),
        facts.loop or "a loop device was made and let go",
        "--eager before Linux 6.12: one for each file of an image",
        remedy,
    )


def _overlay(facts: Facts) -> Row:
    code = facts.filesystems["overlay"]
    remedy = _enable(facts, "CONFIG_OVERLAY_FS", "overlay") if code else ""
    if code == errno.EPERM:
        remedy = _ABOVE
    return Row(
        "overlayfs",
        _verdict(not code),
        os.strerror(code) if code else "the kernel has overlay",
        "a container's writable layer on top of an image; not needed to mount one",
        remedy,
    )


def _open_files(facts: Facts) -> Row:
    soft, hard = facts.open_files
    ceiling = facts.sysctls.get("fs/nr_open", hard)
    reach = ceiling if facts.capabilities & CAP_SYS_RESOURCE else hard
    good = reach < 0 or reach >= _OPEN_FILES
    remedy = "LimitNOFILE=1048576 in the unit, or ulimit -Hn 1048576"
    if not good and ceiling < _OPEN_FILES:
        remedy = "sysctl fs.nr_open=1048576"
    return Row(
        "open files",
        Verdict.YES if good else Verdict.NOTE,
        f"limit {soft}, can be raised to {reach}",
        "each blob and each waiting read holds one",
        "" if good else remedy,
    )


def _groups(facts: Facts) -> Row:
    name = "fs/fanotify/max_user_groups"
    limit = facts.sysctls.get(name)
    good = limit is not None and limit >= _GROUPS
    return Row(
        "fanotify groups",
        Verdict.YES if good else Verdict.NOTE,
        "unknown" if limit is None else f"{limit} for each user",
        "one for each cache directory of a daemon; events and marks have no limit",
        "" if good else f"sysctl {name.replace('/', '.')}=1024",
    )


def _watchdog(facts: Facts) -> Row:
    name = "fs/fanotify/watchdog_timeout"
    seconds = facts.sysctls.get(name)
    line = f"sysctl {name.replace('/', '.')}={int(FetcherOptions().request_deadline) + 20}"
    return Row(
        "fanotify watchdog",
        _verdict(bool(seconds)),
        {None: "not in this kernel", 0: "off"}.get(seconds, f"{seconds} s"),
        "the kernel logs a daemon that does not answer; nothing depends on it",
        line if seconds == 0 else "",
    )


def _hung_tasks(facts: Facts) -> Row:
    name = "kernel/hung_task_timeout_secs"
    seconds = facts.sysctls.get(name, 0)
    deadline = int(FetcherOptions().request_deadline)
    good = not 0 < seconds <= deadline
    return Row(
        "hung task limit",
        Verdict.YES if good else Verdict.NOTE,
        f"{seconds} s" if seconds else "off",
        f"readers that wait longer are logged as hung; reads fail after {deadline} s",
        "" if good else f"sysctl {name.replace('/', '.')}={deadline + 20}",
    )


_NEEDED = (
    _privilege,
    _kernel,
    _directory,
    _erofs,
    _file_backed,
    _fanotify,
    _self_test,
    _sysfs,
)


def rows(facts: Facts) -> list[Row]:
    """Return the table, in the order in which things are needed."""
    return list(_rows(facts))


def _rows(facts: Facts) -> Iterator[Row]:
    for check in _NEEDED:
        yield check(facts)
    yield _cachefiles(facts)
    yield _device(
        facts, "ublk", "/dev/ublk-control",
        f"block devices by a process from Linux 6.0; {_LATER}",
        "CONFIG_BLK_DEV_UBLK", "ublk_drv",
    )  # fmt: skip
    yield _device(
        facts, "NBD", "/dev/nbd0", "lazy reading by a block device, from Linux 6.4 on",
        "CONFIG_BLK_DEV_NBD", "nbd",
    )  # fmt: skip
    yield _fuse(facts)
    for check in (_loop, _overlay, _open_files, _groups, _watchdog, _hung_tasks):
        yield check(facts)


def transports(facts: Facts) -> list[Transport]:
    """Return the ways to the kernel, the best first (spec ondemand 5.15)."""
    lazy = all(finding.ok for finding in facts.findings.values()) and facts.sysfs
    mounts = _ok(facts, "erofs") and _ok(facts, "privilege")
    # Nobody is led to a kernel's known holes: who wants that says so.
    cachefiles = all(
        (
            facts.fscache_mounts is True and not facts.devices["/dev/cachefiles"],
            facts.filesystem in _FILESYSTEMS and facts.writable,
            not unsafe_kernel(facts.release, ""),
        )
    )
    opens = {path: mounts and not code for path, code in facts.devices.items()}
    return [
        Transport("fanotify on plain files", True, lazy, True),
        Transport("cachefiles", True, cachefiles, True),
        Transport("ublk", True, opens["/dev/ublk-control"], False),
        Transport("NBD", True, opens["/dev/nbd0"] and _release(facts) >= _NBD_RELEASE, True),
        Transport("FUSE", True, not facts.fuse, True),
        Transport("plain files, complete (--eager)", False, _ok(facts, "file-backed"), True),
        Transport("loop devices, complete (--eager)", False, mounts and not facts.loop, True),
    ]
