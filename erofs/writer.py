"""Write a RAFS v6 bootstrap: pass one places everything, pass two emits it.

The placement reproduces the real builder's, byte for byte (spec rafs-v6 section 3).
Positions of inodes are relative to the metadata base; the root is at one block.
"""

from __future__ import annotations

import stat
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from erofs import layout, rafs
from erofs.layout import (
    CHUNK_INDEX_SIZE,
    DIRENT_SIZE,
    INODE_EXTENDED_SIZE,
    SLOT_SIZE,
    XATTR_ENTRY_SIZE,
    XATTR_HEADER_SIZE,
    ChunkIndex,
    DeviceSlot,
    Dirent,
    InodeExtended,
    Superblock,
    XattrEntry,
    XattrHeader,
)
from erofs.rafs import BlobEntry, BlobFeatures, ChunkInfo, ExtendedSuperblock, SuperFlags
from erofs.tree import Chunk, Node, ValidTree, split_xattr_name, validate
from erofs.view import align_down, align_up

__all__ = ["BootstrapSpec", "write_bootstrap"]

REGION_ALIGNMENT = 4096
DEVICE_ALIGNMENT = 0x80000
# Relative to the metadata base: nid 0 would make the root's entries look deleted.
FIRST_INODE = 4096


@dataclass(slots=True)
class BootstrapSpec:
    """All that a bootstrap is made of.

    Args:
        root: the tree; chunks name blobs by their place in `blobs`.
        blobs: the blob table, in order.
        chunk_size: bytes, the same for every blob.
        prefetch: nodes of the tree for the prefetch table, in order.
        explicit_owners: inodes carry real owners; otherwise readers put in their own.
        force_xattr_flag: say "has xattr" whatever the tree holds, as merging does.
        tarfs: the blobs are plain tars, addressed in blocks of 512 bytes (spec 6.1).
        encrypted: blobs are encrypted.
        dictionary: files are lists of chunks that nobody reads as content (spec 4.12).
    """

    root: Node
    blobs: list[BlobEntry]
    chunk_size: int
    compressor: rafs.Compressor
    digester: rafs.Digester
    prefetch: Sequence[Node] = ()
    explicit_owners: bool = True
    force_xattr_flag: bool = False
    tarfs: bool = False
    encrypted: bool = False
    dictionary: bool = False

    @property
    def block_size(self) -> int:
        """Bytes in a filesystem block."""
        return 1 << (layout.MIN_BLOCK_BITS if self.tarfs else layout.BLOCK_BITS)


@dataclass(slots=True)
class _Place:
    """Where an inode and the plain part of its data are, relative to the base."""

    inode: int
    data: int
    layout: int
    index: int
    links: int = 1

    @property
    def nid(self) -> int:
        return self.inode // SLOT_SIZE


class _Allocator:
    """The space allocation of spec 3.3: a cursor, and the free ends of passed blocks."""

    def __init__(self, block_size: int) -> None:
        self.cursor = FIRST_INODE
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
    if not node.xattrs:
        return 0
    size = XATTR_HEADER_SIZE
    for name, value in node.xattrs.items():
        _, suffix = split_xattr_name(name)
        size += align_up(XATTR_ENTRY_SIZE + len(suffix) + len(value), 4)
    return size


def _inode_size(node: Node) -> int:
    return INODE_EXTENDED_SIZE + _xattr_area_size(node)


def _directory_size(names: list[bytes], block_size: int) -> int:
    size = 0
    for name in names:
        length = len(name) + DIRENT_SIZE
        if size % block_size + length > block_size:
            size = align_up(size, block_size)
        size += length
    return size


@dataclass(slots=True)
class _Directory:
    node: Node
    parent: Node
    names: list[bytes]
    size: int


@dataclass(slots=True)
class _Plan:
    """The outcome of pass one."""

    places: dict[int, _Place] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    directories: dict[int, _Directory] = field(default_factory=dict)
    names: int = 1
    end: int = 0


