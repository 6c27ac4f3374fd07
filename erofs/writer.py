"""Write a RAFS v6 bootstrap: `erofs.placement` is pass one, pass two here emits every record.

The bytes are those of the real builder (spec rafs-v6 section 3).
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from itertools import groupby, pairwise
from operator import attrgetter
from typing import NamedTuple

from erofs import layout, rafs
from erofs.layout import (
    CHUNK_INDEX_SIZE,
    DIRENT_SIZE,
    INODE_EXTENDED_SIZE,
    SLOT_SIZE,
    XATTR_HEADER_SIZE,
    DeviceSlot,
    Superblock,
    XattrEntry,
    XattrHeader,
)
from erofs.placement import KIND_MASK, Placement, place
from erofs.rafs import BlobEntry, BlobFeatures, ExtendedSuperblock, SuperFlags
from erofs.tree import (
    Chunk,
    Node,
    ValidDirectory,
    ValidTree,
    iter_names,
    split_xattr_name,
    validate,
)
from erofs.values import Value
from erofs.view import align_down, align_up

__all__ = ["BootstrapSpec", "emit_bootstrap", "write_bootstrap"]

REGION_ALIGNMENT = 4096
DEVICE_ALIGNMENT = 0x80000
_TIME_MASK = (1 << 64) - 1
_DOTS = frozenset((b".", b".."))


class BootstrapSpec(Value):
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


def _chunk_bits(node: Node, chunk_size: int, block_size: int) -> int:
    """Return the chunk size exponent, in blocks, of a file larger than a chunk (spec 3.6)."""
    size = chunk_size
    if all(
        left.blob_index == right.blob_index
        and left.uncompressed_offset + chunk_size == right.uncompressed_offset
        for left, right in pairwise(node.chunks)
    ):
        size = 1 << (node.size - 1).bit_length()
    return size.bit_length() - block_size.bit_length()


def _pack_xattrs(node: Node) -> bytes:
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

    def __init__(self, spec: BootstrapSpec, placed: Placement, regions: _Regions) -> None:
        self.spec = spec
        self.placed = placed
        self.regions = regions
        self.block_size = spec.block_size
        self.image = bytearray(regions.end)
        self._least_chunk_bits = spec.chunk_size.bit_length() - self.block_size.bit_length()

    def put(self, offset: int, data: bytes) -> None:
        self.image[offset : offset + len(data)] = data

    def nid(self, node: Node) -> int:
        return self.placed.inodes[node.number] // SLOT_SIZE

    def directory_content(self, directory: ValidDirectory) -> bytes:
        """Return the entry blocks of a directory (spec 1.6)."""
        names = directory.names
        blocks: list[bytes] = []
        first = used = 0
        for number, name in enumerate(names):
            length = DIRENT_SIZE + len(name)
            if used + length > self.block_size:
                block = self._directory_block(directory, names[first:number])
                blocks.append(block + bytes(self.block_size - len(block)))
                first, used = number, 0
            used += length
        blocks.append(self._directory_block(directory, names[first:]))
        return b"".join(blocks)

    def _directory_block(self, directory: ValidDirectory, names: list[bytes]) -> bytes:
        children, inodes = directory.node.entries, self.placed.inodes
        offset = DIRENT_SIZE * len(names)
        fields: list[int] = []
        for name in names:
            if name in _DOTS:
                node = directory.node if name == b"." else directory.parent
            else:
                node = children[name]
            fields += (
                inodes[node.number] // SLOT_SIZE,
                offset,
                layout.FILE_TYPES[node.mode & KIND_MASK],
                0,
            )
            offset += len(name)
        return layout.pack_dirents(fields) + b"".join(names)

    def emit_nodes(self) -> None:
        """Write all inodes with what follows them; directories have theirs in order."""
        placed = self.placed
        directories = iter(placed.directories)
        columns = zip(
            placed.nodes,
            placed.inodes,
            placed.data,
            placed.layouts,
            placed.indexes,
            placed.links,
            strict=True,
        )
        for node, inode, data, data_layout, index, links in columns:
            content = node.target
            if node.children is not None:
                content = self.directory_content(next(directories))
            self.emit_node(node, content, inode, data, data_layout, index, links)

    def emit_node(
        self, node: Node, content: bytes, inode: int, data: int, data_layout: int, index: int,
        links: int,
    ) -> None:  # fmt: skip
        """Write an inode with its xattrs, chunk indexes or content."""
        position = self.regions.base + inode
        body = position + INODE_EXTENDED_SIZE
        kind = node.mode & KIND_MASK
        icount = 0
        if node.xattrs:
            xattrs = _pack_xattrs(node)
            self.put(body, xattrs)
            body += len(xattrs)
            icount = (len(xattrs) - XATTR_HEADER_SIZE) // 4 + 1
        if kind == stat.S_IFREG:
            size = node.size
            bits = self._least_chunk_bits
            if size > self.spec.chunk_size:
                bits = _chunk_bits(node, self.spec.chunk_size, self.block_size)
            union = layout.CHUNK_FORMAT_INDEXES | bits
            if node.chunks:
                self._emit_indexes(align_up(body, CHUNK_INDEX_SIZE), node.chunks)
        elif content:
            size = len(content)
            union = (self.regions.base + data) // self.block_size
            self.emit_content(data, data_layout, body, content)
        else:
            size, union = 0, node.rdev
        layout.pack_inode_into(
            self.image, position, 1 | data_layout << 1, icount, node.mode, 0, size, union, index,
            node.uid, node.gid, node.mtime & _TIME_MASK, node.mtime_nsec, links,
        )  # fmt: skip

    def _emit_indexes(self, position: int, chunks: Sequence[Chunk]) -> None:
        image, block_size = self.image, self.block_size
        for chunk in chunks:
            number = chunk.chunk_index
            device = (chunk.blob_index + 1) | (number >> 16 & 0xFF) << 8
            block = chunk.uncompressed_offset // block_size
            layout.pack_index_into(image, position, number & 0xFFFF, device, block)
            position += CHUNK_INDEX_SIZE

    def emit_content(self, data: int, data_layout: int, tail: int, content: bytes) -> None:
        plain = len(content)
        if data_layout == layout.LAYOUT_FLAT_INLINE:
            plain = align_down(plain, self.block_size)
            self.put(tail, content[plain:])
        self.put(self.regions.base + data, content[:plain])

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
            inos=self.placed.names,
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

    def emit_tables(self, chunks: list[Chunk]) -> None:
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
        offset = regions.chunk_table
        for chunk in chunks:
            rafs.pack_chunk_into(
                self.image, offset, chunk.digest, chunk.blob_index, chunk.flags,
                chunk.compressed_size, chunk.uncompressed_size, chunk.compressed_offset,
                chunk.uncompressed_offset, chunk.file_offset, chunk.chunk_index, chunk.crc32c,
            )  # fmt: skip
            offset += rafs.CHUNK_INFO_SIZE


def _distinct_chunks(nodes: list[Node], blobs: list[BlobEntry]) -> list[Chunk]:
    """Return the chunks of the table, sorted; of equal ones the last visited reference wins.

    External chunks have no digests; their numbers tell them apart.
    """
    external = [bool(blob.features & BlobFeatures.EXTERNAL) for blob in blobs]
    chunks = [chunk for node in nodes for chunk in node.chunks]
    # By digests first, which seldom are equal: tuples of all keys would take longer.
    chunks.sort(key=attrgetter("digest"))
    distinct: list[Chunk] = []
    for _, equal in groupby(chunks, key=attrgetter("digest")):
        alike = list(equal)
        if len(alike) > 1:
            table = {
                (each.blob_index, each.chunk_index if external[each.blob_index] else -1): each
                for each in alike
            }
            alike = [table[key] for key in sorted(table)]
        distinct += alike
    return distinct


def _regions(spec: BootstrapSpec, placed: Placement, chunk_infos: int) -> _Regions:
    blob_table = align_up(
        layout.DEVICE_TABLE_OFFSET + layout.DEVICE_SLOT_SIZE * len(spec.blobs), REGION_ALIGNMENT
    )
    prefetch_table = blob_table + rafs.BLOB_ENTRY_SIZE * len(spec.blobs)
    base = 0
    if spec.blobs:
        end = prefetch_table + rafs.PREFETCH_ENTRY_SIZE * len(spec.prefetch)
        base = align_up(end, REGION_ALIGNMENT)
    chunk_table = align_up(base + placed.end, REGION_ALIGNMENT)
    end = align_up(chunk_table + rafs.CHUNK_INFO_SIZE * chunk_infos, REGION_ALIGNMENT)
    return _Regions(blob_table, prefetch_table, base, chunk_table, end)


def emit_bootstrap(spec: BootstrapSpec) -> memoryview:
    """Return the bytes of a bootstrap, read-only; see `write_bootstrap`, which copies them."""
    tree = validate(
        spec.root, spec.blobs, spec.chunk_size, spec.block_size, dictionary=spec.dictionary
    )
    placed = place(tree, spec.block_size)
    nodes = placed.nodes
    if spec.tarfs:
        # Without digests one chunk of each blob is left, of whatever name is visited last.
        nodes = [node for _, _, node in iter_names(spec.root)]
    chunks = _distinct_chunks(nodes, spec.blobs)
    emitter = _Emitter(spec, placed, _regions(spec, placed, len(chunks)))
    emitter.emit_superblocks(tree, rafs.CHUNK_INFO_SIZE * len(chunks))
    emitter.emit_tables(chunks)
    emitter.emit_nodes()
    return memoryview(emitter.image).toreadonly()


def write_bootstrap(spec: BootstrapSpec) -> bytes:
    """Return the bytes of a bootstrap; the same spec always gives the same bytes.

    Raises:
        CorruptStructure: the tree does not fit the format.
    """
    return bytes(emit_bootstrap(spec))
