"""The daemon of a node: images below one mount point, attached and detached while it runs.

With a bootstrap the mount point is the image itself. Without one it is a private tmpfs that
holds nothing but the directories which images are mounted on; see `fscache.mounts.nest`.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from erofs.errors import NydusError
from fscache.backend.settings import Credentials, RegistryConfig
from fscache.cache.bootfile import mountable_bootstrap, mounted_path
from fscache.config import DaemonConfig, parse_config
from fscache.entry import Entry, NodeOptions, TableError
from fscache.environment import with_environment
from fscache.events import ErrorRing
from fscache.holder.link import HolderLink, Inheritance
from fscache.image import ROOT, ImageOptions, ServedImage
from fscache.lifecycle import Lifecycle, State, StateError
from fscache.mounts.mount import MountError
from fscache.mounts.nest import Nest
from fscache.mounts.overlay import adopt_writable, mount_writable
from fscache.mounts.place import PlainMount, clear_leftover, mount_bind, mount_tmpfs
from fscache.mounts.skeleton import Look, host_directories, image_directories
from fscache.mounts.treepath import split
from fscache.record import ImageRecord, PlainRecord
from fscache.runtime import Runtime
from fscache.succession import adopt, recorded_entries
from fscache.supervisor import receive_state, send_state
from fscache.transport import Transport, wants_holder

__all__ = ["Entry", "NodeDaemon", "NodeOptions", "TableError"]

logger = logging.getLogger(__name__)

# Where the private tmpfs is noted; no path of the table begins so.
TOP = ""
# For how long a predecessor may answer what it has begun.
HANDOVER_SECONDS = 10.0


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
        # Held while the first mounts are made or taken over: changes wait for that.
        self._beginning = threading.RLock()
        self._table: dict[str, Entry] = {}
        self._nest = Nest(options.mountpoint, self._mount_tmpfs)
        self._tmpfs: PlainMount | None = None
        self._runtime: Runtime | None = None
        self._link: HolderLink | None = None
        self._inheritance: Inheritance | None = None
        self._leaves = False
        self.credentials_replaced = False
        # Filled when a command line has attached it to the log.
        self.events = ErrorRing()
        # True while nothing is mounted and an exception in the main thread does no harm.
        self.interruptible = False

    # Life

    def start(self) -> None:
        """Mount what there is at the beginning, or go on with what a killed daemon left there.

        Raises `NydusError`; then nothing is left.
        """
        self.require(State.INIT)
        with self._beginning, self._stopped_by_errors():
            self._begin(self._find_holder(join=False))
        self.enter(State.RUNNING)

    @contextmanager
    def _stopped_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.interruptible = False
            self._stack.close()
            self.enter(State.STOPPED)
            raise

    def _find_holder(self, *, join: bool) -> Inheritance:
        top = self.options.mountpoint
        _clear_dead(top)
        if not top.is_dir():
            raise MountError("mount point is not a directory", errno.ENOTDIR, path=top)
        # Complete files need nobody, and FUSE dies with its daemon: nothing is kept for others.
        if not self.options.holder or not wants_holder(self.options.transport):
            return Inheritance()
        link, inheritance = HolderLink.open(top, restart=self.options.restart, join=join)
        link.on_yield = self.request_leave
        self._link = link
        return inheritance

    def _begin(self, inheritance: Inheritance) -> None:
        if self._link is not None:
            self._stack.callback(self._link.close)
        self._runtime = runtime = Runtime(self._link)
        self._stack.callback(runtime.close)
        if self.state is State.INIT:
            self.enter(State.READY)
        adopted = adopt(runtime, inheritance, self._inherited_config)
        for item in adopted:
            entry = Entry(
                item.path,
                item.mounted_at,
                item.image,
                item.plain,
                item.key,
                item.source,
                adopted=True,
            )
            self._table[item.path] = entry
        self._stack.callback(self._unmount_tmpfs)
        self._stack.callback(self._unmount_all)
        self._use_inherited()
        options = self.options
        top = self._table.get(options.virtual)
        if options.bootstrap is not None and options.config is not None:
            if top is None or top.image is None or not top.image.is_of(options.bootstrap):
                self._mount_first_image(options.bootstrap, options.config)
        elif options.shared_dir is not None:
            if top is None or top.image is not None:
                self._mount_first_directory(options.shared_dir)
        elif self._tmpfs is None and ROOT not in self._table:
            self._mount_tmpfs()
            self._nest.use_tmpfs()

    def _use_inherited(self) -> None:
        """Know the directories and overlays that a killed daemon has made."""
        # Not in the table: clients do not see it.
        tmpfs = self._table.pop(TOP, None)
        self._nest.adopt(self._table)
        if tmpfs is not None:
            self._tmpfs = tmpfs.bind
            self._nest.use_tmpfs()
        for entry in self._table.values():
            image = entry.image
            layer = image.config.overlay if image is not None and self.options.writable else None
            if image is not None and layer is not None:
                entry.bind = adopt_writable(image.mountpoint, layer)
            if entry.path == ROOT:
                self._nest.use(self._look_of(entry))

    def _look_of(self, entry: Entry) -> Look | None:
        if entry.image is None:
            return host_directories(Path(entry.source))
        bootstrap = Path(f"/proc/self/fd/{entry.image.bootstrap_fd}")
        return image_directories(bootstrap) if entry.bind is None else None

    def _inherited_config(self, record: ImageRecord) -> DaemonConfig:
        """Return the configuration of an inherited image, the newest one that is known."""
        options = self.options
        if (
            record.path == ROOT
            and options.config is not None
            and options.bootstrap is not None
            and os.path.realpath(record.bootstrap) == os.path.realpath(options.bootstrap)
        ):
            return options.config
        config = parse_config(record.config)
        listed = record.prefetch_files
        return config._replace(
            backend=with_environment(config.backend, options.environment),
            prefetch_files=tuple(map(os.fsencode, listed.split("\0"))) if listed else None,
        )

    def _mount_first_image(self, bootstrap: Path, config: DaemonConfig) -> None:
        options = self.options
        self._clear_first()
        # Only the fetch of an eager start takes long, and it comes before the mount.
        self.interruptible = options.transport is Transport.EAGER
        image_options = ImageOptions(
            directio=options.directio,
            progress=options.progress,
            before_mount=self._hold_interrupts,
            path=options.virtual,
        )
        with self._nest.place(options.virtual, self._look(bootstrap, config)) as directory:
            self._serve_image(config, bootstrap, directory, image_options)

    def _mount_first_directory(self, shared_dir: Path) -> None:
        self._clear_first()
        self.mount_directory(self.options.virtual, shared_dir)

    def _clear_first(self) -> None:
        if self.options.virtual in self._table:
            self.unmount(self.options.virtual)
        if self.options.virtual == ROOT:
            self._clear_leftover()

    def _mount_tmpfs(self) -> None:
        self._clear_leftover()
        self._tmpfs = mount_tmpfs(self.options.mountpoint)
        self._kept(TOP, self._tmpfs, "tmpfs")

    def _unmount_tmpfs(self) -> None:
        if self._tmpfs is not None:
            self._tmpfs.unmount()

    def _kept(self, path: str, mount: PlainMount, kind: str, source: Path | None = None) -> Entry:
        """Have a plain mount noted for a successor, and return its entry."""
        source = source.absolute() if source is not None else Path()
        entry = Entry(path, time.time(), None, mount, key=f"{kind}:{path}", source=str(source))
        if self._link is not None:
            where = str(mount.mountpoint)
            record = PlainRecord(path, where, entry.mounted_at, kind, entry.source)
            self._link.keep(entry.key, record.to_dict())
        return entry

    def _hold_interrupts(self) -> None:
        self.interruptible = False

    def _clear_leftover(self) -> None:
        bootstrap, config = self.options.bootstrap, self.options.config
        source = None
        if bootstrap is not None and config is not None:
            source = mounted_path(bootstrap, config.work_dir)
        clear_leftover(self.options.mountpoint, source)

    # Succession

    def send_state(self) -> None:
        """Tell the supervisor how a successor finds what this daemon has; raise `NydusError`."""
        if self._link is None:
            raise StateError("there is no holder, so no successor could go on")
        send_state(self._supervisor, self._link.directory)

    @property
    def _supervisor(self) -> Path | None:
        supervisor = self.options.supervisor
        return Path(supervisor) if supervisor is not None else None

    def take_over(self) -> None:
        """Find out what a predecessor has left, or still has; raise `NydusError`."""
        self.require(State.INIT)
        directory = receive_state(self._supervisor)
        inheritance = self._find_holder(join=True)
        if self._link is None or self._link.directory != directory:
            raise StateError("the supervisor's state is of a daemon at another mount point")
        self._inheritance = inheritance
        self.enter(State.READY)

    @property
    def has_taken_over(self) -> bool:
        """Whether `start_taken_over` has something to do."""
        return self._inheritance is not None

    def start_taken_over(self) -> None:
        """Serve what was taken over, as soon as the predecessor has let go of it.

        Raises:
            StateError: nothing was taken over, or the predecessor does not let go.
            NydusError: as `start`; then the holder waits for another successor.
        """
        self.require(State.READY)
        inheritance, link = self._inheritance, self._link
        if inheritance is None or link is None:
            raise StateError("nothing was taken over")
        if not link.lead(HANDOVER_SECONDS):
            raise StateError(f"process {inheritance.leader} does not let go of its mounts")
        if inheritance.leader is not None:
            # Asked again, now that nobody changes it any more.
            inheritance.close()
            link.close(leave=True)
            inheritance = self._find_holder(join=False)
        with self._beginning:
            self._inheritance = None
            self._begin(inheritance)
        self.enter(State.RUNNING)

    def request_exit(self) -> None:
        """Make `wait` return, for a stop as the API's exit means it."""
        if self.options.exit_leaves:
            self.request_leave()
        else:
            self.request_stop()

    def request_leave(self) -> None:
        """Make `wait` return, for a stop that leaves the mounts to a successor."""
        self._leaves = True
        self.request_stop()

    def stop(self) -> None:
        """Unmount and close everything; waits for the users of images (see `Runtime.close`)."""
        if self.state is State.STOPPED:
            return
        if self._leaves and self._link is not None:
            if self._runtime is not None:
                self._runtime.leave(HANDOVER_SECONDS)
            self._link.close(leave=True)
            self._stack.pop_all()
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

    @property
    def trouble(self) -> str:
        """What no longer works, for a watchdog; empty when reads are answered."""
        return self._runtime.trouble if self._runtime is not None else ""

    @property
    def summary(self) -> str:
        """One line for people; waits for no lock of the table."""
        top = self.options.mountpoint
        return f"{self.state}: {len(self._table)} mounts at {top}, {self.waiting} reads wait"

    @property
    def waiting(self) -> int:
        """How many reads of the kernel wait for their answers."""
        return self._runtime.waiting if self._runtime is not None else 0

    def entries(self) -> list[Entry]:
        """Return the mounts as they were made; waits for none, which may wait for a backend."""
        inheritance = self._inheritance
        if inheritance is not None:
            # Not served yet, and clients want to see that all of it is there.
            return recorded_entries(inheritance)
        return list(self._table.values())

    def image(self, path: str) -> ServedImage:
        """Return the image at a path of the table; raise `TableError`."""
        entry = self._table.get(path)
        if entry is None or entry.image is None:
            raise TableError("object or filesystem doesn't exist", path=path)
        return entry.image

    @contextmanager
    def _changing(self) -> Iterator[Runtime]:
        """Hold the table for a change, which clients may ask for while the daemon begins.

        Raises `StateError` or `TableError` when nothing is served.
        """
        with self._beginning, self._lock:
            yield self.runtime

    def mount_image(self, path: str, bootstrap: Path, config: DaemonConfig) -> None:
        """Mount an image; raise `TableError` when the path is taken, or any `NydusError`."""
        with self._changing():
            if self._asked_again(path, bootstrap, config):
                return
            self._require_free(path)
            with self._nest.place(path, self._look(bootstrap, config)) as directory:
                self._serve_image(config, bootstrap, directory, ImageOptions(path=path))

    def _look(self, bootstrap: Path, config: DaemonConfig) -> Look | None:
        """Return what tells of the directories of an image that cannot be made in it."""
        writable = self.options.writable and config.overlay is not None
        if writable:
            return None
        return image_directories(mountable_bootstrap(bootstrap, config.work_dir))

    def _serve_image(
        self, config: DaemonConfig, bootstrap: Path, directory: Path, options: ImageOptions
    ) -> None:
        transport = self.options.transport
        image = self.runtime.mount(config, bootstrap, directory, options, transport)
        entry = Entry(options.path, time.time(), image, None)
        if config.overlay is not None and self.options.writable:
            try:
                entry.bind = mount_writable(directory, config.overlay)
            except NydusError:
                self.runtime.unmount(image)
                raise
        elif config.overlay is not None:
            logger.warning("overlay of the configuration has no effect without --writable")
        self._table[options.path] = entry
        logger.info("serving %s at %s", bootstrap, directory)

    def _asked_again(self, path: str, bootstrap: Path, config: DaemonConfig) -> bool:
        """Whether a client asks for a mount that this daemon took over already.

        A client that saw its daemon die repeats what it had asked of it; its configuration
        may have newer credentials.
        """
        entry = self._table.get(path)
        if entry is None or not entry.adopted or entry.image is None:
            return False
        entry.adopted = False
        if not entry.image.is_of(bootstrap):
            self.unmount(path)
            return False
        if isinstance(config.backend, RegistryConfig) and config.backend.credentials is not None:
            self.runtime.set_credentials(entry.image, config.backend.credentials)
        return True

    def mount_directory(self, path: str, source: Path) -> None:
        """Pass a directory of the host through; raise `TableError` or `MountError`."""
        with self._changing():
            entry = self._table.get(path)
            if entry is not None and entry.adopted and entry.bind is not None:
                self.unmount(path)
            self._require_free(path)
            with self._nest.place(path, host_directories(source)) as directory:
                bind = mount_bind(
                    source,
                    directory,
                    read_only=not self.options.writable,
                    follow=self.options.follow,
                )
                self._table[path] = self._kept(path, bind, "bind", source)

    def _require_free(self, path: str) -> None:
        if any(split(path) == split(other) for other in self._table):
            raise TableError("object or filesystem already exists", path=path)

    def remount_image(self, path: str, bootstrap: Path, config: DaemonConfig) -> None:
        """Put another image in the place of one; its users go on with the old one.

        Raises `NydusError`; the old image is then gone only when the new one could not be
        mounted although it could be opened.
        """
        with self._changing():
            entry = self._table.get(path)
            if entry is None:
                raise TableError("object or filesystem doesn't exist", path=path)
            if entry.image is None or entry.bind is not None:
                raise TableError("filesystem type mismatch, expect RAFS", path=path)
            directory = entry.image.mountpoint
            # Opened before the old one goes: what is broken shows here.
            ServedImage(config, bootstrap, directory).close()
            with self._nest.replacing(path, self._look(bootstrap, config)):
                self.runtime.unmount(entry.image)
                del self._table[path]
                self._serve_image(config, bootstrap, directory, ImageOptions(path=path))

    def unmount(self, path: str) -> None:
        """Take a mount away; its users are served on. Raise `TableError`."""
        with self._changing():
            entry = self._table.pop(path, None)
            if entry is None:
                raise TableError("object or filesystem doesn't exist", path=path)
            self._take_away(entry)

    def _take_away(self, entry: Entry) -> None:
        with self._nest.leaving(entry.path):
            if entry.bind is not None:
                entry.bind.unmount()
                if self._link is not None and entry.key:
                    self._link.drop(entry.key)
            if entry.image is not None:
                self.runtime.unmount(entry.image)

    def set_credentials(self, credentials: Credentials) -> None:
        """Use other credentials for all images that are mounted now; see `_changing`."""
        with self._changing() as runtime:
            for entry in self._table.values():
                if entry.image is not None:
                    runtime.set_credentials(entry.image, credentials)
        self.credentials_replaced = True

    def _unmount_all(self) -> None:
        # The image that others hang on comes last, and its counters can be read afterwards.
        for path in [path for path in self._table if path != ROOT]:
            self.unmount(path)
        if ROOT in self._table:
            with self._changing():
                self._take_away(self._table[ROOT])


def _clear_dead(top: Path) -> None:
    """Unmount what is left of a killed daemon that served FUSE, which nobody can go on with."""
    try:
        # What stat tells the kernel may still know.
        os.statvfs(top)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            # Imported here: most daemons never need it.
            from fscache.channel.fuse import clear_dead

            clear_dead(top)
