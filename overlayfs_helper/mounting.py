"""The overlay mount itself: one mount(2), or the new mount API for long lists of layers.

mount(2) takes one page of options. Longer ones go through `fsopen`, a lower directory at a
time (Linux 6.7); where the kernel cannot, the names are shortened to what follows their
common directory. Either the mount is complete or there is none.
Source: spec vm-runtimes 1.3; Linux `fs/overlayfs/params.c`, `fs/fsopen.c`.
"""

import ctypes
import errno
import os

from overlayfs_helper.errors import EXIT_MOUNT, EXIT_SYSTEM, EXIT_USAGE, HelperError, shown
from overlayfs_helper.options import MS_BIND, MS_RDONLY, MS_REMOUNT, split_escaped

__all__ = ["enter_namespace", "mount_overlay"]

_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_AT_FDCWD = -100
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
# The descriptor is the mount; links and automounts at the target are followed as mount(2) does.
_MOVE_MOUNT_FLAGS = 0x4 | 0x10 | 0x20
_CLONE_NEWNS = 0x20000

# fsconfig takes 256 bytes, the terminating NUL included.
_STRING_BYTES = 255

# mount(2) flags that belong to the filesystem, by their words for fsconfig.
_FILESYSTEM_FLAGS = (
    (MS_RDONLY, b"ro"), (0x10, b"sync"), (0x40, b"mand"), (0x80, b"dirsync"),
    (0x2000000, b"lazytime"),
)  # fmt: skip
# mount(2) flags that belong to the mount, by MOUNT_ATTR_*.
_MOUNT_ATTRIBUTES = (
    (MS_RDONLY, 0x1), (0x2, 0x2), (0x4, 0x4), (0x8, 0x8), (0x800, 0x80), (0x100, 0x200000),
)  # fmt: skip
_MS_NOATIME = 0x400
_MS_STRICTATIME = 0x1000000
_ATTR_NOATIME = 0x10
_ATTR_STRICTATIME = 0x20

_PATH_OPTIONS = (b"upperdir=", b"workdir=")
# No such call or option in this kernel; EPERM is what filters of system calls say.
_NOT_THERE = (errno.ENOSYS, errno.EINVAL, errno.EPERM)
_NO_RESOURCES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p,
)  # fmt: skip


def _failure(code: int, text: str) -> HelperError:
    return HelperError(text, EXIT_SYSTEM if code in _NO_RESOURCES else EXIT_MOUNT)


