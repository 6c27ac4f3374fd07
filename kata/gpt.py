"""The GUID partition table of a disk of layers: the first MiB, and nothing at the end.

The disk is read-only and lives as long as its VM, so there is no second table. GUIDs follow
from the content: the same layers give the same bytes.
Source: spec vm-runtimes 2.7 (kata-types `gpt_disk.rs`); UEFI specification 2.10, chapter 5.
"""

from __future__ import annotations

import hashlib
import uuid
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from erofs.errors import CorruptStructure
from erofs.gpt import (
    ENTRY,
    HEAD_SECTORS,
    HEADER,
    HEADER_LBA,
    MAX_PARTITIONS,
    MBR,
    MBR_END,
    SECTOR_SIZE,
    SIGNATURE,
)
from erofs.gpt import parse_gpt as read_entries
from erofs.view import align_up
from kata.errors import OptionError

__all__ = ["HEAD_SECTORS", "MAX_PARTITIONS", "Partition", "parse_gpt", "place", "write_gpt"]

ALIGNMENT_SECTORS = 2048
_MAX_NAME = 36
_ENTRIES_LBA = 2
_REVISION = 0x00010000
_LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
_MAX_SECTORS = 1 << 40

_PROTECTIVE = 0xEE


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
    return ENTRY.pack(_LINUX.bytes_le, unique, partition.first, partition.last, 0, name)


def write_gpt(partitions: Sequence[Partition]) -> bytes:
    """Return the first MiB of a disk that ends with its last partition."""
    entries = b"".join(_entry(number, item) for number, item in enumerate(partitions, 1))
    entries = entries.ljust(MAX_PARTITIONS * ENTRY.size, b"\0")
    last = partitions[-1].last

    def header(checksum: int) -> bytes:
        return HEADER.pack(
            SIGNATURE, _REVISION, HEADER.size, checksum, 0,
            # The second table would be just behind the disk: readers see that there is none.
            HEADER_LBA, last + 1, HEAD_SECTORS, last,
            _guid("disk", *partitions), _ENTRIES_LBA, MAX_PARTITIONS, ENTRY.size,
            zlib.crc32(entries),
        )  # fmt: skip

    mbr = MBR.pack(
        b"", 0, b"\0\2\0", _PROTECTIVE, b"\xff\xff\xff", 1, min(last, 0xFFFFFFFF), b"", MBR_END
    )
    head = mbr + header(zlib.crc32(header(0))).ljust(SECTOR_SIZE, b"\0") + entries
    return head.ljust(HEAD_SECTORS * SECTOR_SIZE, b"\0")


def parse_gpt(data: bytes) -> list[Partition]:
    """Decode the first table of a disk, whose partitions have to be in order.

    Raises:
        FormatError: no table, a wrong checksum, or partitions that overlap or lie outside.
    """
    partitions = [
        Partition(entry.name, entry.first, entry.last - entry.first + 1)
        for entry in read_entries(data)
    ]
    if partitions != sorted(partitions, key=lambda one: one.first):
        raise CorruptStructure("GPT partitions are not in order")
    return partitions
