"""Read a tar into a tree (spec rafs-v6 3.8).

Where the real tool is wrong we do the right thing: entries without their parent directories
land where they belong, those below a symlink where it leads, hard links may come before what
they link to, and FIFOs need no device numbers.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from typing import NamedTuple

from builder.errors import BuildError
from builder.source.options import ContentSink, SourceOptions
from builder.tarstream import ByteStream, TarMember, TarStream
from erofs import Node, NydusError, error_context
from erofs.layout import NAME_MAX, encode_device_number
from erofs.tree import iter_names, split_xattr_name

__all__ = ["TreeLoader", "load_tar"]

# eStargz keeps these in the root for itself.
_SKIPPED = frozenset({b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"})
_DEVICE_KINDS = frozenset({stat.S_IFCHR, stat.S_IFBLK})
_NO_NAMES = frozenset({b"", b".", b".."})
# As the kernel counts them.
_MAX_SYMLINKS = 40

_Parts = tuple[bytes, ...]


class _Missing(BuildError):
    """A directory that is not there, on a way where none is made."""


class _Attributes(NamedTuple):
    """What a hard link's own header says; the last visited name of an inode wins."""

    mode: int
    uid: int
    gid: int
    mtime: int
    mtime_nsec: int


class _Place(NamedTuple):
    """Where a member belongs: its directory, its name, and the directory without symlinks."""

    directory: Node
    name: bytes
    parents: _Parts

    @property
    def path(self) -> _Parts:
        """The path without symlinks."""
        return (*self.parents, self.name)


