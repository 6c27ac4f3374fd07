"""The daemon of a node: images below one mount point, attached and detached while it runs.

With a bootstrap the mount point is the image itself. Without one it is a private tmpfs that
holds nothing but the directories which images are mounted on.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from erofs.errors import NydusError
from fscache.backend.settings import Credentials
from fscache.config import DaemonConfig
from fscache.image import ImageOptions, Progress, ServedImage
from fscache.lifecycle import Lifecycle, State
from fscache.mount import MountError
from fscache.place import (
    TMPFS_SOURCE,
    Mounted,
    PlainMount,
    mount_bind,
    mount_tmpfs,
    mounted_at,
)
from fscache.runtime import Runtime

__all__ = ["Entry", "NodeDaemon", "NodeOptions", "TableError"]

logger = logging.getLogger(__name__)

ROOT = "/"


class TableError(NydusError):
    """A mount that is there already, is not there, or has a path that cannot be."""


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What a node daemon begins with.

    Args:
        mountpoint: an existing directory.
        bootstrap: the image to mount there, with its `config`.
        shared_dir: a directory to bind there instead.
        id: name of the instance, as clients gave it.
        environment: adds to the configuration of images that are mounted later.
        eager: fetch and verify the image first, then mount it.
        directio: read data files past the page cache.
        progress: called with (bytes done, all bytes) while an eager start fetches.
    """

    mountpoint: Path
    bootstrap: Path | None = None
    config: DaemonConfig | None = None
    shared_dir: Path | None = None
    id: str | None = None
    supervisor: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    eager: bool = False
    directio: bool = False
    progress: Progress | None = None


@dataclass(slots=True)
class Entry:
    """One mount of the table: an image, or a directory that is passed through."""

    path: str
    mounted_at: float
    image: ServedImage | None
    bind: PlainMount | None


