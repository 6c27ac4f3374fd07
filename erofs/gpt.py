"""GUID partition tables, as they are found on disks (UEFI specification 2.10, chapter 5)."""

from __future__ import annotations

import struct
import uuid
import zlib
from typing import NamedTuple

from erofs.errors import BadMagic, CorruptStructure
from erofs.view import View

__all__ = [
    "ENTRY", "HEADER", "HEADER_LBA", "HEAD_SECTORS", "MAX_PARTITIONS", "MBR", "MBR_END",
    "SECTOR_SIZE", "SIGNATURE", "GptEntry", "parse_gpt",
]  # fmt: skip

SECTOR_SIZE = 512
# What readers are given of a disk: all tables are within its first MiB.
HEAD_SECTORS = 2048
MAX_PARTITIONS = 128
HEADER_LBA = 1
SIGNATURE = b"EFI PART"
# Bootstrap code, then one record of 16 bytes, room for three more, and 55 AA.
MBR = struct.Struct("<446sB3sB3sII48sH")
MBR_END = 0xAA55
HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
ENTRY = struct.Struct("<16s16sQQQ72s")


class GptEntry(NamedTuple):
    """A partition: its type, its own GUID, name, first and last sector."""

    kind: uuid.UUID
    guid: uuid.UUID
    name: str
    first: int
    last: int


def parse_gpt(data: bytes) -> list[GptEntry]:
    """Decode the first table of a disk, as strictly as Linux does.

    Args:
        data: the beginning of the disk, up to its first MiB.

    Returns:
        The partitions in the order of the table.

    Raises:
        FormatError: no table, a wrong checksum, or partitions that overlap or lie outside.
    """
    view = View(data)
    if view.unpack(MBR, 0, "protective MBR")[-1] != MBR_END:
        raise BadMagic("no protective MBR", offset=MBR.size - 2)
    where = HEADER_LBA * SECTOR_SIZE
    fields = view.unpack(HEADER, where, "GPT header")
    signature, _, size, checksum, _, here, _, first, last, _, lba, count, entry_size, total = fields
    if signature != SIGNATURE:
        raise BadMagic("no GPT header", offset=where, got=signature)
    plain = HEADER.pack(*fields[:3], 0, *fields[4:])
    if size != HEADER.size or here != HEADER_LBA or zlib.crc32(plain) != checksum:
        raise CorruptStructure("checksum or place of the GPT header", offset=where)
    if entry_size != ENTRY.size or not 1 <= count <= MAX_PARTITIONS or lba > HEAD_SECTORS:
        raise CorruptStructure("table of GPT partitions", offset=where)
    table = view.slice(lba * SECTOR_SIZE, count * entry_size, "GPT partitions")
    if zlib.crc32(table) != total:
        raise CorruptStructure("checksum of the GPT partitions", offset=lba * SECTOR_SIZE)
    entries: list[GptEntry] = []
    for number in range(count):
        kind, guid, start, end, _, name = ENTRY.unpack_from(table, number * entry_size)
        if not any(kind):
            continue
        if not first <= start <= end <= last:
            raise CorruptStructure(f"GPT partition {number + 1}", got=f"sectors {start} to {end}")
        text = name.decode("utf-16-le", errors="replace").partition("\0")[0]
        entries.append(
            GptEntry(uuid.UUID(bytes_le=kind), uuid.UUID(bytes_le=guid), text, start, end)
        )
    _require_apart(entries)
    return entries


def _require_apart(entries: list[GptEntry]) -> None:
    before = -1
    for entry in sorted(entries, key=lambda one: one.first):
        if entry.first <= before:
            raise CorruptStructure(
                "GPT partitions overlap", got=f"sectors {entry.first} to {entry.last}"
            )
        before = entry.last
