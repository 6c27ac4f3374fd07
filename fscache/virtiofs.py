"""`nydusd virtiofs`: a node's tree of mounts for one virtual machine, by way of virtiofsd.

The tree is private: this process, and virtiofsd with it, live in a mount namespace of their own,
which ends with them, however they end. Mounts of the API appear in the guest as directories.
Source: spec vm-runtimes 2.5.
"""

from __future__ import annotations

import errno
import logging
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from erofs.errors import NydusError
from fscache import kernel
from fscache.config import DaemonConfig
from fscache.entry import NodeOptions, TableError
from fscache.image import ROOT
from fscache.lifecycle import State
from fscache.mounts.treepath import split
from fscache.node import NodeDaemon
from fscache.unixsocket import listen

__all__ = ["VirtiofsDaemon", "VirtiofsError", "enter_private_tree", "find_virtiofsd"]

logger = logging.getLogger(__name__)

# Debian 12 and QEMU's own; distributions that package the one in Rust.
_DIRECTORIES = ("/usr/libexec", "/usr/lib/qemu", "/usr/lib/virtiofsd", "/usr/lib")
# Not `announce_submounts`: Kata's agent names the root of an image as an overlay's lower directory,
# for which the guest's kernel would not mount a submount, and the overlay would be refused.
_OPTIONS = (
    # Not a namespace: what is mounted later has to be there, too.
    "sandbox=chroot",
    "cache=auto",
    # The upper directory of the guest's overlay has attributes of `trusted.`.
    "xattr",
    "modcaps=+sys_admin",
)
_END_SECONDS = 5.0


class VirtiofsError(NydusError):
    """No virtiofsd, no private tree, or a virtiofsd that ended by itself."""


def find_virtiofsd() -> Path:
    """Return the system's virtiofsd; raise `VirtiofsError`."""
    for place in (None, *_DIRECTORIES):
        found = shutil.which("virtiofsd", path=place)
        if found is not None:
            return Path(found)
    raise VirtiofsError(
        "virtiofsd is not installed (Debian: apt-get install virtiofsd, on Debian 12"
        " qemu-system-common)"
    )


def enter_private_tree(tree: Path) -> None:
    """Move this process to a mount namespace of its own, in which `tree` is a directory.

    Before there are other threads. What others mount and unmount is still seen where their mounts
    are shared; nobody sees what is mounted here.

    Raises:
        VirtiofsError: not root, or the kernel refuses.
    """
    try:
        tree.mkdir(mode=0o700, parents=True, exist_ok=True)
        kernel.unshare_mounts()
        kernel.make_slaves(Path("/"))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise VirtiofsError("mounting images for a virtual machine needs root") from error
        raise VirtiofsError(
            f"no mount namespace of its own ({error.strerror})", path=tree
        ) from error


class _Export:
    """A socket, and the virtiofsd that serves it; that one ends with its only client.

    Args:
        path: of the socket; a stale one is replaced.

    Raises:
        VirtiofsError: the socket cannot be made, or a program is missing.
    """

    def __init__(self, path: Path) -> None:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise VirtiofsError("setpriv is not installed (Debian: util-linux)")
        # Whoever kills this process ends virtiofsd, too: it must not read what nobody fills.
        self._words = [setpriv, "--pdeathsig", "KILL", str(find_virtiofsd())]
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._listener = listen(path)
        except OSError as error:
            # A path that is too long has no errno.
            text = error.strerror or str(error)
            raise VirtiofsError(f"no socket can be made ({text})", path=path) from error

    def start(self, tree: Path, ended: Callable[[], None]) -> None:
        """Start virtiofsd over a tree; call `ended` when it is gone; raise `VirtiofsError`."""
        options = [word for name in (f"source={tree}", *_OPTIONS) for word in ("-o", name)]
        try:
            self._process = process = subprocess.Popen(
                [*self._words, f"--fd={self._listener.fileno()}", *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(self._listener.fileno(),),
                # Ctrl-C is for this process, which ends the other one in its turn.
                process_group=0,
            )
        except OSError as error:
            raise VirtiofsError(f"virtiofsd cannot be started ({error.strerror})") from error
        # From now on a client that is too late finds nobody, instead of waiting.
        self._listener.close()

        def watch() -> None:
            process.wait()
            ended()

        threading.Thread(target=watch, name="virtiofsd", daemon=True).start()

    def check(self) -> None:
        """Raise `VirtiofsError` when virtiofsd has failed by itself."""
        status = self._process.poll() if self._process is not None else None
        if status:
            raise VirtiofsError(f"virtiofsd has ended with status {status}")

    def close(self) -> None:
        """End virtiofsd and remove the socket."""
        self._listener.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._path.unlink(missing_ok=True)


class VirtiofsDaemon(NodeDaemon):
    """Serves images and directories to one guest; see `NodeDaemon`.

    The root of the tree stays what it is from the start: virtiofsd sits in it.

    Args:
        options: the mount point is that of `enter_private_tree`.
        sock: where the virtual machine's monitor connects.
    """

    def __init__(self, options: NodeOptions, sock: Path) -> None:
        super().__init__(options)
        self._sock = sock
        self._export: _Export | None = None

    @property
    def summary(self) -> str:
        """One line for people; waits for no lock of the table."""
        return f"{super().summary}, exported at {self._sock}"

    def start(self) -> None:
        """Mount what there is at the beginning and export it; raise `NydusError`."""
        # First of all: clients connect as soon as the API says that the daemon runs.
        self._export = export = _Export(self._sock)
        try:
            super().start()
            export.start(self.options.mountpoint, self.request_stop)
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        """Block until somebody asks for a stop, or the guest has gone.

        Raises:
            VirtiofsError: virtiofsd has failed.
        """
        super().wait()
        if self._export is not None:
            self._export.check()

    def stop(self) -> None:
        """End the export, which is the user of all mounts, then these."""
        export, self._export = self._export, None
        if export is not None:
            export.close()
        super().stop()

    # The table

    def _require_seen(self, path: str) -> None:
        if self.state is State.RUNNING and (not split(path) or ROOT in self._table):
            text = "the guest would not see a change at, or over, the root of its tree"
            raise TableError(text, path=path)

    def mount_image(self, path: str, bootstrap: Path, config: DaemonConfig) -> None:
        """Mount an image; see `NodeDaemon`."""
        self._require_seen(path)
        super().mount_image(path, bootstrap, config)

    def remount_image(self, path: str, bootstrap: Path, config: DaemonConfig) -> None:
        """Put another image in the place of one; see `NodeDaemon`."""
        self._require_seen(path)
        super().remount_image(path, bootstrap, config)

    def mount_directory(self, path: str, source: Path) -> None:
        """Pass a directory through; see `NodeDaemon`."""
        self._require_seen(path)
        super().mount_directory(path, source)

    def unmount(self, path: str) -> None:
        """Take a mount away; see `NodeDaemon`."""
        if self._export is not None:
            self._require_seen(path)
        super().unmount(path)
