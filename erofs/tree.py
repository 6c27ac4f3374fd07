"""The filesystem tree in memory: nodes, chunks, and the gate that the writer stands behind.

Only a tree that `validate` has seen reaches the writer, which therefore has no error
paths for bad input.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from erofs import layout
from erofs.base import NO_XATTRS
from erofs.errors import CorruptStructure
from erofs.rafs import MAX_CHUNKS_PER_BLOB, BlobEntry, ChunkInfo
from erofs.view import align_up

__all__ = [
    "Chunk",
    "Node",
    "ValidDirectory",
    "ValidTree",
    "iter_directories",
    "iter_names",
    "split_xattr_name",
    "validate",
]

_I_SIZE_MAX = (1 << 63) - 1
_KIND_MASK = stat.S_IFMT(0xFFFF)
_BLKADDR_MAX = 0xFFFFFFFE
# i_xattr_icount is 16 bits wide and counts units of 4 bytes, plus one.
_XATTRS_MAX = 4 * 0xFFFE
# Device slots place blobs by 32-bit block numbers, behind the bootstrap, each aligned.
_DEVICE_BLOCKS_MAX = (1 << 32) - (1 << 20)
_DEVICE_ALIGNMENT = 0x80000
_RESERVED_NAMES = frozenset((b".", b".."))


class Chunk:
    """One distinct chunk of a blob; every file that holds it shares the object.

    Offsets and sizes are in bytes; `blob_index` is the place in the blob table and
    `chunk_index` the place in that blob's compression table.
    """

    __slots__ = (
        "blob_index", "chunk_index", "compressed_offset", "compressed_size", "crc32c", "digest",
        "file_offset", "flags", "uncompressed_offset", "uncompressed_size",
    )  # fmt: skip

    def __init__(
        self, digest: bytes, blob_index: int, flags: int, compressed_size: int,
        uncompressed_size: int, compressed_offset: int, uncompressed_offset: int,
        file_offset: int, chunk_index: int, crc32c: int,
    ) -> None:  # fmt: skip
        self.digest = digest
        self.blob_index = blob_index
        self.flags = flags
        self.compressed_size = compressed_size
        self.uncompressed_size = uncompressed_size
        self.compressed_offset = compressed_offset
        self.uncompressed_offset = uncompressed_offset
        self.file_offset = file_offset
        self.chunk_index = chunk_index
        self.crc32c = crc32c

    @classmethod
    def from_info(cls, info: ChunkInfo) -> Chunk:
        """Make the mutable twin of a chunk table entry."""
        return cls(*info)

    def info(self) -> ChunkInfo:
        """Return the chunk table entry."""
        return ChunkInfo(
            self.digest,
            self.blob_index,
            self.flags,
            self.compressed_size,
            self.uncompressed_size,
            self.compressed_offset,
            self.uncompressed_offset,
            self.file_offset,
            self.chunk_index,
            self.crc32c,
        )


class Node:
    """A file of any type. Hard links are one node under several names.

    `mode` is the whole st_mode, `rdev` in Linux' "new" encoding, `mtime` in signed
    seconds, `children` is a dictionary for directories and None for all else. `number` is the
    writer's: in place of a dictionary of all nodes, which takes a hundred bytes each.
    """

    __slots__ = (
        "children", "chunks", "gid", "mode", "mtime", "mtime_nsec", "number", "rdev", "size",
        "target", "uid", "xattrs",
    )  # fmt: skip

    def __init__(
        self, mode: int, uid: int = 0, gid: int = 0, mtime: int = 0, mtime_nsec: int = 0,
        rdev: int = 0, size: int = 0, target: bytes = b"",
        xattrs: Mapping[bytes, bytes] = NO_XATTRS, chunks: list[Chunk] | None = None,
        children: dict[bytes, Node] | None = None,
    ) -> None:  # fmt: skip
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime = mtime
        self.mtime_nsec = mtime_nsec
        self.rdev = rdev
        self.size = size
        self.target = target
        self.xattrs = xattrs
        self.chunks = [] if chunks is None else chunks
        self.children = children
        self.number = -1

    def copy(self) -> Node:
        """Return a node like this one, without chunks, and of a directory without children."""
        children: dict[bytes, Node] | None = None if self.children is None else {}
        return Node(
            self.mode, self.uid, self.gid, self.mtime, self.mtime_nsec, self.rdev, self.size,
            self.target, self.xattrs, None, children,
        )  # fmt: skip

    @classmethod
    def directory(cls, permissions: int = 0o755) -> Node:
        """Make an empty directory, owner 0/0, mtime 0."""
        return cls(stat.S_IFDIR | permissions, children={})

    @property
    def is_dir(self) -> bool:
        """Whether the node is a directory."""
        return self.children is not None

    @property
    def entries(self) -> dict[bytes, Node]:
        """The children of a directory."""
        if self.children is None:
            raise CorruptStructure("not a directory")
        return self.children


class ValidDirectory(NamedTuple):
    """A directory, the one that it is in (the root in itself), and its names in order."""

    node: Node
    parent: Node
    names: list[bytes]


class ValidTree(NamedTuple):
    """A tree that fits the format, with what validation counted.

    `directories` are in visiting order.
    """

    root: Node
    names: int
    has_xattr: bool
    directories: list[ValidDirectory]


class _Limits(NamedTuple):
    """What the image as a whole permits its files; sizes in bytes."""

    chunk_size: int
    blobs: int
    block_size: int
    is_dictionary: bool


def iter_directories(root: Node) -> Iterator[tuple[bytes, ValidDirectory]]:
    """Yield each directory with its path in the visiting order of spec rafs-v6 3.1.

    The root comes first, with an empty path. What is in a directory is looked at when it is
    yielded, and its child directories are visited after that.
    """
    stack = [(b"", root, root)]
    while stack:
        path, directory, parent = stack.pop()
        children = directory.entries
        names = sorted(children)
        yield path, ValidDirectory(directory, parent, names)
        stack += [
            (path + b"/" + name, children[name], directory)
            for name in reversed(names)
            if children[name].children is not None
        ]


def iter_names(root: Node) -> Iterator[tuple[bytes, bytes, Node]]:
    """Yield (directory path, name, node) in the visiting order of spec rafs-v6 3.1.

    Children of a directory come in name order, then each child directory is visited.
    The root is yielded first, with an empty path and name.
    """
    yield b"", b"", root
    for path, (directory, _, names) in iter_directories(root):
        children = directory.entries
        for name in names:
            yield path, name, children[name]


def split_xattr_name(name: bytes) -> tuple[int, bytes]:
    """Return (name index, rest of the name).

    Raises `CorruptStructure` for an unknown prefix, and for what the kernel would list and then
    not find: a prefix alone, more than 255 bytes, a zero byte.
    """
    if len(name) > layout.NAME_MAX or b"\0" in name:
        raise CorruptStructure("xattr name that Linux cannot hold", got=name)
    for index, prefix in layout.XATTR_PREFIXES:
        if index in layout.XATTR_WHOLE_NAMES:
            if name == prefix:
                return index, b""
        elif name.startswith(prefix) and name != prefix:
            return index, name[len(prefix) :]
    raise CorruptStructure("xattr name that EROFS cannot hold", got=name)


def _check_name(path: bytes, name: bytes) -> None:
    if not 0 < len(name) <= layout.NAME_MAX or b"/" in name or b"\0" in name:
        raise CorruptStructure("impossible file name", entry=path + b"/" + name)
    if name in _RESERVED_NAMES:
        raise CorruptStructure("reserved file name", entry=path + b"/" + name)


def _check_xattrs(node: Node) -> None:
    total = 0
    for name, value in node.xattrs.items():
        _, suffix = split_xattr_name(name)
        if len(value) > layout.XATTR_VALUE_MAX:
            raise CorruptStructure("xattr value too long", got=name)
        total += align_up(layout.XATTR_ENTRY_SIZE + len(suffix) + len(value), 4)
    if total > _XATTRS_MAX:
        raise CorruptStructure("xattrs too long together", expected=_XATTRS_MAX, got=total)


def _check_regular(node: Node, limits: _Limits) -> None:
    chunk_size, blobs, block_size, is_dictionary = limits
    size, chunks = node.size, node.chunks
    if not 0 <= size <= _I_SIZE_MAX:
        raise CorruptStructure("impossible file size", got=size)
    count = -(-size // chunk_size)
    if len(chunks) != count and not is_dictionary:
        raise CorruptStructure("wrong number of chunks", expected=count, got=len(chunks))
    for chunk in chunks:
        if not 0 <= chunk.blob_index < blobs:
            raise CorruptStructure("chunk of a blob that is not in the table", got=chunk.blob_index)
        block, rest = divmod(chunk.uncompressed_offset, block_size)
        if rest or block > _BLKADDR_MAX or not 0 <= chunk.chunk_index < MAX_CHUNKS_PER_BLOB:
            raise CorruptStructure("chunk at an impossible place", got=chunk.uncompressed_offset)


def _check_node(node: Node, limits: _Limits) -> None:
    mode = node.mode
    kind = mode & _KIND_MASK
    if kind not in layout.FILE_TYPES or mode > 0xFFFF:
        raise CorruptStructure("unknown file type", got=f"mode {mode:o}")
    if (kind == stat.S_IFDIR) != (node.children is not None):
        raise CorruptStructure("directory without children, or children without a directory")
    if not 0 <= node.mtime_nsec < 1_000_000_000 or not 0 <= node.rdev <= 0xFFFFFFFF:
        raise CorruptStructure("impossible time or device number")
    if not 0 <= node.uid <= 0xFFFFFFFF or not 0 <= node.gid <= 0xFFFFFFFF:
        raise CorruptStructure("owner does not fit 32 bits", got=f"{node.uid}:{node.gid}")
    if kind == stat.S_IFREG:
        _check_regular(node, limits)
    elif kind == stat.S_IFLNK:
        if not 0 < len(node.target) <= layout.SYMLINK_MAX:
            raise CorruptStructure("impossible length of a symlink target", got=len(node.target))
        if b"\0" in node.target:
            raise CorruptStructure("symlink target with a zero byte", got=node.target)
    if node.xattrs:
        _check_xattrs(node)


def _check_space(blobs: list[BlobEntry], block_size: int) -> None:
    if len(blobs) > layout.MAX_DEVICES:
        raise CorruptStructure("too many blobs", expected=layout.MAX_DEVICES, got=len(blobs))
    space = sum(align_up(blob.uncompressed_size, _DEVICE_ALIGNMENT) for blob in blobs)
    most = _DEVICE_BLOCKS_MAX * block_size
    if space > most:
        raise CorruptStructure("blobs too large together", expected=most, got=space)


def validate(
    root: Node,
    blobs: list[BlobEntry],
    chunk_size: int,
    block_size: int = layout.BLOCK_SIZE,
    *,
    dictionary: bool = False,
) -> ValidTree:
    """Check every invariant of the format, so that the writer can rely on them.

    Files of a `dictionary` may have chunks of any size.

    Raises:
        CorruptStructure: names the entry and what is wrong with it.
    """
    _check_space(blobs, block_size)
    if not root.is_dir:
        raise CorruptStructure("the root is not a directory")
    limits = _Limits(chunk_size, len(blobs), block_size, dictionary)
    found: list[ValidDirectory] = []
    seen = {id(root)}
    path = name = b""
    try:
        _check_node(root, limits)
        has_xattr = bool(root.xattrs)
        for path, directory in iter_directories(root):
            found.append(directory)
            children = directory.node.entries
            for name in directory.names:
                _check_name(path, name)
                node = children[name]
                if node.children is not None:
                    if id(node) in seen:
                        raise CorruptStructure("directory under two names")
                    seen.add(id(node))
                _check_node(node, limits)
                if node.xattrs:
                    has_xattr = True
    except CorruptStructure as error:
        error.add_context(entry=path + b"/" + name)
        raise
    return ValidTree(root, 1 + sum(len(each.names) for each in found), has_xattr, found)
