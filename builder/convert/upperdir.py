"""A directory of this machine as a layer: a tar that is made while it is read.

The upper directory of an overlay has its deletions as devices 0/0 and extended attributes (kernel
Documentation/filesystems/overlayfs.rst); a layer has them as `.wh.` files. Directories may belong
to a container, and others may write to them: every step is taken from an open directory, and no
symlink is followed.
"""

from __future__ import annotations

import base64
import errno
import logging
import os
import stat
import tarfile
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import quote_from_bytes

from builder.errors import BuildError
from builder.overlay import OPAQUE_MARKER, WHITEOUT_PREFIX

__all__ = ["mounted_layer", "open_beneath", "upper_layer"]

logger = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20
_MARKS = (b"trusted.overlay.", b"user.overlay.")
# What a container has set itself, on an overlay of its own: these are kept (Linux 6.7).
_ESCAPED = (b"trusted.overlay.overlay.", b"user.overlay.overlay.")
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without waiting for the writer of a FIFO that has come in between.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_SECOND = 1_000_000_000


class _Found(NamedTuple):
    """One name in an open directory."""

    directory: int
    name: bytes
    path: bytes
    status: os.stat_result

    @property
    def here(self) -> bytes:
        """A path to it that depends on no other name."""
        return b"/proc/self/fd/%d/%s" % (self.directory, self.name)


class _Entered(NamedTuple):
    """An open directory, and the names in it that are to come, the first of them last."""

    descriptor: int
    path: bytes
    names: list[bytes]
    status: os.stat_result


