"""A tiny EROFS image for trying out what a kernel can do: one device, one file over it.

Only the bytes; `fscache.probe` mounts them. Everything lies in one block: superblock at
1024, device slot at 1408, root directory at 2048, file behind it (spec rafs-v6 section 1).
"""

from __future__ import annotations

from erofs.layout import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_FORMAT_INDEXES,
    DEVICE_TABLE_OFFSET,
    DIRENT_SIZE,
    FT_DIRECTORY,
    FT_REGULAR,
    INODE_EXTENDED_SIZE,
    LAYOUT_CHUNK_BASED,
    LAYOUT_FLAT_INLINE,
    SLOT_SIZE,
    SUPERBLOCK_OFFSET,
    ChunkIndex,
    DeviceSlot,
    Dirent,
    InodeExtended,
    Superblock,
)

__all__ = ["BLOB_SIZE", "FILE_NAME", "build_probe_image"]

BLOB_SIZE = 1 << 20
FILE_NAME = "data"

_ROOT_OFFSET = 2048
_FILE_OFFSET = 2176
_EXTENDED = 1
_CHUNK_BITS = BLOB_SIZE.bit_length() - 1 - BLOCK_BITS


def _directory(root_nid: int, file_nid: int) -> bytes:
    entries = [
        (b".", root_nid, FT_DIRECTORY),
        (b"..", root_nid, FT_DIRECTORY),
        (FILE_NAME.encode(), file_nid, FT_REGULAR),
    ]
    name_offset = len(entries) * DIRENT_SIZE
    records = b""
    for name, nid, file_type in entries:
        records += Dirent(nid, name_offset, file_type).pack()
        name_offset += len(name)
    return records + b"".join(name for name, _, _ in entries)


def _inode(layout: int, mode: int, size: int, union: int, ino: int, links: int) -> bytes:
    return InodeExtended(
        i_format=_EXTENDED | layout << 1,
        i_xattr_icount=0,
        i_mode=mode,
        reserved=0,
        i_size=size,
        i_u=union,
        i_ino=ino,
        i_uid=0,
        i_gid=0,
        i_mtime=0,
        i_mtime_nsec=0,
        i_nlink=links,
    ).pack()


def build_probe_image() -> bytes:
    """Return an image of 4096 bytes whose file `FILE_NAME` is all `BLOB_SIZE` bytes of device 1."""
    root_nid = _ROOT_OFFSET // SLOT_SIZE
    file_nid = _FILE_OFFSET // SLOT_SIZE
    blocks = BLOB_SIZE // BLOCK_SIZE
    directory = _directory(root_nid, file_nid)
    chunk_format = CHUNK_FORMAT_INDEXES | _CHUNK_BITS
    parts = {
        SUPERBLOCK_OFFSET: Superblock(
            root_nid=root_nid, inos=2, blocks=blocks, extra_devices=1
        ).pack(),
        DEVICE_TABLE_OFFSET: DeviceSlot(tag=b"probe", blocks=blocks, mapped_blkaddr=1).pack(),
        _ROOT_OFFSET: _inode(LAYOUT_FLAT_INLINE, 0o040755, len(directory), 0, 1, 2) + directory,
        _FILE_OFFSET: _inode(LAYOUT_CHUNK_BASED, 0o100444, BLOB_SIZE, chunk_format, 2, 1),
        _FILE_OFFSET + INODE_EXTENDED_SIZE: ChunkIndex.of_chunk(0, 0, 0).pack(),
    }
    image = bytearray(BLOCK_SIZE)
    for offset, part in parts.items():
        image[offset : offset + len(part)] = part
    return bytes(image)
