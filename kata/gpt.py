"""The GUID partition table of a disk of layers: the first MiB, and nothing at the end.

The disk is read-only and lives as long as its VM, so there is no second table. GUIDs follow
from the content: the same layers give the same bytes.
Source: spec vm-runtimes 2.7 (kata-types `gpt_disk.rs`); UEFI specification 2.10, chapter 5.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from erofs.errors import BadMagic, CorruptStructure
from erofs.view import View, align_up
from kata.errors import OptionError

__all__ = ["HEAD_SECTORS", "MAX_PARTITIONS", "Partition", "parse_gpt", "place", "write_gpt"]

SECTOR_SIZE = 512
HEAD_SECTORS = 2048
ALIGNMENT_SECTORS = 2048
MAX_PARTITIONS = 128
_MAX_NAME = 36
_HEADER_LBA = 1
_ENTRIES_LBA = 2
_ENTRY_SIZE = 128
_REVISION = 0x00010000
_SIGNATURE = b"EFI PART"
_LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
_MAX_SECTORS = 1 << 40

# Bootstrap code, then one record of 16 bytes, room for three more, and 55 AA.
_MBR = struct.Struct("<446sB3sB3sII48sH")
_MBR_END = 0xAA55
_PROTECTIVE = 0xEE
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")


class Partition(NamedTuple):
    """A partition: name, first sector and length; `number` counts from 1 by position."""

    name: str
    first: int
    sectors: int

    @property
    def last(self) -> int:
        """The last sector that belongs to it."""
        return self.first + self.sectors - 1


def place(names: Sequence[str], sizes: Sequence[int]) -> list[Partition]:
    """Return partitions for pieces of so many sectors, each on a boundary of 1 MiB.

    Raises:
        OptionError: none, too many, or one without content.
    """
    if not 1 <= len(sizes) <= MAX_PARTITIONS or len(names) != len(sizes):
        raise OptionError("partitions", expected=f"1 to {MAX_PARTITIONS}", got=len(sizes))
    partitions: list[Partition] = []
    first = HEAD_SECTORS
    for name, sectors in zip(names, sizes, strict=True):
        if not 1 <= sectors <= _MAX_SECTORS:
            raise OptionError("sectors of a partition", got=sectors)
        partitions.append(Partition(name[:_MAX_NAME], first, sectors))
        first = align_up(first + sectors, ALIGNMENT_SECTORS)
    return partitions


def _guid(*parts: object) -> bytes:
    digest = hashlib.sha256("\0".join(map(str, parts)).encode(errors="replace")).digest()
    # Version 8 of RFC 9562: made in a way of our own.
    value = bytearray(digest[:16])
    value[6] = value[6] & 0x0F | 0x80
    value[8] = value[8] & 0x3F | 0x80
    return uuid.UUID(bytes=bytes(value)).bytes_le


def _entry(number: int, partition: Partition) -> bytes:
    name = partition.name.encode("utf-16-le", errors="replace")
    if len(name) > 2 * _MAX_NAME:
        raise OptionError("name of a partition", expected=f"{_MAX_NAME} characters")
    unique = _guid("partition", number, *partition)
    return _ENTRY.pack(_LINUX.bytes_le, unique, partition.first, partition.last, 0, name)


def write_gpt(partitions: Sequence[Partition]) -> bytes:
    """Return the first MiB of a disk that ends with its last partition."""
    entries = b"".join(_entry(number, item) for number, item in enumerate(partitions, 1))
    entries = entries.ljust(MAX_PARTITIONS * _ENTRY_SIZE, b"\0")
    last = partitions[-1].last

    def header(checksum: int) -> bytes:
        return _HEADER.pack(
            _SIGNATURE, _REVISION, _HEADER.size, checksum, 0,
            # The second table would be just behind the disk: readers see that there is none.
            _HEADER_LBA, last + 1, HEAD_SECTORS, last,
            _guid("disk", *partitions), _ENTRIES_LBA, MAX_PARTITIONS, _ENTRY_SIZE,
            zlib.crc32(entries),
        )  # fmt: skip

    mbr = _MBR.pack(
        b"", 0, b"\0\2\0", _PROTECTIVE, b"\xff\xff\xff", 1, min(last, 0xFFFFFFFF), b"", _MBR_END
    )
    head = mbr + header(zlib.crc32(header(0))).ljust(SECTOR_SIZE, b"\0") + entries
    return head.ljust(HEAD_SECTORS * SECTOR_SIZE, b"\0")


def parse_gpt(data: bytes) -> list[Partition]:
    """Decode the first table of a disk, as strictly as Linux does.

    Raises:
        FormatError: no table, a wrong checksum, or partitions that overlap or lie outside.
    """
    view = View(data)
    if view.unpack(_MBR, 0, "protective MBR")[-1] != _MBR_END:
        raise BadMagic("no protective MBR", offset=_MBR.size - 2)
    where = _HEADER_LBA * SECTOR_SIZE
    fields = view.unpack(_HEADER, where, "GPT header")
    signature, _, size, checksum, _, here, _, first, last, _, lba, count, entry_size, total = fields
    if signature != _SIGNATURE:
        raise BadMagic("no GPT header", offset=where, got=signature)
    plain = _HEADER.pack(*fields[:3], 0, *fields[4:])
    if size != _HEADER.size or here != _HEADER_LBA or zlib.crc32(plain) != checksum:
        raise CorruptStructure("checksum or place of the GPT header", offset=where)
    if entry_size != _ENTRY_SIZE or not 1 <= count <= MAX_PARTITIONS or lba > HEAD_SECTORS:
        raise CorruptStructure("table of GPT partitions", offset=where)
    table = view.slice(lba * SECTOR_SIZE, count * entry_size, "GPT partitions")
    if zlib.crc32(table) != total:
        raise CorruptStructure("checksum of the GPT partitions", offset=lba * SECTOR_SIZE)
    partitions: list[Partition] = []
    for number in range(count):
        kind, _, start, end, _, name = _ENTRY.unpack_from(table, number * entry_size)
        if not any(kind):
            continue
        before = partitions[-1].last if partitions else first - 1
        if not before < start <= end <= last:
            raise CorruptStructure(f"GPT partition {number + 1}", got=f"sectors {start} to {end}")
        text = name.decode("utf-16-le", errors="replace").partition("\0")[0]
        partitions.append(Partition(text, start, end - start + 1))
    return partitions
