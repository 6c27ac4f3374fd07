"""The system calls that Python has no function for: fanotify and the mount API.

Each function is one call: it raises `OSError` with the kernel's errno and hands new
descriptors (always close-on-exec) to the caller, who owns them. No policy lives here:
no retries, no defaults, no state. ctypes releases the GIL around each call, so a thread
that waits in the kernel for an event of this very process does not stop the others.

Source: Linux `include/uapi/linux/fanotify.h`, `include/uapi/linux/mount.h`; spec
ondemand 5.2 and 8.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "AT_FDCWD",
    "FAN_CLASS_PRE_CONTENT",
    "FAN_CLOEXEC",
    "FAN_EVENT_ON_CHILD",
    "FAN_MARK_ADD",
    "FAN_MARK_IGNORE_SURV",
    "FAN_MARK_REMOVE",
    "FAN_NONBLOCK",
    "FAN_PRE_ACCESS",
    "FAN_UNLIMITED_MARKS",
    "FAN_UNLIMITED_QUEUE",
    "MNT_DETACH",
    "MOUNT_ATTR_RDONLY",
    "UMOUNT_NOFOLLOW",
    "fanotify_init",
    "fanotify_mark",
    "fsconfig_create",
    "fsconfig_flag",
    "fsconfig_string",
    "fsmount",
    "fsopen",
    "make_private",
    "make_slaves",
    "move_mount",
    "open_tree",
    "read_log",
    "umount",
    "unshare_directory",
    "unshare_mounts",
]

FAN_CLOEXEC = 0x1
FAN_NONBLOCK = 0x2
FAN_CLASS_PRE_CONTENT = 0x8
FAN_UNLIMITED_QUEUE = 0x10
FAN_UNLIMITED_MARKS = 0x20

FAN_MARK_ADD = 0x1
FAN_MARK_REMOVE = 0x2
FAN_MARK_IGNORE_SURV = 0x440

FAN_PRE_ACCESS = 0x00100000
FAN_EVENT_ON_CHILD = 0x08000000

AT_FDCWD = -100

MOUNT_ATTR_RDONLY = 0x1
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

_FSOPEN_CLOEXEC = 0x1
_FSMOUNT_CLOEXEC = 0x1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_BENEATH = 0x200
# OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC
_OPEN_TREE_FLAGS = 1 | os.O_CLOEXEC
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_MS_PRIVATE = 1 << 18
_MS_SLAVE = 1 << 19
# struct mount_attr: attributes to set and to clear, propagation, user namespace.
_MOUNT_ATTR = struct.Struct("=QQQQ")
_LOG_LINE_BYTES = 4096
_CLONE_FS = 0x200
_CLONE_NEWNS = 0x20000


class _Numbers(NamedTuple):
    fanotify_init: int
    fanotify_mark: int
    open_tree: int = 428
    move_mount: int = 429
    fsopen: int = 430
    fsconfig: int = 431
    fsmount: int = 432
    mount_setattr: int = 442


_NUMBERS = {
    "x86_64": _Numbers(fanotify_init=300, fanotify_mark=301),
    "aarch64": _Numbers(fanotify_init=262, fanotify_mark=263),
}


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    # syscall(2) is variadic in C, but takes all its arguments in registers as any other
    # function does. Words alone: pointers are given by their addresses.
    libc.syscall.argtypes = [ctypes.c_long] * 6
    libc.syscall.restype = ctypes.c_long
    libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
    return libc


@functools.cache
def _numbers() -> _Numbers:
    machine = os.uname().machine
    numbers = _NUMBERS.get(machine)
    if numbers is None or struct.calcsize("P") != 8:
        raise OSError(
            errno.ENOSYS,
            f"no system call numbers for this machine (known: {', '.join(_NUMBERS)}, 64 bits)",
            machine,
        )
    return numbers


def _text(value: str | bytes | Path) -> bytes:
    raw = os.fsencode(value)
    if b"\0" in raw:
        raise OSError(errno.EINVAL, "NUL in a string for the kernel", repr(value))
    return raw


def _call(what: str, number: int, *args: int | bytes | None) -> int:
    """Make one system call; `what` becomes the file name of the `OSError`."""
    # `keep` owns the C strings until the call is over.
    keep = [ctypes.create_string_buffer(arg) if isinstance(arg, bytes) else arg for arg in args]
    words = [
        0 if item is None else item if isinstance(item, int) else ctypes.addressof(item)
        for item in keep
    ]
    words += [0] * (5 - len(words))
    result: int = _libc().syscall(number, *words)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
    return result


def fanotify_init(flags: int, event_flags: int) -> int:
    """Create a fanotify group and return its descriptor; the caller owns it.

    Args:
        flags: `FAN_CLASS_*` and friends; `FAN_CLOEXEC` is added.
        event_flags: open flags of the descriptors that events carry.
    """
    return _call("fanotify_init", _numbers().fanotify_init, flags | FAN_CLOEXEC, event_flags)


def fanotify_mark(group: int, flags: int, mask: int, target: Path | int) -> None:
    """Add or remove a mark on a path, or on what an open descriptor refers to."""
    number = _numbers().fanotify_mark
    if isinstance(target, int):
        _call(f"descriptor {target}", number, group, flags, mask, target, None)
    else:
        _call(str(target), number, group, flags, mask, AT_FDCWD, _text(target))


def fsopen(filesystem: str) -> int:
    """Open a configuration context for a new file system instance; the caller owns it."""
    return _call(filesystem, _numbers().fsopen, _text(filesystem), _FSOPEN_CLOEXEC)


def read_log(context: int) -> list[str]:
    """Read the messages that the kernel left in a context; `e`, `w` and `i` mark their level."""
    lines: list[str] = []
    while True:
        try:
            line = os.read(context, _LOG_LINE_BYTES)
        except OSError:
            # ENODATA: no more messages. Anything else must not hide the error being told.
            return lines
        if not line:
            return lines
        lines.append(line.decode("utf-8", "backslashreplace").strip())


def _configure(context: int, what: str, number: int, *args: int | bytes | None) -> int:
    """Call on a context; an error carries the messages that the kernel left there."""
    try:
        return _call(what, number, context, *args)
    except OSError as error:
        lines = read_log(context)
        if not lines:
            raise
        text = f"{error.strerror} (kernel: {'; '.join(lines)})"
        raise OSError(error.errno, text, what) from error


def fsconfig_flag(context: int, key: str) -> None:
    """Set an option without a value."""
    number = _numbers().fsconfig
    _configure(context, key, number, _FSCONFIG_SET_FLAG, _text(key), None, 0)


def fsconfig_string(context: int, key: str, value: str | bytes | Path) -> None:
    """Set an option to a string, which has to be shorter than 256 bytes (else `EINVAL`)."""
    what = f"{key}={os.fsdecode(value)}"
    number = _numbers().fsconfig
    _configure(context, what, number, _FSCONFIG_SET_STRING, _text(key), _text(value), 0)


def fsconfig_create(context: int) -> None:
    """Create the file system instance; paths of options are resolved now, from the cwd."""
    number = _numbers().fsconfig
    _configure(context, "fsconfig(create)", number, _FSCONFIG_CMD_CREATE, None, None, 0)


def fsmount(context: int, attributes: int) -> int:
    """Return the instance as a mount that is nowhere attached; the caller owns it.

    The mount goes away with its descriptor unless `move_mount` has attached it.
    """
    return _configure(context, "fsmount", _numbers().fsmount, _FSMOUNT_CLOEXEC, attributes)


def move_mount(mount: int, target: Path, *, beneath: bool = False) -> None:
    """Attach a mount descriptor at a directory: on top, or beneath the top mount (Linux 6.5)."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | (_MOVE_MOUNT_BENEATH if beneath else 0)
    _call(str(target), _numbers().move_mount, mount, b"", AT_FDCWD, _text(target), flags)


