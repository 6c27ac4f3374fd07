"""The directory through which one daemon's mounts open the data files.

The data of a blob are in `<work dir>/<blob id>.blob.data`, in a directory that is never
marked. Each daemon has a private directory beside them, `<work dir>/serve-<random>/`, with
a hard link to each data file that it serves; only this directory is marked for fanotify
events, and EROFS opens the devices through it. So writers never wait for themselves, and
daemons that share data files do not ask each other.

A lock on the open directory tells that its daemon lives; the lock moves with a copy of
the descriptor and ends with its last one.

In each such directory `.mounts/list` has the file systems that read through it, for the case
that daemon and holder are killed both: whoever comes next then knows which of them are without
a listener, and has served zeros for holes (spec ondemand 5.10). It has a directory of its own,
as the mark is for the files beside that; and it is below, as nydus-snapshotter takes every file
of the work directory for a blob.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from erofs.errors import NydusError
from erofs.values import Value

__all__ = ["Orphan", "ServeDirectory", "StoreError", "take_stale"]

logger = logging.getLogger(__name__)

_PREFIX = "serve-"
# No blob has an id with a dot in front; known to `holder.process`, too.
_MOUNTS = ".mounts"
_LIST = f"{_MOUNTS}/list"
_ATTEMPTS = 100
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class StoreError(NydusError):
    """The work directory cannot hold what the daemon needs, or a name does not fit in it."""


def _store_error(what: str, error: OSError, path: Path) -> StoreError:
    failure = StoreError(f"{what}: {error.strerror}", path=path)
    if error.errno is not None:
        failure.errno = error.errno
    return failure


def _lock(path: Path) -> int | None:
    """Open and lock a directory; None when it is in use or gone. The caller owns the result."""
    try:
        fd = os.open(path, _DIRECTORY_FLAGS)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and lock somebody else may have locked, removed and unlocked it.
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _empty(fd: int, path: Path) -> None:
    with suppress(FileNotFoundError):
        os.unlink(_LIST, dir_fd=fd)
    with suppress(FileNotFoundError):
        os.rmdir(_MOUNTS, dir_fd=fd)
    for name in os.listdir(fd):
        os.unlink(name, dir_fd=fd)
    path.rmdir()


class ServeDirectory:
    """A private directory of hard links, locked as long as this object (or a copy of `fd`) lives.

    Make one with `create`. `fd` is the locked descriptor; `directory` is absolute.
    """

    def __init__(self, directory: Path, fd: int) -> None:
        self.directory = directory
        self.fd = fd

    @classmethod
    def create(cls, work_dir: Path) -> ServeDirectory:
        """Make and lock `serve-<random>` (mode 0700) below `work_dir`; raise `StoreError`."""
        for _ in range(_ATTEMPTS):
            path = work_dir.absolute() / (_PREFIX + os.urandom(4).hex())
            try:
                path.mkdir(mode=0o700)
                fd = _lock(path)
            except FileExistsError:
                continue
            except OSError as error:
                raise _store_error("cannot make a serve directory", error, path) from error
            # None: a `take_stale` of another daemon was between our two steps.
            if fd is not None:
                return cls(path, fd)
        raise StoreError("found no free name for a serve directory", path=work_dir)

    def path(self, blob_id: str) -> Path:
        """Return where the link of a blob is; raise `StoreError` for an id that is no name."""
        if blob_id in ("", ".", "..") or "/" in blob_id or "\0" in blob_id:
            raise StoreError("blob id is not a file name", blob=repr(blob_id))
        return self.directory / blob_id

    def link(self, blob_id: str, data_file: Path) -> Path:
        """Add the hard link of a blob's data file, before its mount; return the link.

        A link that is there already must be of the same file.

        Raises:
            StoreError: not linked, or another file has the name.
        """
        path = self.path(blob_id)
        try:
            info = data_file.lstat()
            if not stat.S_ISREG(info.st_mode):
                raise StoreError("data file is not a regular file", path=data_file)
            try:
                os.link(data_file, path, follow_symlinks=False)
            except FileExistsError:
                if not os.path.samestat(info, path.lstat()):
                    raise StoreError("another file is served under this id", path=path) from None
        except OSError as error:
            raise _store_error(f"cannot link {data_file}", error, path) from error
        return path

    def restore(self, blob_id: str, data_file: Path) -> None:
        """Give a linked data file its name back, if it was deleted while it is served.

        Raises:
            StoreError: not linked.
        """
        try:
            os.link(self.path(blob_id), data_file, follow_symlinks=False)
        except (FileExistsError, FileNotFoundError):
            return
        except OSError as error:
            raise _store_error("cannot restore the data file", error, data_file) from error

    def note_mount(self, name: str, mountpoint: Path) -> None:
        """Write down a file system that is about to be mounted from here; raise `StoreError`."""
        line = {"boot": _boot_id(), "erofs": name, "mountpoint": str(mountpoint)}
        try:
            (self.directory / _MOUNTS).mkdir(mode=0o700, exist_ok=True)
            with (self.directory / _LIST).open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise _store_error("cannot note a mount", error, self.directory) from error

    def unlink(self, blob_id: str) -> None:
        """Remove a blob's link, after its last mount is gone; fine when there is none."""
        path = self.path(blob_id)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _store_error("cannot remove the link", error, path) from error

    def remove(self) -> None:
        """Delete the directory and its links and release the lock, after all mounts are gone."""
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        try:
            _empty(fd, self.directory)
        except OSError as error:
            raise _store_error(
                "cannot remove the serve directory", error, self.directory
            ) from error
        finally:
            os.close(fd)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Orphan(Value):
    """A marked directory that nobody listens to; names and places of its file systems."""

    store: ServeDirectory
    mounts: dict[str, str]

    @property
    def alive(self) -> bool:
        """Whether somebody may still read through it."""
        return any(_is_alive(name) for name in self.mounts)


def _is_alive(name: str) -> bool:
    return "/" not in name and (Path("/sys/fs/erofs") / name).exists()


def _living_mounts(directory: Path) -> dict[str, str]:
    """Return names and mount points of the file systems of a directory that still exist."""
    found: dict[str, str] = {}
    try:
        lines = (directory / _LIST).read_text().splitlines()
    except FileNotFoundError:
        return found
    boot = _boot_id()
    for line in lines:
        try:
            noted = json.loads(line)
            name, mountpoint = str(noted["erofs"]), str(noted["mountpoint"])
            same_boot = noted["boot"] == boot
        except (ValueError, KeyError, TypeError):
            # The last line of a writer that was killed.
            continue
        if same_boot and _is_alive(name):
            found[name] = mountpoint
    return found


def take_stale(work_dir: Path) -> list[Orphan]:
    """Delete the serve directories whose daemon is gone; return those still in use, locked.

    The data files stay: only their links go. What cannot be deleted is logged and left.
    """
    orphans = []
    for path in sorted(work_dir.absolute().glob(_PREFIX + "*")):
        if not path.is_dir():
            continue
        try:
            fd = _lock(path)
            if fd is None:
                continue
            store = ServeDirectory(path, fd)
            mounts = _living_mounts(path)
            if mounts:
                orphans.append(Orphan(store, mounts))
            else:
                store.remove()
                logger.info("removed %s of a daemon that is gone", path)
        except (OSError, StoreError) as error:
            logger.warning("stale serve directory stays: %s", error)
    return orphans