def _place_child(allocator: _Allocator, node: Node) -> tuple[int, int, int]:
    kind = stat.S_IFMT(node.mode)
    if kind == stat.S_IFREG:
        inode = allocator.place_file(_inode_size(node), len(node.chunks))
        return inode, 0, layout.LAYOUT_CHUNK_BASED
    if kind == stat.S_IFLNK:
        return allocator.place_flat(_inode_size(node), len(node.target))
    return allocator.place_special(_inode_size(node)), 0, layout.LAYOUT_FLAT_PLAIN


def _plan(root: Node, block_size: int) -> _Plan:
    """Pass one: number every name and place every inode (spec 3.1, 3.3)."""
    plan = _Plan()
    allocator = _Allocator(block_size)
    indexes = {id(root): 1}
    stack: list[tuple[Node, Node]] = [(root, root)]
    while stack:
        node, parent = stack.pop()
        names = sorted((b".", b"..", *node.entries))
        size = _directory_size(names, block_size)
        inode, data, data_layout = allocator.place_flat(_inode_size(node), size)
        allocator.align()
        plan.places[id(node)] = _Place(inode, data, data_layout, indexes[id(node)], links=2)
        plan.nodes.append(node)
        plan.directories[id(node)] = _Directory(node, parent, names, size)
        subdirectories = []
        for name in sorted(node.entries):
            child = node.entries[name]
            plan.names += 1
            if child.is_dir:
                indexes[id(child)] = plan.names
                subdirectories.append((child, node))
                plan.places[id(node)].links += 1
                continue
            known = plan.places.get(id(child))
            if known is not None:
                known.links += 1
            else:
                place = _Place(*_place_child(allocator, child), plan.names)
                plan.places[id(child)] = place
                plan.nodes.append(child)
            allocator.align()
        stack.extend(reversed(subdirectories))
    plan.end = allocator.cursor
    return plan


def _chunk_bits(node: Node, chunk_size: int, block_size: int) -> int:
    """Return the inode's own chunk size exponent, in blocks (spec 3.6)."""
    size = chunk_size
    chunks = node.chunks
    if node.size > chunk_size and all(
        left.blob_index == right.blob_index
        and left.uncompressed_offset + chunk_size == right.uncompressed_offset
        for left, right in pairwise(chunks)
    ):
        size = 1 << (node.size - 1).bit_length()
    return size.bit_length() - block_size.bit_length()


def _pack_xattrs(node: Node) -> bytes:
    if not node.xattrs:
        return b""
    parts = [XattrHeader().pack()]
    for name in sorted(node.xattrs):
        value = node.xattrs[name]
        index, suffix = split_xattr_name(name)
        body = XattrEntry(len(suffix), index, len(value)).pack() + suffix + value
        parts.append(body + bytes(-len(body) % 4))
    return b"".join(parts)


class _Regions(NamedTuple):
    """Absolute offsets of what surrounds the inodes (spec 2.1)."""

    blob_table: int
    prefetch_table: int
    base: int
    chunk_table: int
    end: int