def _call(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call and return its result, or raise `OSError`."""
    words = [
        ctypes.c_long(argument) if isinstance(argument, int) else ctypes.c_char_p(argument)
        for argument in arguments
    ]
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def enter_namespace(path: bytes) -> None:
    """Make the mount namespace at `path` ours; the root directory changes with it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(fd, _CLONE_NEWNS):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
        finally:
            os.close(fd)
    except OSError as error:
        text = f"namespace {shown(path)}: {error.strerror}"
        raise _failure(error.errno or errno.EIO, text) from error


def _layers(value: bytes) -> list[tuple[bytes, bytes]]:
    """Split `lowerdir` into pairs of the separator before a directory, and the directory."""
    layers: list[tuple[bytes, bytes]] = []
    separator = b""
    for part in split_escaped(value, b":"):
        if part:
            layers.append((separator, part))
            separator = b":"
        elif separator != b":":
            raise HelperError("an empty name among the lower directories", EXIT_USAGE)
        else:
            # Two colons: directories of data only follow.
            separator = b"::"
    if separator != b":":
        raise HelperError("an empty name among the lower directories", EXIT_USAGE)
    return layers


def _unescaped(text: bytes) -> bytes:
    """Remove backslashes as the kernel does: one before any byte, of two in a row the first."""
    return b"\\".join(part.replace(b"\\", b"") for part in text.split(b"\\\\"))


def _lower(options: list[bytes]) -> bytes | None:
    """Return the value of the last `lowerdir`, which is the one that counts."""
    return next((item[9:] for item in reversed(options) if item.startswith(b"lowerdir=")), None)


def _missing(options: list[bytes]) -> bytes | None:
    """Return the first directory among the options that is not there."""
    for item in options:
        key, _, value = item.partition(b"=")
        if key == b"lowerdir":
            names = [path for _, path in _layers(value)]
        else:
            names = [value] if item.startswith(_PATH_OPTIONS) else []
        for name in names:
            if not os.path.isdir(_unescaped(name)):
                return name
    return None


def _mount(target: bytes, flags: int, options: list[bytes]) -> None:
    """Mount with one mount(2)."""
    if not _libc.mount(b"overlay", target, b"overlay", flags, b",".join(options)):
        return
    code = ctypes.get_errno()
    text = os.strerror(code)
    if code in (errno.ENOENT, errno.ENOTDIR):
        missing = target if not os.path.isdir(target) else _missing(options)
        text = f"{shown(missing)}: {text}" if missing else text
    elif code == errno.EINVAL:
        text += ", the kernel's log says why"
    raise _failure(code, text)


class _Context:
    """A filesystem context for overlay; `close` ends all descriptors that were opened for it."""

    def __init__(self) -> None:
        self._opened: list[int] = []
        self._fd = self._own(_call(_NR_FSOPEN, b"overlay", _FSOPEN_CLOEXEC))

    def _own(self, fd: int) -> int:
        self._opened.append(fd)
        return fd

    def close(self) -> None:
        for fd in reversed(self._opened):
            os.close(fd)

    def _said(self) -> str:
        """Return what the kernel says about an error, without its `e `."""
        try:
            return f" ({shown(os.read(self._fd, 1024)[2:].strip())})"
        except OSError:
            return ""

    def _configure(self, command: int, key: bytes | None, value: bytes | None) -> None:
        try:
            _call(_NR_FSCONFIG, self._fd, command, key, value, 0)
        except OSError as error:
            error.strerror = f"{error.strerror}{self._said()}"
            raise

    def set_string(self, key: bytes, value: bytes) -> None:
        if len(value) > _STRING_BYTES:
            raise HelperError(f"{shown(key)}: more than {_STRING_BYTES} bytes", EXIT_USAGE)
        self._configure(_FSCONFIG_SET_STRING, key, value)

    def set_flag(self, key: bytes) -> None:
        self._configure(_FSCONFIG_SET_FLAG, key, None)

    def set_directory(self, key: bytes, name: bytes, path: bytes) -> None:
        """Set `key` to `name`, which stands for `path`; long ones through a descriptor."""
        try:
            if len(name) > _STRING_BYTES:
                fd = self._own(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
                name = b"/proc/self/fd/%d" % fd
            self.set_string(key, name)
        except OSError as error:
            error.filename = path
            raise

    def attach(self, target: bytes, attributes: int) -> None:
        self._configure(_FSCONFIG_CMD_CREATE, None, None)
        mount = self._own(_call(_NR_FSMOUNT, self._fd, _FSMOUNT_CLOEXEC, attributes))
        _call(_NR_MOVE_MOUNT, mount, b"", _AT_FDCWD, target, _MOVE_MOUNT_FLAGS)


def _attributes(flags: int) -> int:
    attributes = 0
    for flag, attribute in _MOUNT_ATTRIBUTES:
        if flags & flag:
            attributes |= attribute
    if flags & _MS_STRICTATIME:
        return attributes | _ATTR_STRICTATIME
    return attributes | _ATTR_NOATIME if flags & _MS_NOATIME else attributes


def _mount_by_parts(target: bytes, flags: int, options: list[bytes]) -> None:
    """Mount through the new mount API, one lower directory at a time."""
    context = _Context()
    try:
        context.set_string(b"source", b"overlay")
        for flag, word in _FILESYSTEM_FLAGS:
            if flags & flag:
                context.set_flag(word)
        for separator, name in _layers(_lower(options) or b""):
            key = b"datadir+" if separator == b"::" else b"lowerdir+"
            # Names that are set one by one have no escapes.
            path = _unescaped(name)
            context.set_directory(key, path, path)
        for item in options:
            key, equals, value = item.partition(b"=")
            if item.startswith(_PATH_OPTIONS):
                context.set_directory(key, value, _unescaped(value))
            elif key != b"lowerdir":
                if equals:
                    context.set_string(key, value)
                else:
                    context.set_flag(key)
        context.attach(target, _attributes(flags))
    finally:
        context.close()


def _common_directory(paths: list[bytes]) -> bytes:
    """Return the longest directory that all paths are below, or nothing."""
    # What the first and the last in order have in common, all have.
    first, last = min(paths).split(b"/"), max(paths).split(b"/")
    same = 0
    for one, other in zip(first[:-1], last[:-1], strict=False):
        if one != other:
            break
        same += 1
    return b"/".join(first[:same])


def _shortened(options: list[bytes]) -> tuple[bytes, list[bytes]] | None:
    """Return a directory, and the options with lower directories relative to it, or None."""
    lower = _lower(options)
    layers = _layers(lower) if lower else []
    if len(layers) < 2:
        return None
    paths = [path for _, path in layers]
    others = [item.partition(b"=")[2] for item in options if item.startswith(_PATH_OPTIONS)]
    directory = _common_directory(paths)
    cut = len(directory) + 1
    # A rest that is empty or begins with a slash would be another directory.
    if any(path[cut : cut + 1] in (b"", b"/") for path in paths):
        return None
    if not directory or not all(path.startswith(b"/") for path in [*paths, *others]):
        return None
    short = b"lowerdir=" + b"".join(separator + path[cut:] for separator, path in layers)
    rest = [item for item in options if not item.startswith(b"lowerdir=")]
    return _unescaped(directory), [short, *rest]


def _mount_from(directory: bytes, target: bytes, flags: int, options: list[bytes]) -> None:
    """Mount with lower directories that are relative to `directory`."""
    if not target.startswith(b"/"):
        target = os.path.join(os.getcwdb(), target)
    before = os.open(b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(directory)
        _mount(target, flags, options)
    finally:
        os.fchdir(before)
        os.close(before)


def _mount_long(target: bytes, flags: int, options: list[bytes], page_bytes: int) -> None:
    """Mount with more options than mount(2) takes."""
    try:
        _mount_by_parts(target, flags, options)
    except OSError as error:
        code = error.errno or errno.EIO
        place = f"{shown(error.filename)}: " if error.filename else ""
        reason = f"{place}{error.strerror}"
        if code not in _NOT_THERE:
            raise _failure(code, reason) from error
        short = _shortened(options)
        if short is None or len(b",".join(short[1])) >= page_bytes:
            hint = "options exceed a page; Linux 6.7 takes lower directories one by one"
            raise _failure(code, f"{reason} ({hint})") from error
        try:
            _mount_from(short[0], target, flags, short[1])
        except HelperError as second:
            text = f"{second} (one by one: {reason})"
            raise HelperError(text, second.status) from error


def mount_overlay(target: bytes, flags: int, options: list[bytes]) -> None:
    """Mount an overlay at `target`, completely or not at all.

    Args:
        target: directory.
        flags: of mount(2).
        options: the kernel's, in their order; paths escaped as for mount(2).

    Raises:
        HelperError: the kernel refuses, or has no way to take that many layers.
        OSError: the working directory is gone.
    """
    page_bytes = os.sysconf("SC_PAGESIZE")
    size = len(b",".join(options))
    if size < page_bytes:
        _mount(target, flags, options)
    elif flags & (MS_REMOUNT | MS_BIND):
        raise HelperError(f"{size} bytes of options are too many to remount", EXIT_USAGE)
    else:
        _mount_long(target, flags, options, page_bytes)
