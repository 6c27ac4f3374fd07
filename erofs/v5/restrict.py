"""What readers of RAFS v5 insist on: checks of the superblock and of the places of tables."""

from __future__ import annotations

from itertools import pairwise

from erofs import rafs
from erofs.errors import BadMagic, CorruptStructure, OutOfBounds, UnsupportedFeature
from erofs.rafs import SuperFlags
from erofs.v5.layout import (
    ALIGNMENT,
    EXTENDED_BLOB_SIZE,
    INDEX_SIZE,
    MAGIC,
    SUPERBLOCK_SIZE,
    VERSION,
    SuperblockV5,
)

__all__ = ["restrict_superblock"]

_UNSUPPORTED_FLAGS = SuperFlags.TARTFS_MODE | SuperFlags.ENCRYPTION_ASE_128_XTS


def restrict_superblock(superblock: SuperblockV5, length: int) -> None:
    """Refuse a superblock that the original refuses, and tables outside of the file."""
    if (superblock.magic, superblock.version) != (MAGIC, VERSION):
        raise BadMagic(
            "not a RAFS v5 bootstrap",
            expected=f"{MAGIC:#x}, version {VERSION:#x}",
            got=f"{superblock.magic:#x}, version {superblock.version:#x}",
        )
    if superblock.sb_size != SUPERBLOCK_SIZE:
        raise CorruptStructure(
            "size of the superblock", expected=SUPERBLOCK_SIZE, got=superblock.sb_size
        )
    if length <= SUPERBLOCK_SIZE or length % ALIGNMENT:
        raise OutOfBounds("bootstrap of an impossible length", got=length)
    size = superblock.block_size
    if size & (size - 1) or not rafs.MIN_CHUNK_SIZE <= size <= rafs.MAX_CHUNK_SIZE:
        raise CorruptStructure("impossible chunk size", got=size)
    _restrict_flags(superblock.flags)
    if not superblock.inodes_count <= superblock.inode_table_entries:
        raise CorruptStructure(
            "more inodes than names",
            expected=f"up to {superblock.inode_table_entries}",
            got=superblock.inodes_count,
        )
    if not superblock.inode_table_entries:
        raise CorruptStructure("no inodes")
    _restrict_tables(superblock, length)


def _restrict_flags(flags: int) -> None:
    known = sum(SuperFlags) | rafs.SUPER_FLAGS_RESERVED
    if flags & ~known or flags & _UNSUPPORTED_FLAGS:
        raise UnsupportedFeature("RAFS v5 flags", got=f"{flags:#x}")
    for group, what in (
        (rafs.SUPER_FLAGS_COMPRESSION, "compressor"),
        (rafs.SUPER_FLAGS_HASH, "digest"),
    ):
        # None is a default of its own.
        if (flags & group).bit_count() > 1:
            raise CorruptStructure(f"more than one {what} flag", got=f"{flags:#x}")


def _restrict_tables(superblock: SuperblockV5, length: int) -> None:
    tables = (
        ("inode table", superblock.inode_table_offset,
         superblock.inode_table_entries * INDEX_SIZE),
        ("prefetch table", superblock.prefetch_table_offset,
         superblock.prefetch_table_entries * INDEX_SIZE),
        ("blob table", superblock.blob_table_offset, superblock.blob_table_size),
        ("extended blob table", superblock.extended_blob_table_offset,
         superblock.extended_blob_table_entries * EXTENDED_BLOB_SIZE),
    )  # fmt: skip
    used: list[tuple[int, int, str]] = []
    for name, start, size in tables:
        if not size:
            continue
        if start % ALIGNMENT or start < SUPERBLOCK_SIZE or start + size > length:
            raise OutOfBounds(f"{name} at an impossible place", offset=start, got=size)
        used.append((start, start + size, name))
    used.sort()
    for (_, end, name), (start, _, other) in pairwise(used):
        if start < end:
            raise CorruptStructure(f"{name} and {other} overlap", offset=start)