def open_beneath(directory: int, path: bytes) -> int:
    """Open a directory or file by its absolute path below an open directory.

    Raises:
        BuildError: it is not there, or something on the way is a symlink.
    """
    parts = [part for part in path.split(b"/") if part]
    if b".." in parts:
        raise BuildError("path with a '..' component", path=os.fsdecode(path))
    descriptor = os.dup(directory)
    try:
        for number, part in enumerate(parts):
            flags = _FILE if number == len(parts) - 1 else _DIRECTORY
            inner = os.open(part, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise BuildError("is no path without symlinks", path=os.fsdecode(path)) from error
        raise _failed(path, error) from error
    return descriptor


def upper_layer(
    upper: int, excluded: Collection[bytes] = (), view: int | None = None
) -> Generator[bytes]:
    """Yield the tar of an upper directory.

    Args:
        upper: the open directory.
        excluded: absolute in-image paths that are left out, with all below them.
        view: the open root of the container, in which renamed directories are looked up.

    Raises:
        BuildError: something cannot be read or changed meanwhile; a name that a layer cannot
            have; without a view, a directory that was renamed with `redirect_dir`.
    """
    walk = _Walk(excluded, view, marks=True)
    yield from walk.directory(_Found(upper, b".", b"", os.fstat(upper)))
    yield bytes(2 * tarfile.BLOCKSIZE)


def mounted_layer(root: int, path: bytes, excluded: Collection[bytes] = ()) -> Generator[bytes]:
    """Yield the tar of what is mounted at a path; nothing of lower layers is seen there.

    Args:
        root: the open root of the container.
        path: absolute in-image path.
        excluded: as for `upper_layer`.

    Raises:
        BuildError: as `upper_layer`.
    """
    yield from _Walk(excluded, None, marks=False).subtree(root, path)
    yield bytes(2 * tarfile.BLOCKSIZE)


class _Walk:
    """Makes the members of one tar; `marks` are those of overlayfs."""

    def __init__(self, excluded: Collection[bytes], view: int | None, *, marks: bool) -> None:
        self._excluded = frozenset(excluded)
        self._view = view
        self._marks = marks
        self._device: int | None = None
        self._links: dict[tuple[int, int], bytes] = {}

    def subtree(self, root: int, path: bytes) -> Iterator[bytes]:
        """Yield what is at a path of a view, hiding what is below it."""
        above, _, name = path.rstrip(b"/").rpartition(b"/")
        directory = open_beneath(root, above)
        try:
            found = _Found(directory, name, path.strip(b"/"), _status(directory, name, path))
            if stat.S_ISDIR(found.status.st_mode):
                self._device = None if self._view is None else found.status.st_dev
                yield from self.directory(found, opaque=True)
            else:
                yield from self._other(found)
        finally:
            os.close(directory)

    def directory(self, top: _Found, *, opaque: bool = False) -> Iterator[bytes]:
        """Yield a directory and all in it; depth is bounded by the descriptors of the process."""
        pending = [self._enter(top)]
        try:
            yield from self._describe_directory(pending[-1], opaque)
            while pending:
                if not pending[-1].names:
                    os.close(pending.pop().descriptor)
                    continue
                found = self._next(pending[-1])
                if found is None:
                    continue
                if not stat.S_ISDIR(found.status.st_mode):
                    yield from self._other(found)
                elif self._is_renamed(found):
                    yield from self._as_seen(found)
                else:
                    pending.append(self._enter(found))
                    yield from self._describe_directory(pending[-1], opaque=False)
        finally:
            for entered in pending:
                os.close(entered.descriptor)

    def _next(self, entered: _Entered) -> _Found | None:
        """Return the next name of a directory, None for one that is left out."""
        name = entered.names.pop()
        path = _join(entered.path, name)
        if b"/" + path in self._excluded:
            return None
        descriptor = entered.descriptor
        return _Found(descriptor, name, path, _status(descriptor, name, path))

    def _enter(self, found: _Found) -> _Entered:
        """Open a directory; the caller closes it."""
        descriptor = -1
        try:
            descriptor = os.open(found.name, _DIRECTORY, dir_fd=found.directory)
            names = sorted(map(os.fsencode, os.listdir(descriptor)), reverse=True)
            status = os.fstat(descriptor)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise _failed(found.path, error) from error
        if self._device is not None and status.st_dev != self._device:
            # Something else is mounted in the container there.
            names = []
        return _Entered(descriptor, found.path, names, status)

    def _describe_directory(self, entered: _Entered, opaque: bool) -> Iterator[bytes]:
        path = entered.path
        attributes = _attributes(entered.descriptor, path)
        yield _header(path, entered.status, self._kept(attributes))
        if opaque or (self._marks and b"y" in _marked(attributes, b"opaque")):
            yield _mark(_join(path, OPAQUE_MARKER))

    def _other(self, found: _Found) -> Iterator[bytes]:
        """Yield what is no directory."""
        status, path = found.status, found.path
        if found.name.startswith(WHITEOUT_PREFIX):
            raise BuildError("name is kept for deletions", entry=os.fsdecode(path))
        is_socket = stat.S_ISSOCK(status.st_mode)
        is_deletion = self._marks and stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
        if is_socket:
            logger.warning("socket %s is left out", os.fsdecode(path))
        if is_deletion or (is_socket and self._marks):
            above = path.rpartition(b"/")[0]
            yield _mark(_join(above, WHITEOUT_PREFIX + found.name))
        elif stat.S_ISREG(status.st_mode):
            yield from self._file(found)
        elif not is_socket:
            attributes = self._kept(_attributes(found.here, path))
            yield _header(path, status, attributes, _target(found))

    def _file(self, found: _Found) -> Iterator[bytes]:
        first = self._links.get((found.status.st_dev, found.status.st_ino))
        with _opened_file(found) as descriptor:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BuildError("changed while it was read", entry=os.fsdecode(found.path))
            attributes = _attributes(descriptor, found.path)
            if self._marks and _marked(attributes, b"metacopy"):
                yield from self._as_seen(found)
                return
            if first is not None:
                yield _header(found.path, status, self._kept(attributes), first, is_link=True)
                return
            if status.st_nlink > 1:
                self._links[status.st_dev, status.st_ino] = found.path
            yield _header(found.path, status, self._kept(attributes))
            yield from _content(descriptor, status.st_size, found.path)

    def _is_renamed(self, found: _Found) -> bool:
        return self._marks and bool(_marked(_attributes(found.here, found.path), b"redirect"))

    def _as_seen(self, found: _Found) -> Iterator[bytes]:
        """Yield what only the whole overlay knows: its lower part has another name."""
        if self._view is None:
            raise BuildError(
                "was renamed or changed by reference (redirect_dir, metacopy): only the"
                " container's own view has its content",
                entry=os.fsdecode(found.path),
            )
        yield from _Walk(self._excluded, self._view, marks=False).subtree(self._view, found.path)

    def _kept(self, attributes: dict[bytes, bytes]) -> dict[bytes, bytes]:
        if not self._marks:
            return attributes
        return {
            name: value
            for name, value in attributes.items()
            if not name.startswith(_MARKS) or name.startswith(_ESCAPED)
        }


def _failed(path: bytes, error: OSError) -> BuildError:
    return BuildError(f"cannot be read ({error.strerror})", entry=os.fsdecode(path))


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def _status(directory: int, name: bytes, path: bytes) -> os.stat_result:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError as error:
        raise _failed(path, error) from error


def _target(found: _Found) -> bytes:
    if not stat.S_ISLNK(found.status.st_mode):
        return b""
    try:
        return os.readlink(found.name, dir_fd=found.directory)
    except OSError as error:
        raise _failed(found.path, error) from error


@contextmanager
def _opened_file(found: _Found) -> Iterator[int]:
    try:
        descriptor = os.open(found.name, _FILE, dir_fd=found.directory)
    except OSError as error:
        raise _failed(found.path, error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _attributes(place: bytes | int, path: bytes) -> dict[bytes, bytes]:
    """Return the extended attributes of what is open, or at a path that is not followed."""
    follow = isinstance(place, int)
    try:
        return {
            os.fsencode(name): os.getxattr(place, name, follow_symlinks=follow)
            for name in os.listxattr(place, follow_symlinks=follow)
        }
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return {}
        raise _failed(path, error) from error


def _marked(attributes: dict[bytes, bytes], name: bytes) -> list[bytes]:
    """Return the values of a mark, which each of the two families of names may have."""
    return [attributes[mark + name] for mark in _MARKS if mark + name in attributes]


def _mark(path: bytes) -> bytes:
    info = tarfile.TarInfo(os.fsdecode(path))
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _header(
    path: bytes,
    status: os.stat_result,
    attributes: dict[bytes, bytes],
    link: bytes = b"",
    *,
    is_link: bool = False,
) -> bytes:
    """Return the header of a member, with an extended one for what the plain one cannot say."""
    info = tarfile.TarInfo(os.fsdecode(path or b"."))
    info.type = tarfile.LNKTYPE if is_link else _TYPES[stat.S_IFMT(status.st_mode)]
    info.mode = stat.S_IMODE(status.st_mode)
    info.uid, info.gid = status.st_uid, status.st_gid
    info.size = status.st_size if info.type == tarfile.REGTYPE else 0
    info.linkname = os.fsdecode(link)
    info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    seconds, part = divmod(abs(status.st_mtime_ns), _SECOND)
    sign = "-" if status.st_mtime_ns < 0 else ""
    info.mtime = status.st_mtime_ns // _SECOND
    info.pax_headers = {
        # The form that has a place for every byte of names and values.
        f"LIBARCHIVE.xattr.{quote_from_bytes(name)}": base64.b64encode(value).decode()
        for name, value in attributes.items()
    }
    if part or sign:
        info.pax_headers["mtime"] = f"{sign}{seconds}.{part:09}"
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _content(descriptor: int, size: int, path: bytes) -> Iterator[bytes]:
    rest = size
    while rest:
        try:
            piece = os.read(descriptor, min(rest, _PIECE_BYTES))
        except OSError as error:
            raise _failed(path, error) from error
        if not piece:
            raise BuildError("file shrank while it was read", entry=os.fsdecode(path))
        rest -= len(piece)
        yield piece
    yield bytes(-size % tarfile.BLOCKSIZE)
