"""A disk with blobs as its partitions."""

from __future__ import annotations

import uuid
import zlib

from erofs.gpt import (
    ENTRY,
    HEADER,
    HEADER_LBA,
    MAX_PARTITIONS,
    MBR,
    MBR_END,
    SECTOR_SIZE,
    SIGNATURE,
)

BASIC = uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


def disk(*partitions, first=2048):
    """Return a disk of (type, GUID, name, content), each begun at the next sector."""
    entries, data, sector = b"", b"", first
    for kind, guid, name, content in partitions:
        content = content.ljust(-(-len(content) // SECTOR_SIZE) * SECTOR_SIZE, b"\0")
        last = sector + len(content) // SECTOR_SIZE - 1
        entries += ENTRY.pack(
            kind.bytes_le, guid.bytes_le, sector, last, 0, name.encode("utf-16-le")
        )
        data, sector = data + content, last + 1
    entries = entries.ljust(MAX_PARTITIONS * ENTRY.size, b"\0")

    def header(checksum):
        return HEADER.pack(
            SIGNATURE, 0x10000, HEADER.size, checksum, 0, HEADER_LBA, sector, first, sector - 1,
            bytes(16), 2, MAX_PARTITIONS, ENTRY.size, zlib.crc32(entries),
        )  # fmt: skip

    mbr = MBR.pack(b"", 0, b"", 0xEE, b"", 1, sector - 1, b"", MBR_END)
    head = mbr + header(zlib.crc32(header(0))).ljust(SECTOR_SIZE, b"\0") + entries
    return head.ljust(first * SECTOR_SIZE, b"\0") + data
