"""Read a directory of this machine into a tree (spec rafs-v6 3.8)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from builder.errors import BuildError
from builder.source.options import ContentSink, SourceOptions, WhiteoutSpec
from erofs import Node, error_context
from erofs.layout import encode_device_number
from erofs.tree import iter_names, split_xattr_name

__all__ = ["ScannedDirectory"]

_WHITEOUT_PREFIX = b".wh."


def _failed(what: str, path: bytes, error: OSError) -> BuildError:
    return BuildError(f"{what} ({error.strerror})", path=os.fsdecode(path))


class _FileContent:
    """The content of an open file."""

    def __init__(self, path: bytes, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def read(self, length: int, /) -> bytes:
        parts = []
        rest = length
        while rest:
            try:
                part = os.read(self._descriptor, rest)
            except OSError as error:
                raise _failed("cannot be read", self._path, error) from error
            if not part:
                raise BuildError("file shrank while it was read", path=os.fsdecode(self._path))
            parts.append(part)
            rest -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _add_content(path: bytes, node: Node, sink: ContentSink) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise _failed("cannot be opened", path, error) from error
    try:
        sink.add_file(node, _FileContent(path, descriptor))
    finally:
        os.close(descriptor)


class _Scanner:
    """Builds the tree and remembers where each regular file's content is."""

    def __init__(self, top: bytes, options: SourceOptions, lowest: bool) -> None:
        self._top = top
        self._options = options
        self._lowest = lowest
        self.entries = 0
        self._inodes: dict[tuple[int, int], Node] = {}
        self.paths: dict[int, bytes] = {}

    def scan(self) -> Node:
        try:
            root = self._node(self._top, os.lstat(self._top))
        except OSError as error:
            raise _failed("cannot be read", self._top, error) from error
        # The time of the folder that happens to hold the source is nobody's (spec 3.8).
        root.mtime = root.mtime_nsec = 0
        stack = [(self._top, root)]
        while stack:
            path, directory = stack.pop()
            for name, child_path, child in self._children(path):
                directory.entries[name] = child
                if child.is_dir:
                    stack.append((child_path, child))
        return root

    def _children(self, path: bytes) -> Iterable[tuple[bytes, bytes, Node]]:
        try:
            with os.scandir(path) as entries:
                found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        except OSError as error:
            raise _failed("cannot be listed", path, error) from error
        self.entries += len(found)
        for name, status in found:
            if not self._is_whiteout(name, status):
                child_path = path + b"/" + name
                yield name, child_path, self._node(child_path, status)

    def _is_whiteout(self, name: bytes, status: os.stat_result) -> bool:
        """Tell whether the entry only deletes something, while there is no layer below."""
        if not self._lowest:
            return False
        if self._options.whiteout_spec is WhiteoutSpec.OCI:
            return name.startswith(_WHITEOUT_PREFIX)
        if self._options.whiteout_spec is WhiteoutSpec.OVERLAYFS:
            return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
        return False

    def _node(self, path: bytes, status: os.stat_result) -> Node:
        is_regular = stat.S_ISREG(status.st_mode)
        identity = (status.st_dev, status.st_ino)
        if is_regular and status.st_nlink > 1:
            known = self._inodes.get(identity)
            if known is not None:
                return known
        seconds, nsec = divmod(status.st_mtime_ns, 1_000_000_000)
        keep = self._options.keep_owners
        node = Node(
            mode=status.st_mode,
            uid=status.st_uid if keep else 0,
            gid=status.st_gid if keep else 0,
            mtime=seconds,
            mtime_nsec=nsec,
            rdev=encode_device_number(os.major(status.st_rdev), os.minor(status.st_rdev)),
            xattrs=self._xattrs(path),
            children={} if stat.S_ISDIR(status.st_mode) else None,
        )
        if is_regular:
            node.size = status.st_size
            self._inodes[identity] = node
            self.paths[id(node)] = path
        elif stat.S_ISLNK(status.st_mode):
            try:
                node.target = os.readlink(path)
            except OSError as error:
                raise _failed("cannot be read", path, error) from error
        return node

    def _xattrs(self, path: bytes) -> dict[bytes, bytes]:
        try:
            names = os.listxattr(path, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return {}
            raise _failed("xattrs cannot be listed", path, error) from error
        found = {}
        for text in names:
            name = os.fsencode(text)
            with error_context(path=os.fsdecode(path)):
                split_xattr_name(name)
            try:
                found[name] = os.getxattr(path, name, follow_symlinks=False)
            except OSError as error:
                raise _failed(f"xattr {text} cannot be read", path, error) from error
        return found


class ScannedDirectory:
    """A directory whose names and attributes are read; the content still is to come.

    `root` is its tree, complete but for the chunks of regular files; `entries` counts all that
    was found, deletion marks too.

    Args:
        source: the directory.
        options: what to take of it.
        lowest: there is no layer below, so what deletes something there is left out.

    Raises:
        BuildError: from both steps; names the path that cannot be read, or that changed.
    """

    def __init__(self, source: Path, options: SourceOptions, *, lowest: bool = True) -> None:
        if not source.is_dir():
            raise BuildError("specified path must be a directory", path=source)
        scanner = _Scanner(os.fsencode(source), options, lowest)
        self.root = scanner.scan()
        self.entries = scanner.entries
        self._paths = scanner.paths

    def feed(self, sink: ContentSink, first: Sequence[Node] = ()) -> None:
        """Hand out the content: files of `first`, then the rest in visiting order (spec 3.1)."""
        done: set[int] = set()
        for node in (*first, *(node for _, _, node in iter_names(self.root))):
            path = self._paths.get(id(node))
            if path is None or id(node) in done:
                continue
            done.add(id(node))
            if node.size:
                _add_content(path, node, sink)