def open_tree(source: Path, *, recursive: bool = False) -> int:
    """Clone the mount at a directory, alone or with those below; the caller owns the descriptor."""
    flags = _OPEN_TREE_FLAGS | (_AT_RECURSIVE if recursive else 0)
    return _call(str(source), _numbers().open_tree, AT_FDCWD, _text(source), flags)


def make_private(mount: int, attributes: int) -> None:
    """Cut a mount descriptor off from mount propagation and set `MOUNT_ATTR_*` of it."""
    words = _MOUNT_ATTR.pack(attributes, 0, _MS_PRIVATE, 0)
    number = _numbers().mount_setattr
    _call("mount_setattr", number, mount, b"", _AT_EMPTY_PATH, words, len(words))


def make_slaves(top: Path) -> None:
    """Let the mount at a directory, and all below it, follow changes elsewhere and tell of none."""
    words = _MOUNT_ATTR.pack(0, 0, _MS_SLAVE, 0)
    number = _numbers().mount_setattr
    _call(str(top), number, AT_FDCWD, _text(top), _AT_RECURSIVE, words, len(words))


def umount(target: Path, flags: int) -> None:
    """Unmount what is on top of `target` (`MNT_DETACH`: lazily, `UMOUNT_NOFOLLOW`: no links)."""
    if _libc().umount2(_text(target), flags) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def unshare_directory() -> None:
    """Give the calling thread, and threads that it starts, a working directory of their own."""
    _unshare(_CLONE_FS)


def unshare_mounts() -> None:
    """Give the calling thread, and what it starts, a copy of the mount namespace."""
    _unshare(_CLONE_NEWNS)


def _unshare(flags: int) -> None:
    if _libc().unshare(flags) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "unshare")
