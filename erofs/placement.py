"""Pass one of the writer: number every name, and place every inode in the image.

The placement reproduces the real builder's, byte for byte (spec rafs-v6 section 3).
Positions are relative to the metadata base; the root is at one block.
"""

from __future__ import annotations

import stat
from array import array
from bisect import insort
from collections import deque

from erofs import layout
from erofs.layout import (
    CHUNK_INDEX_SIZE,
    DIRENT_SIZE,
    INODE_EXTENDED_SIZE,
    SLOT_SIZE,
    XATTR_ENTRY_SIZE,
    XATTR_HEADER_SIZE,
)
from erofs.tree import Node, ValidDirectory, ValidTree, split_xattr_name
from erofs.view import align_down, align_up

__all__ = ["KIND_MASK", "Placement", "place"]

KIND_MASK = stat.S_IFMT(0xFFFF)
# Relative to the metadata base: nid 0 would make the root's entries look deleted.
_FIRST_INODE = 4096


class _Allocator:
    """The space allocation of spec 3.3: a cursor, and the free ends of passed blocks."""

    def __init__(self, block_size: int) -> None:
        self.cursor = _FIRST_INODE
        self._block_size = block_size
        self._free: list[deque[int]] = [deque() for _ in range(block_size // SLOT_SIZE)]
        # Bit k is set when `_free[k]` is not empty: spares looking through 127 lists.
        self._filled = 0

    def _remember(self, position: int) -> None:
        rest = position % self._block_size
        if rest:
            slots = (self._block_size - rest) // SLOT_SIZE
            self._free[slots].append(position - rest)
            self._filled |= 1 << slots

    def _reuse(self, size: int) -> int | None:
        if size >= self._block_size:
            return None
        need = -(-size // SLOT_SIZE)
        large = self._filled >> need
        if not large:
            return None
        slots = need + (large & -large).bit_length() - 1
        free = self._free[slots]
        position = free.popleft() + self._block_size - SLOT_SIZE * slots
        if not free:
            self._filled &= ~(1 << slots)
        self._remember(position + SLOT_SIZE * need)
        return position

    def align(self) -> None:
        self.cursor = align_up(self.cursor, SLOT_SIZE)

    def _next_block(self) -> None:
        self._remember(self.cursor)
        self.cursor = align_up(self.cursor, self._block_size)

    def place_flat(self, inode_size: int, length: int) -> tuple[int, int, int]:
        """Place a directory or symlink; return (inode, data, data layout)."""
        tail = length % self._block_size
        if tail and inode_size + tail <= self._block_size:
            return self._place_inline(inode_size, length, tail)
        inode = self._reuse(inode_size)
        if inode is None:
            inode = self.cursor
            self.cursor += inode_size
        self._next_block()
        data = self.cursor
        self.cursor = align_up(self.cursor + length, self._block_size)
        return inode, data, layout.LAYOUT_FLAT_PLAIN

    def _place_inline(self, inode_size: int, length: int, tail: int) -> tuple[int, int, int]:
        inode = self._reuse(inode_size + tail)
        if inode is None:
            if self._block_size - self.cursor % self._block_size < inode_size + tail:
                self._next_block()
            inode = self.cursor
            self.cursor += inode_size + tail
        if length != tail:
            self._next_block()
        data = self.cursor
        self.cursor += align_down(length, self._block_size)
        return inode, data, layout.LAYOUT_FLAT_INLINE

    def place_file(self, inode_size: int, chunks: int) -> int:
        """Place a regular file's inode and chunk indexes."""
        size = align_up(inode_size, CHUNK_INDEX_SIZE) + CHUNK_INDEX_SIZE * chunks
        inode = self._reuse(size)
        if inode is None:
            inode = self.cursor
            self.cursor += size
        return inode

    def place_special(self, inode_size: int) -> int:
        """Place a device, FIFO or socket, which never fills a gap."""
        inode = self.cursor
        self.cursor += inode_size
        return inode


def _xattr_area_size(node: Node) -> int:
    size = XATTR_HEADER_SIZE
    for name, value in node.xattrs.items():
        _, suffix = split_xattr_name(name)
        size += align_up(XATTR_ENTRY_SIZE + len(suffix) + len(value), 4)
    return size


def _inode_size(node: Node) -> int:
    return INODE_EXTENDED_SIZE + _xattr_area_size(node) if node.xattrs else INODE_EXTENDED_SIZE


def _directory_size(names: list[bytes], block_size: int) -> int:
    size = DIRENT_SIZE * len(names) + sum(map(len, names))
    if size <= block_size:
        return size
    size = room = 0
    for name in names:
        length = len(name) + DIRENT_SIZE
        if length > room:
            size += room
            room = block_size
        size += length
        room -= length
    return size


class Placement:
    """The outcome of pass one: columns, by the number that each inode has got.

    Columns and not records, since those of a million inodes would take a hundred bytes each.
    Positions are those of the inode and of the plain part of its data, relative to the base;
    `indexes` are the numbers of the (first) names.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.inodes = array("Q")
        self.data = array("Q")
        self.layouts = bytearray()
        self.indexes = array("I")
        self.links = array("I")
        self.directories: list[ValidDirectory] = []
        self.names = 1
        self.end = 0

    def knows(self, node: Node) -> bool:
        """Tell whether a node has a number; one of another tree may still have that of there."""
        number = node.number
        return 0 <= number < len(self.nodes) and self.nodes[number] is node

    def add(self, node: Node, where: tuple[int, int, int], index: int, links: int) -> None:
        """Give a node its number; `where` is its inode, its data, and the data layout."""
        node.number = len(self.nodes)
        self.nodes.append(node)
        inode, data, data_layout = where
        self.inodes.append(inode)
        self.data.append(data)
        self.layouts.append(data_layout)
        self.indexes.append(index)
        self.links.append(links)


def _place_child(allocator: _Allocator, node: Node) -> tuple[int, int, int]:
    kind = node.mode & KIND_MASK
    if kind == stat.S_IFREG:
        inode = allocator.place_file(_inode_size(node), len(node.chunks))
        return inode, 0, layout.LAYOUT_CHUNK_BASED
    if kind == stat.S_IFLNK:
        return allocator.place_flat(_inode_size(node), len(node.target))
    return allocator.place_special(_inode_size(node)), 0, layout.LAYOUT_FLAT_PLAIN


def _with_dots(names: list[bytes]) -> list[bytes]:
    """Return the names of a directory in order, with those of itself and its parent."""
    result = names.copy()
    insort(result, b".")
    insort(result, b"..")
    return result


def place(tree: ValidTree, block_size: int) -> Placement:
    """Pass one: number every name and place every inode (spec 3.1, 3.3)."""
    placed = Placement()
    allocator = _Allocator(block_size)
    # Of directories: their names come before they are visited themselves.
    indexes = {id(tree.root): 1}
    for directory, parent, plain_names in tree.directories:
        names = _with_dots(plain_names)
        size = _directory_size(names, block_size)
        where = allocator.place_flat(_inode_size(directory), size)
        allocator.align()
        number = len(placed.nodes)
        placed.add(directory, where, indexes.pop(id(directory)), 2)
        placed.directories.append(ValidDirectory(directory, parent, names))
        children = directory.entries
        for name in plain_names:
            child = children[name]
            placed.names += 1
            if child.children is not None:
                indexes[id(child)] = placed.names
                placed.links[number] += 1
                continue
            if placed.knows(child):
                placed.links[child.number] += 1
            else:
                placed.add(child, _place_child(allocator, child), placed.names, 1)
            allocator.align()
    placed.end = allocator.cursor
    return placed
