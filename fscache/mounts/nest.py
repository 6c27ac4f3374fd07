"""The directories below a daemon's mount point that mounts are made at, whatever is mounted there.

On a private tmpfs, and on a writable overlay, they are simply made. Over an image or a shared
directory they come with a `Cover`. When what is mounted at the mount point itself changes, all
mounts below are lifted off and laid down again.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from erofs.errors import NydusError
from fscache import kernel
from fscache.mounts.place import PlainMount, mounted_below
from fscache.mounts.skeleton import Cover, Look
from fscache.mounts.treepath import Names, PathError, split

__all__ = ["Nest"]

logger = logging.getLogger(__name__)


def _show(names: Names) -> str:
    return "/" + os.fsdecode(b"/".join(names))


class Nest:
    """Makes and removes directories below one mount point; not for several threads at once.

    Args:
        top: the mount point, an existing directory.
        mount_tmpfs: called to mount the private tmpfs at the top when directories are wanted
            and nothing else is there; may raise `MountError`.
    """

    def __init__(self, top: Path, mount_tmpfs: Callable[[], object]) -> None:
        self._top = top
        self._mount_tmpfs = mount_tmpfs
        self._paths: set[Names] = set()
        self._cover: Cover | None = None
        # st_dev of what directories can be made in, None when there is no such thing on top.
        self._open: int | None = None
        self._rests_on_tmpfs = False
        self._is_tmpfs = False
        # Directories that were made in what can be written to, which has others, too.
        self._made: set[Names] = set()

    # What is at the top

    def adopt(self, paths: Iterable[str]) -> None:
        """Know where a process that is gone has mounted something; the top may be among it."""
        self._paths = {names for names in map(split, paths) if names}

    def use(self, look: Look | None) -> None:
        """Make directories over what is mounted at the top now.

        Args:
            look: tells of the directories of something that is to be covered; None for
                something that they can be made in.
        """
        self._cover = Cover(self._top, look) if look is not None else None
        self._open = self._top.lstat().st_dev if look is None else None
        self._is_tmpfs = False

    def use_tmpfs(self) -> None:
        """Use the private tmpfs, which stays below whatever is mounted at the top later."""
        self.use(None)
        self._rests_on_tmpfs = self._is_tmpfs = True

    def _use_rest(self) -> None:
        """Go back to the tmpfs, or to nothing, after the top was unmounted."""
        self._cover, self._open = None, None
        if self._rests_on_tmpfs:
            self.use_tmpfs()

    # Directories

    @contextmanager
    def place(self, path: str, look: Look | None) -> Iterator[Path]:
        """Yield the directory for a mount; what was made for it goes when the body fails.

        Args:
            path: as a client gave it.
            look: tells of the directories of what is mounted; None when they can be made in it.

        Raises:
            PathError: the path cannot be had.
            MountError: from the kernel.
        """
        names = split(path)
        if not names:
            self._check(look)
            with self._lifted():
                yield self._top
                self.use(look)
            return
        self._require_room(names)
        directory = self._make(names)
        try:
            yield directory
        except BaseException:
            self._remove(names)
            raise

    @contextmanager
    def replacing(self, path: str, look: Look | None) -> Iterator[None]:
        """Have one mount replaced by another in the body; see `place`."""
        if split(path):
            yield
            return
        self._check(look)
        with self._lifted():
            before = self._top.lstat().st_dev
            try:
                yield
                self.use(look)
            except BaseException:
                if self._top.lstat().st_dev != before:
                    self._use_rest()
                raise

    @contextmanager
    def leaving(self, path: str) -> Iterator[None]:
        """Remove the directory of a mount after the body has unmounted it."""
        names = split(path)
        if names:
            yield
            self._remove(names)
            return
        with self._lifted():
            yield
            self._use_rest()

    def _check(self, look: Look | None) -> None:
        """Refuse a top in which the mounts of now cannot be, before anything is changed."""
        for names in self._paths:
            if look is not None:
                look(names)

    def _require_room(self, names: Names) -> None:
        for other in self._paths:
            depth = min(len(names), len(other))
            if names[:depth] == other[:depth]:
                where = "in" if len(other) < len(names) else "above"
                raise PathError(f"mount point is {where} that of {_show(other)}", path=_show(names))

    def _make(self, names: Names) -> Path:
        if self._cover is not None:
            self._cover.change(self._paths | {names})
        else:
            if self._open is None:
                self._mount_tmpfs()
                self.use_tmpfs()
            self._make_directory(names)
        self._paths.add(names)
        return self._directory(names)

    def _directory(self, names: Names) -> Path:
        return self._top.joinpath(*map(os.fsdecode, names))

    def _make_directory(self, names: Names) -> None:
        if self._top.lstat().st_dev != self._open:
            raise PathError("something else is mounted over it", path=self._top)
        for depth in range(1, len(names) + 1):
            try:
                self._directory(names[:depth]).mkdir()
                self._made.add(names[:depth])
            except FileExistsError as error:
                # A link of an image must not lead to a directory of the host.
                if not stat.S_ISDIR(self._directory(names[:depth]).lstat().st_mode):
                    text = "a part of the mount point is no directory"
                    raise PathError(text, path=_show(names)) from error
            except OSError as error:
                self._remove_directories(names)
                raise PathError(
                    f"mount point cannot be made ({error.strerror})", path=_show(names)
                ) from error

    def _remove(self, names: Names) -> None:
        """Remove a directory; what is in the way of that is only worth a line in the log."""
        self._paths.discard(names)
        if self._cover is not None:
            try:
                self._cover.change(self._paths)
            except NydusError as error:
                logger.error("the directory %s stays: %s", _show(names), error)
        else:
            self._remove_directories(names)

    def _remove_directories(self, names: Names) -> None:
        for depth in range(len(names), 0, -1):
            try:
                if names[:depth] in self._made or self._is_tmpfs:
                    self._directory(names[:depth]).rmdir()
            except OSError:
                # Another mount is below, or somebody sits in it.
                return
            self._made.discard(names[:depth])

    # Changes of the top

    @contextmanager
    def _lifted(self) -> Iterator[None]:
        """Take all mounts below off, and lay them down on what is at the top after the body."""
        with ExitStack() as stack:
            clones = {}
            # A directory that somebody has unmounted would be cloned with all around it.
            for names in self._paths.intersection(mounted_below(self._top)):
                clones[names] = kernel.open_tree(self._directory(names), recursive=True)
                stack.callback(os.close, clones[names])
            self._clear()
            try:
                yield
            finally:
                self._lay(clones)

    def _clear(self) -> None:
        if self._cover is not None:
            self._cover.remove()
        else:
            for names in self._paths:
                PlainMount(self._directory(names)).unmount()
                self._remove_directories(names)
        self._paths = set()

    def _lay(self, clones: dict[Names, int]) -> None:
        for names, clone in clones.items():
            try:
                kernel.move_mount(clone, self._make(names))
            except (NydusError, OSError) as error:
                logger.error("%s cannot be mounted again: %s", _show(names), error)