class NodeDaemon(Lifecycle):
    """Serves the images of a node; see `Lifecycle` for states.

    This process must not read or execute anything of its own mounts: a page fault or a
    `vfork` that waits for itself with the interpreter's lock held waits for ever. Other
    processes may, also ones that this process started by way of a program elsewhere.
    """

    def __init__(self, options: NodeOptions) -> None:
        super().__init__()
        self.options = options
        self._stack = ExitStack()
        self._lock = threading.RLock()
        self._table: dict[str, Entry] = {}
        self._runtime: Runtime | None = None
        self.credentials_replaced = False
        # True while nothing is mounted and an exception in the main thread does no harm.
        self.interruptible = False

    # Life

    def start(self) -> None:
        """Mount what there is at the beginning; raise `NydusError`, then nothing is left."""
        self.require(State.INIT)
        try:
            self._start()
        except BaseException:
            self.interruptible = False
            self._stack.close()
            self.enter(State.STOPPED)
            raise
        self.enter(State.RUNNING)

    def _start(self) -> None:
        top = self.options.mountpoint
        if not top.is_dir():
            raise MountError("mount point is not a directory", errno.ENOTDIR, path=top)
        self._clear_leftover(top)
        self._runtime = runtime = Runtime()
        self._stack.callback(runtime.close)
        self.enter(State.READY)
        options = self.options
        if options.bootstrap is not None and options.config is not None:
            # Only the fetch of an eager start takes long, and it comes before the mount.
            self.interruptible = options.eager
            image = runtime.mount(
                options.config,
                options.bootstrap,
                top,
                ImageOptions(
                    directio=options.directio,
                    progress=options.progress,
                    before_mount=self._hold_interrupts,
                ),
                eager=options.eager,
            )
            self._table[ROOT] = Entry(ROOT, time.time(), image, None)
            logger.info("serving %s at %s", options.bootstrap, top)
        elif options.shared_dir is not None:
            bind = mount_bind(options.shared_dir, top)
            self._stack.callback(bind.unmount)
            self._table[ROOT] = Entry(ROOT, time.time(), None, bind)
        else:
            self._stack.callback(mount_tmpfs(top).unmount)
            self._stack.callback(self._unmount_all)

    def _hold_interrupts(self) -> None:
        self.interruptible = False

    def _clear_leftover(self, top: Path) -> None:
        """Take away the mount of a daemon that died: its holes read as zeros (spec 5.10).

        Only our own kind of tmpfs, and a mount of the very bootstrap that comes now; what
        anybody else has mounted there stays below.
        """
        while (found := mounted_at(top)) is not None and self._is_ours(found):
            logger.error(
                "%s is still mounted by a daemon that is gone: programs that used it since"
                " may have read zeros and have to be restarted; it is unmounted now",
                top,
            )
            PlainMount(top).unmount()

    def _is_ours(self, found: Mounted) -> bool:
        if found.kind == "tmpfs":
            return found.source == TMPFS_SOURCE
        bootstrap = self.options.bootstrap
        return (
            found.kind == "erofs"
            and bootstrap is not None
            and os.path.realpath(found.source) == os.path.realpath(bootstrap)
        )

    def stop(self) -> None:
        """Unmount and close everything; waits for the users of images (see `Runtime.close`)."""
        if self.state is State.STOPPED:
            return
        self._stack.close()
        self.enter(State.STOPPED)

    # The table

    @property
    def runtime(self) -> Runtime:
        """What serves the images, once the daemon runs."""
        self.require(State.READY, State.RUNNING)
        if self._runtime is None:
            raise TableError("the daemon has not begun to serve")
        return self._runtime

    def entries(self) -> list[Entry]:
        """Return the mounts, in the order in which they were made."""
        with self._lock:
            return list(self._table.values())

    def image(self, path: str) -> ServedImage:
        """Return the image at a path of the table; raise `TableError`."""
        entry = self._table.get(path)
        if entry is None or entry.image is None:
            raise TableError("object or filesystem doesn't exist", path=path)
        return entry.image

    def _directory(self, path: str) -> Path:
        """Return the directory of the host for a path of the table; raise `TableError`."""
        parts = path.split("/")
        if not path.startswith("/") or ".." in parts or "\0" in path:
            raise TableError("mount point is not an absolute path without '..'", path=path)
        if self.options.bootstrap is not None or self.options.shared_dir is not None:
            raise TableError("mounts below an image are not supported in this version", path=path)
        directory = self.options.mountpoint.joinpath(*(part for part in parts if part))
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TableError(f"mount point cannot be made ({error.strerror})", path=path) from error
        return directory

    def mount_image(self, path: str, bootstrap: Path, config: DaemonConfig) -> None:
        """Mount an image; raise `TableError` when the path is taken, or any `NydusError`."""
        with self._lock:
            self._require_free(path)
            directory = self._directory(path)
            image = self.runtime.mount(config, bootstrap, directory, ImageOptions())
            self._table[path] = Entry(path, time.time(), image, None)

    def mount_directory(self, path: str, source: Path) -> None:
        """Pass a directory of the host through; raise `TableError` or `MountError`."""
        with self._lock:
            self._require_free(path)
            bind = mount_bind(source, self._directory(path))
            self._table[path] = Entry(path, time.time(), None, bind)

    def _require_free(self, path: str) -> None:
        if path in self._table:
            raise TableError("object or filesystem already exists", path=path)

    def remount_image(self, path: str, bootstrap: Path, config: DaemonConfig) -> None:
        """Put another image in the place of one; its users go on with the old one.

        Raises `NydusError`; the old image is then gone only when the new one could not be
        mounted although it could be opened.
        """
        with self._lock:
            entry = self._table.get(path)
            if entry is None:
                raise TableError("object or filesystem doesn't exist", path=path)
            if entry.image is None:
                raise TableError("filesystem type mismatch, expect RAFS", path=path)
            directory = entry.image.mountpoint
            # Opened before the old one goes: what is broken shows here.
            ServedImage(config, bootstrap, directory).close()
            self.runtime.unmount(entry.image)
            del self._table[path]
            image = self.runtime.mount(config, bootstrap, directory, ImageOptions())
            self._table[path] = Entry(path, time.time(), image, None)

    def unmount(self, path: str) -> None:
        """Take a mount away; its users are served on. Raise `TableError`."""
        with self._lock:
            entry = self._table.pop(path, None)
            if entry is None:
                raise TableError("object or filesystem doesn't exist", path=path)
            if entry.image is not None:
                self.runtime.unmount(entry.image)
                self._remove_directories(entry.image.mountpoint)
            elif entry.bind is not None:
                entry.bind.unmount()
                self._remove_directories(entry.bind.mountpoint)

    def _remove_directories(self, directory: Path) -> None:
        """Remove a mount point and its empty parents below the top."""
        while directory != self.options.mountpoint and directory.parent != directory:
            try:
                directory.rmdir()
            except OSError:
                # Another mount is below, or somebody sits in it.
                return
            directory = directory.parent

    def set_credentials(self, credentials: Credentials) -> None:
        """Use other credentials for all images that are mounted now."""
        with self._lock:
            for entry in self._table.values():
                if entry.image is not None:
                    entry.image.set_credentials(credentials)
        self.credentials_replaced = True

    def _unmount_all(self) -> None:
        for entry in reversed(self.entries()):
            self.unmount(entry.path)