class TreeLoader:
    """Puts members into a tree, one after the other; `finish` when there are no more.

    Args:
        name: of the source.
        options: what to take from it.
        in_place: the image will refer to the tar, which cannot be done for sparse files.
    """

    def __init__(self, name: str, options: SourceOptions, *, in_place: bool = False) -> None:
        self._name = name
        self._options = options
        self._in_place = in_place
        self.root = Node.directory()
        # By path, for every name of an inode that has more than one.
        self._linked: dict[_Parts, _Attributes] = {}
        # Hard links to what has not come yet.
        self._waiting: dict[_Parts, TarMember] = {}
        # Directories that no member described so far, by what they are.
        self._undescribed: dict[int, _Parts] = {id(self.root): ()}
        # Where the last member was put, for its neighbours: the path of their directory as
        # members say it, the directory, and its path without symlinks.
        self._last: tuple[bytes, Node, _Parts] | None = None

    def add(self, member: TarMember) -> Node | None:
        """Add a member, and return the file whose content is to be taken, if it is one.

        Raises:
            BuildError, FormatError: names source, entry and offset.
        """
        try:
            return self._add(member)
        except NydusError as error:
            error.add_context(path=self._name, entry=member.path, offset=member.offset)
            raise

    def finish(self) -> Node:
        """Return the root of the complete tree; raise `BuildError`."""
        self._link_waiting()
        self._settle_links()
        if self._options.undescribed is not None:
            self._options.undescribed.extend(map(b"/".join, self._undescribed.values()))
        return self.root

    def _parts(self, path: bytes) -> _Parts:
        parts = tuple(part for part in path.split(b"/") if part not in (b"", b"."))
        for part in parts:
            if part == b"..":
                raise BuildError("path with a '..' component")
            if len(part) > NAME_MAX or b"\0" in part:
                raise BuildError("path with an impossible component")
        return parts

    def _beside_last(self, path: bytes) -> _Place | None:
        """Return where a path leads that is in the same directory as the one before it."""
        if self._last is None:
            return None
        above, _, name = path.rpartition(b"/")
        known, directory, parents = self._last
        if above != known or not parents or name in _NO_NAMES:
            return None
        if len(name) > NAME_MAX or b"\0" in name:
            return None
        return _Place(directory, name, parents)

    def _place(self, parts: _Parts, path: bytes = b"") -> _Place:
        """Return where a path leads; directories that are missing on the way are made.

        `path` is how a member says it, if its neighbours are to be found by that.
        """
        directory, parents = self._walk(parts[:-1], make=True)
        above, _, name = path.rpartition(b"/")
        # A slash at the end, or a dot, is no name.
        self._last = (above, directory, parents) if name == parts[-1] else None
        return _Place(directory, parts[-1], parents)

    def _walk(self, parts: Sequence[bytes], *, make: bool) -> tuple[Node, _Parts]:
        """Return the directory at a path, and its path without symlinks.

        Directories of the path that are missing are made, but not those of symlinks.

        Raises:
            _Missing: there is no such directory.
            BuildError: something on the way is no directory.
        """
        path: list[tuple[bytes, Node]] = []
        rest = [(part, make) for part in reversed(parts)]
        links = 0
        while rest:
            directory = path[-1][1] if path else self.root
            part, make_it = rest.pop()
            if part == b"..":
                del path[-1:]
                continue
            child = directory.entries.get(part)
            if child is None and make_it:
                child = directory.entries[part] = Node.directory()
                self._undescribed[id(child)] = (*(name for name, _ in path), part)
            if child is None:
                raise _Missing("parent is a symlink to nowhere", got=part)
            if child.target:
                links += 1
                if links > _MAX_SYMLINKS:
                    raise BuildError("parent is a loop of symlinks", got=part)
                if child.target.startswith(b"/"):
                    path.clear()
                steps = reversed(child.target.split(b"/"))
                rest += [(step, False) for step in steps if step not in (b"", b".")]
            elif child.is_dir:
                path.append((part, child))
            else:
                raise BuildError("parent is not a directory", got=part)
        return path[-1][1] if path else self.root, tuple(name for name, _ in path)

    def _attributes(self, member: TarMember) -> _Attributes:
        mtime, nsec = member.mtime, 0
        if self._options.pax_mtime and member.pax_mtime is not None:
            mtime, nsec = member.pax_mtime
        owner = (member.uid, member.gid) if self._options.keep_owners else (0, 0)
        return _Attributes(member.mode, *owner, mtime, nsec)

    def _add(self, member: TarMember) -> Node | None:
        place = self._beside_last(member.path)
        if place is None:
            parts = self._parts(member.path)
            if not parts:
                if not stat.S_ISDIR(member.kind) or member.is_hardlink:
                    raise BuildError("the root is not a directory")
                self._apply(self.root, member)
                return None
            if len(parts) == 1 and parts[0] in _SKIPPED:
                return None
            place = self._place(parts, member.path)
        if self._linked or self._waiting:
            self._linked.pop(place.path, None)
            self._waiting.pop(place.path, None)
        if not member.is_hardlink:
            return self._add_node(place, member)
        if not self._add_link(place, member):
            self._put(place, None)
            self._waiting[place.path] = member
        return None

    def _put(self, place: _Place, node: Node | None) -> None:
        """Put a node into a directory, in place of what has that name; None for nothing."""
        entries = place.directory.entries
        if place.name in entries:
            # It may have been on the way to where the last member was put.
            self._last = None
        if node is None:
            entries.pop(place.name, None)
        else:
            entries[place.name] = node

    def _add_node(self, place: _Place, member: TarMember) -> Node | None:
        old = place.directory.entries.get(place.name)
        if old is not None and old.is_dir and stat.S_ISDIR(member.kind):
            self._apply(old, member)
            return None
        kind = member.kind
        node = Node(kind)
        self._apply(node, member)
        self._put(place, node)
        if kind != stat.S_IFREG:
            if kind == stat.S_IFDIR:
                node.children = {}
            elif kind == stat.S_IFLNK:
                node.target = member.link
            elif kind in _DEVICE_KINDS:
                node.rdev = encode_device_number(member.major, member.minor)
            return None
        if member.sparse is not None and self._in_place:
            raise BuildError("sparse file, whose content is not in the tar as it is")
        node.size = member.size
        return node

    def _apply(self, node: Node, member: TarMember) -> None:
        self._undescribed.pop(id(node), None)
        self._set(node, self._attributes(member))
        if member.xattrs:
            for name in member.xattrs:
                split_xattr_name(name)
        node.xattrs = member.xattrs

    @staticmethod
    def _set(node: Node, attributes: _Attributes) -> None:
        mode, node.uid, node.gid, node.mtime, node.mtime_nsec = attributes
        node.mode = stat.S_IFMT(node.mode) | mode

    def _add_link(self, place: _Place, member: TarMember) -> bool:
        """Add a hard link; return False when what it links to is not there."""
        found = self._find(self._parts(member.link))
        if found is None:
            return False
        node, target = found
        if node.is_dir:
            raise BuildError(f"hard link to {member.link!r}, which is a directory")
        if not stat.S_ISREG(node.mode):
            # Only regular files share an inode in RAFS (spec 3.5).
            node = Node(node.mode, rdev=node.rdev, target=node.target, xattrs=dict(node.xattrs))
            self._set(node, self._attributes(member))
        elif target != place.path:
            own = _Attributes(
                stat.S_IMODE(node.mode), node.uid, node.gid, node.mtime, node.mtime_nsec
            )
            self._linked.setdefault(target, own)
            self._linked[place.path] = self._attributes(member)
        self._put(place, node)
        return True

    def _find(self, parts: _Parts) -> tuple[Node, _Parts] | None:
        """Return what is at a path, and its path without symlinks; None when it is not there."""
        if not parts:
            return self.root, ()
        try:
            directory, path = self._walk(parts[:-1], make=False)
        except _Missing:
            return None
        node = directory.entries.get(parts[-1])
        return None if node is None else (node, (*path, parts[-1]))

    def _link_waiting(self) -> None:
        """Add the hard links that came before what they link to, which may be links, too."""
        progress = True
        while progress and self._waiting:
            progress = False
            for path, member in list(self._waiting.items()):
                with error_context(path=self._name, entry=member.path, offset=member.offset):
                    place = self._place(path)
                    if self._add_link(place, member):
                        progress = True
                        del self._waiting[path]
        for member in self._waiting.values():
            raise BuildError(
                f"hard link to {member.link!r}, which is not there",
                path=self._name,
                entry=member.path,
                offset=member.offset,
            )

    def _settle_links(self) -> None:
        """Give linked inodes the attributes of their last name in visiting order (spec 3.5)."""
        if not self._linked:
            return
        for directory, name, node in iter_names(self.root):
            path = tuple((directory + b"/" + name).split(b"/")[1:])
            attributes = self._linked.get(path)
            if attributes is not None:
                self._set(node, attributes)


def load_tar(
    stream: ByteStream,
    name: str,
    sink: ContentSink,
    options: SourceOptions,
    *,
    in_place: bool = False,
    seek: Callable[[int], object] | None = None,
    length: int = 0,
) -> Node:
    """Read a whole tar from front to back.

    Whiteout entries of a single tar stay files, whatever the whiteout spec (spec 3.8).

    Args:
        stream: the tar.
        name: what to call it.
        sink: takes the content of files.
        options: what to take from it.
        in_place: as for `TreeLoader`.
        seek, length: as for `TarStream`.

    Raises:
        BuildError: names source, entry and offset.
    """
    loader = TreeLoader(name, options, in_place=in_place)
    members = TarStream(stream, name, seek, length)
    for member in members:
        file = loader.add(member)
        if file is not None:
            sink.add_file(file, members)
    return loader.finish()
