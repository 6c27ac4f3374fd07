"""Read a tar, plain or gzip, from a file, FIFO or pipe into a tree (spec rafs-v6 3.8).

Where the real tool is wrong we do the right thing: entries without their parent
directories land where they belong, and FIFOs need no device numbers.
"""

from __future__ import annotations

import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from builder.errors import BuildError
from builder.source.options import ContentSink, SourceOptions
from builder.tarstream import ByteStream, TarMember, TarStream
from erofs import Node, error_context
from erofs.layout import encode_device_number
from erofs.tree import iter_names, split_xattr_name

__all__ = ["load_tar", "open_tar", "source_name"]

_GZIP_MAGIC = b"\x1f\x8b"
_BUFFER_BYTES = 1 << 20
# eStargz keeps these in the root for itself.
_SKIPPED = frozenset({b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"})
_DEVICE_KINDS = frozenset({stat.S_IFCHR, stat.S_IFBLK})


@contextmanager
def open_tar(source: Path | BinaryIO) -> Iterator[io.BufferedIOBase]:
    """Open a tar for reading forward, unpacking gzip when the first bytes say so.

    Raises:
        BuildError: the source cannot be read, or is not a file, FIFO or character device.
    """
    name = source_name(source)
    try:
        with ExitStack() as stack:
            raw = source
            if isinstance(raw, Path):
                mode = raw.stat().st_mode
                if stat.S_ISDIR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
                    raise BuildError("must be a regular file, FIFO or character device", path=name)
                raw = stack.enter_context(raw.open("rb", buffering=0))
            buffered = io.BufferedReader(cast(io.RawIOBase, raw), _BUFFER_BYTES)
            if not isinstance(source, Path):
                # What was handed in stays open when the wrapper goes.
                stack.callback(buffered.detach)
            if buffered.peek(2)[:2] == _GZIP_MAGIC:
                yield stack.enter_context(gzip.GzipFile(fileobj=buffered))
            else:
                yield buffered
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BuildError(f"broken gzip data ({error})", path=name) from error
    except OSError as error:
        raise BuildError(f"cannot be read ({error.strerror})", path=name) from error


def source_name(source: Path | BinaryIO) -> str:
    """Return what to call a source in messages."""
    return str(source if isinstance(source, Path) else getattr(source, "name", "input"))


class _Attributes(NamedTuple):
    """What a hard link's own header says; the last visited name of an inode wins."""

    mode: int
    uid: int
    gid: int
    mtime: int
    mtime_nsec: int


class _Loader:
    def __init__(
        self, stream: TarStream, name: str, sink: ContentSink, options: SourceOptions
    ) -> None:
        self._stream = stream
        self._name = name
        self._sink = sink
        self._options = options
        self.root = Node.directory()
        # By full path, for every name of an inode that has more than one.
        self._linked: dict[bytes, _Attributes] = {}

    def load(self) -> Node:
        for member in self._stream:
            self._add(member)
        self._settle_links()
        return self.root

    def _error(self, what: str, member: TarMember) -> BuildError:
        return BuildError(what, path=self._name, entry=member.path, offset=member.offset)

    def _parts(self, path: bytes, member: TarMember) -> list[bytes]:
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        for part in parts:
            if part == b"..":
                raise self._error("path with a '..' component", member)
            if len(part) > 255 or b"\0" in part:
                raise self._error("path with an impossible component", member)
        return parts

    def _parent(self, parts: list[bytes], member: TarMember) -> Node:
        """Return the directory that holds the last part; missing ones are made."""
        directory = self.root
        for part in parts[:-1]:
            child = directory.entries.get(part)
            if child is None:
                child = directory.entries[part] = Node.directory()
            if not child.is_dir:
                raise self._error(f"parent {part!r} is not a directory", member)
            directory = child
        return directory

    def _attributes(self, member: TarMember) -> _Attributes:
        mtime, nsec = member.mtime, 0
        if self._options.pax_mtime and member.pax_mtime is not None:
            mtime, nsec = member.pax_mtime
        owner = (member.uid, member.gid) if self._options.keep_owners else (0, 0)
        return _Attributes(member.mode, *owner, mtime, nsec)

    def _add(self, member: TarMember) -> None:
        parts = self._parts(member.path, member)
        if not parts:
            if not stat.S_ISDIR(member.kind) or member.is_hardlink:
                raise self._error("the root is not a directory", member)
            self._apply(self.root, member)
            return
        if len(parts) == 1 and parts[0] in _SKIPPED:
            return
        directory = self._parent(parts, member)
        name = parts[-1]
        path = b"/" + b"/".join(parts)
        self._linked.pop(path, None)
        if member.is_hardlink:
            self._add_link(directory, name, path, member)
            return
        old = directory.entries.get(name)
        if old is not None and old.is_dir and stat.S_ISDIR(member.kind):
            self._apply(old, member)
            return
        node = Node(member.kind)
        if stat.S_ISDIR(member.kind):
            node.children = {}
        elif stat.S_ISLNK(member.kind):
            node.target = member.link
        elif member.kind in _DEVICE_KINDS:
            node.rdev = encode_device_number(member.major, member.minor)
        self._apply(node, member)
        directory.entries[name] = node
        if stat.S_ISREG(member.kind):
            node.size = member.size
            self._sink.add_file(node, self._stream)

    def _apply(self, node: Node, member: TarMember) -> None:
        self._set(node, self._attributes(member))
        with error_context(path=self._name, entry=member.path):
            for name in member.xattrs:
                split_xattr_name(name)
        node.xattrs = member.xattrs

    @staticmethod
    def _set(node: Node, attributes: _Attributes) -> None:
        node.mode = stat.S_IFMT(node.mode) | attributes.mode
        node.uid, node.gid = attributes.uid, attributes.gid
        node.mtime, node.mtime_nsec = attributes.mtime, attributes.mtime_nsec

    def _add_link(self, directory: Node, name: bytes, path: bytes, member: TarMember) -> None:
        target_parts = self._parts(member.link, member)
        node: Node | None = self.root
        for part in target_parts:
            node = node.children.get(part) if node is not None and node.children else None
        if node is None:
            raise self._error(f"hard link to {member.link!r}, which is not there", member)
        if not stat.S_ISREG(node.mode):
            raise self._error(f"hard link to {member.link!r}, which is not a regular file", member)
        target_path = b"/" + b"/".join(target_parts)
        own = _Attributes(stat.S_IMODE(node.mode), node.uid, node.gid, node.mtime, node.mtime_nsec)
        self._linked.setdefault(target_path, own)
        self._linked[path] = self._attributes(member)
        directory.entries[name] = node

    def _settle_links(self) -> None:
        """Give linked inodes the attributes of their last name in visiting order (spec 3.5)."""
        if not self._linked:
            return
        for directory, name, node in iter_names(self.root):
            attributes = self._linked.get(directory + b"/" + name)
            if attributes is not None:
                self._set(node, attributes)


def load_tar(stream: ByteStream, name: str, sink: ContentSink, options: SourceOptions) -> Node:
    """Read a whole tar from front to back.

    Whiteout entries of a single tar stay files, whatever the whiteout spec (spec 3.8).

    Raises:
        BuildError: names source, entry and offset.
    """
    return _Loader(TarStream(stream, name), name, sink, options).load()