class _Emitter:
    """Pass two: write every record at the place that pass one found for it."""

    def __init__(self, spec: BootstrapSpec, plan: _Plan, regions: _Regions) -> None:
        self.spec = spec
        self.plan = plan
        self.regions = regions
        self.block_size = spec.block_size
        self.image = bytearray(regions.end)

    def put(self, offset: int, data: bytes) -> None:
        self.image[offset : offset + len(data)] = data

    def nid(self, node: Node) -> int:
        return self.plan.places[id(node)].nid

    def directory_content(self, directory: _Directory) -> bytes:
        """Return the entry blocks of a directory (spec 1.6)."""
        blocks: list[bytes] = []
        pending: list[tuple[bytes, Node]] = []
        used = 0
        for name in directory.names:
            if used + DIRENT_SIZE + len(name) > self.block_size:
                block = self._directory_block(pending)
                blocks.append(block + bytes(self.block_size - len(block)))
                pending, used = [], 0
            if name == b".":
                target = directory.node
            elif name == b"..":
                target = directory.parent
            else:
                target = directory.node.entries[name]
            pending.append((name, target))
            used += DIRENT_SIZE + len(name)
        blocks.append(self._directory_block(pending))
        return b"".join(blocks)

    def _directory_block(self, entries: list[tuple[bytes, Node]]) -> bytes:
        offset = DIRENT_SIZE * len(entries)
        heads = []
        for name, node in entries:
            file_type = layout.FILE_TYPES[stat.S_IFMT(node.mode)]
            heads.append(Dirent(self.nid(node), offset, file_type).pack())
            offset += len(name)
        return b"".join(heads) + b"".join(name for name, _ in entries)

    def emit_node(self, node: Node) -> None:
        place = self.plan.places[id(node)]
        position = self.regions.base + place.inode
        kind = stat.S_IFMT(node.mode)
        content = b""
        size = 0
        union = node.rdev
        if kind == stat.S_IFREG:
            size = node.size
            bits = _chunk_bits(node, self.spec.chunk_size, self.block_size)
            union = layout.CHUNK_FORMAT_INDEXES | bits
        elif kind in (stat.S_IFDIR, stat.S_IFLNK):
            content = node.target
            if node.is_dir:
                content = self.directory_content(self.plan.directories[id(node)])
            size = len(content)
            union = (self.regions.base + place.data) // self.block_size
        xattrs = _pack_xattrs(node)
        inode = InodeExtended(
            i_format=1 | place.layout << 1,
            i_xattr_icount=(len(xattrs) - XATTR_HEADER_SIZE) // 4 + 1 if xattrs else 0,
            i_mode=node.mode,
            reserved=0,
            i_size=size,
            i_u=union,
            i_ino=place.index,
            i_uid=node.uid,
            i_gid=node.gid,
            i_mtime=node.mtime & 0xFFFFFFFFFFFFFFFF,
            i_mtime_nsec=node.mtime_nsec,
            i_nlink=place.links,
        )
        self.put(position, inode.pack() + xattrs)
        body = position + INODE_EXTENDED_SIZE + len(xattrs)
        if kind == stat.S_IFREG:
            self.put(align_up(body, CHUNK_INDEX_SIZE), _pack_indexes(node.chunks, self.block_size))
        elif content:
            self.emit_content(place, body, content)

    def emit_content(self, place: _Place, tail_position: int, content: bytes) -> None:
        plain = len(content)
        if place.layout == layout.LAYOUT_FLAT_INLINE:
            plain = align_down(plain, self.block_size)
            self.put(tail_position, content[plain:])
        self.put(self.regions.base + place.data, content[:plain])

    def emit_superblocks(self, tree: ValidTree, chunk_table_size: int) -> None:
        spec, regions = self.spec, self.regions
        flags = (
            rafs.COMPRESSOR_FLAGS[spec.compressor]
            | rafs.DIGESTER_FLAGS[spec.digester]
            | (SuperFlags.ENCRYPTION_ASE_128_XTS if spec.encrypted else SuperFlags.ENCRYPTION_NONE)
        )
        if spec.explicit_owners:
            flags |= SuperFlags.EXPLICIT_UID_GID
        if tree.has_xattr or spec.force_xattr_flag:
            flags |= SuperFlags.HAS_XATTR
        if all(blob.features & BlobFeatures.INLINED_CHUNK_DIGEST for blob in spec.blobs):
            flags |= SuperFlags.INLINED_CHUNK_DIGEST
        if spec.tarfs:
            flags |= SuperFlags.TARTFS_MODE
        superblock = Superblock(
            blkszbits=self.block_size.bit_length() - 1,
            root_nid=self.nid(spec.root),
            inos=self.plan.names,
            blocks=sum(blob.uncompressed_size // self.block_size for blob in spec.blobs),
            meta_blkaddr=regions.base // self.block_size,
            extra_devices=len(spec.blobs),
        )
        self.put(layout.SUPERBLOCK_OFFSET, superblock.pack())
        extended = ExtendedSuperblock(
            flags=flags,
            blob_table_offset=regions.blob_table,
            blob_table_size=rafs.BLOB_ENTRY_SIZE * len(spec.blobs),
            chunk_size=spec.chunk_size,
            chunk_table_offset=regions.chunk_table,
            chunk_table_size=chunk_table_size,
            prefetch_table_offset=regions.prefetch_table if spec.prefetch else 0,
            prefetch_table_size=rafs.PREFETCH_ENTRY_SIZE * len(spec.prefetch),
        )
        self.put(rafs.EXTENDED_SUPERBLOCK_OFFSET, extended.pack())

    def emit_tables(self, chunk_infos: list[ChunkInfo]) -> None:
        spec, regions, block_size = self.spec, self.regions, self.block_size
        position = regions.end
        for index, blob in enumerate(spec.blobs):
            mapped = align_up(position, DEVICE_ALIGNMENT) // block_size
            slot = DeviceSlot(blob.blob_id, blob.uncompressed_size // block_size, mapped)
            self.put(layout.DEVICE_TABLE_OFFSET + layout.DEVICE_SLOT_SIZE * index, slot.pack())
            self.put(regions.blob_table + rafs.BLOB_ENTRY_SIZE * index, blob.pack())
            position = (mapped + slot.blocks) * block_size
        nids = (self.nid(node) for node in spec.prefetch)
        self.put(regions.prefetch_table, b"".join(nid.to_bytes(4, "little") for nid in nids))
        self.put(regions.chunk_table, b"".join(info.pack() for info in chunk_infos))


def _pack_indexes(chunks: list[Chunk], block_size: int) -> bytes:
    return b"".join(
        ChunkIndex.of_chunk(
            chunk.blob_index, chunk.chunk_index, chunk.uncompressed_offset // block_size
        ).pack()
        for chunk in chunks
    )


def _chunk_infos(nodes: list[Node], blobs: list[BlobEntry]) -> list[ChunkInfo]:
    """Return one entry for each distinct chunk, sorted; the last visited reference wins.

    External chunks have no digests; their numbers tell them apart.
    """
    external = [bool(blob.features & BlobFeatures.EXTERNAL) for blob in blobs]
    table: dict[tuple[bytes, int, int], Chunk] = {}
    for node in nodes:
        for chunk in node.chunks:
            number = chunk.chunk_index if external[chunk.blob_index] else -1
            table[chunk.digest, chunk.blob_index, number] = chunk
    return [table[key].info() for key in sorted(table)]


def _regions(spec: BootstrapSpec, plan: _Plan, chunk_infos: int) -> _Regions:
    blob_table = align_up(
        layout.DEVICE_TABLE_OFFSET + layout.DEVICE_SLOT_SIZE * len(spec.blobs), REGION_ALIGNMENT
    )
    prefetch_table = blob_table + rafs.BLOB_ENTRY_SIZE * len(spec.blobs)
    base = 0
    if spec.blobs:
        end = prefetch_table + rafs.PREFETCH_ENTRY_SIZE * len(spec.prefetch)
        base = align_up(end, REGION_ALIGNMENT)
    chunk_table = align_up(base + plan.end, REGION_ALIGNMENT)
    end = align_up(chunk_table + rafs.CHUNK_INFO_SIZE * chunk_infos, REGION_ALIGNMENT)
    return _Regions(blob_table, prefetch_table, base, chunk_table, end)


def write_bootstrap(spec: BootstrapSpec) -> bytes:
    """Return the bytes of a bootstrap; the same spec always gives the same bytes.

    Raises:
        CorruptStructure: the tree does not fit the format.
    """
    tree = validate(
        spec.root, spec.blobs, spec.chunk_size, spec.block_size, dictionary=spec.dictionary
    )
    plan = _plan(spec.root, spec.block_size)
    chunk_infos = _chunk_infos(plan.nodes, spec.blobs)
    emitter = _Emitter(spec, plan, _regions(spec, plan, len(chunk_infos)))
    emitter.emit_superblocks(tree, rafs.CHUNK_INFO_SIZE * len(chunk_infos))
    emitter.emit_tables(chunk_infos)
    for node in plan.nodes:
        emitter.emit_node(node)
    return bytes(emitter.image)
