"""Where things are on the disk of a guest image: sizes, partitions, and the header for DAX.

Source: spec vm-runtimes 6.1 (osbuilder `image_builder.sh`, `nsdax.gpl.c`).
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from guestimage.programs import run

__all__ = ["DAX_BYTES", "MIB", "Layout", "Table", "dax_header", "plan", "write_table"]

MIB = 1 << 20
SECTOR_BYTES = 512
# The header that makes readers of persistent memory skip to the second partition table.
DAX_BYTES = 2 * MIB
_PFN_OFFSET = 4096
_PFN_BYTES = 4096
_CHECKSUM_OFFSET = 4088
_MODE_RAM = 1
# signature, uuid and parent's, flags, version, offset of data, frames, mode, padding, alignment.
_PFN = struct.Struct("<16s16s16sIHHQQIIII")
_PFN_SIGNATURE = b"NVDIMM_PFN_INFO\0"
_MBR = struct.Struct("<446s B3sB3sII 48s H")
_MBR_LINUX = 0x83
_MBR_END = 0xAA55
# Of sectors that no CHS address reaches.
_NO_CHS = b"\xfe\xff\xff"


class Table(StrEnum):
    """Kinds of partition tables; Kata's builder writes msdos, newer guests take either."""

    GPT = "gpt"
    MSDOS = "msdos"


class Layout(NamedTuple):
    """Sizes and places in MiB; the second partition is empty without verity."""

    disk: int
    data_end: int
    hash_end: int

    @property
    def data_bytes(self) -> int:
        """The first partition, which begins at 1 MiB."""
        return (self.data_end - 1) * MIB

    @property
    def hash_bytes(self) -> int:
        """The second partition."""
        return (self.hash_end - self.data_end) * MIB


def plan(filesystem_bytes: int, table: Table, *, measured: bool) -> Layout:
    """Return the layout for a filesystem of so many bytes."""
    end = (filesystem_bytes + MIB) // MIB + 1 + 1
    data_end = end
    if measured:
        end = end * 100 // 99 + 1
        data_end = end * 99 // 100
    # A GPT has a copy at the end of the disk, for which Kata's builder has no room.
    return Layout(end + (table is Table.GPT), data_end, end)


def _guid(*parts: object) -> str:
    """Return a GUID that depends on nothing but the arguments."""
    value = bytearray(hashlib.sha256(repr(parts).encode()).digest()[:16])
    # Version 8 of RFC 9562: made in a way of our own.
    value[6] = value[6] & 0x0F | 0x80
    value[8] = value[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(value)))


def write_table(disk: Path, layout: Layout, table: Table, seed: str) -> None:
    """Write the partition table of a disk that has its size already; raise `GuestImageError`.

    Args:
        disk: the file, without a header for DAX.
        layout: of the disk.
        table: its kind.
        seed: what identifiers are made from: the same gives the same bytes.
    """
    sizes = [("rootfs", 1, layout.data_end - 1)]
    if layout.hash_bytes:
        sizes.append(("hash", layout.data_end, layout.hash_end - layout.data_end))
    if table is Table.GPT:
        head = f"label: gpt\nlabel-id: {_guid('disk', seed)}\n"
    else:
        number = hashlib.sha256(seed.encode()).hexdigest()[:8]
        head = f"label: dos\nlabel-id: 0x{number}\n"
    lines = []
    for name, start, size in sizes:
        words = [f"start={start}MiB", f"size={size}MiB"]
        if table is Table.GPT:
            words += ["type=linux", f"name={name}", f"uuid={_guid(name, seed)}"]
        else:
            words += ["type=83", *(["bootable"] if name == "rootfs" else [])]
        lines.append(", ".join(words))
    script = head + "\n".join(lines) + "\n"
    words = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel"]
    run([*words, disk], "fdisk", script=script)


def _fletcher64(data: bytes) -> int:
    low = high = 0
    for (word,) in struct.iter_unpack("<I", data):
        low = (low + word) & 0xFFFFFFFF
        high = (high + low) & 0xFFFFFFFF
    return high << 32 | low


def _pfn_superblock() -> bytes:
    fields = _PFN.pack(
        _PFN_SIGNATURE, bytes(16), bytes(16), 0, 0, 2, DAX_BYTES, 0, _MODE_RAM, 0, 0, DAX_BYTES
    )
    block = bytearray(fields.ljust(_PFN_BYTES, b"\0"))
    struct.pack_into("<Q", block, _CHECKSUM_OFFSET, _fletcher64(bytes(block)))
    return bytes(block)


def dax_header(layout: Layout) -> bytes:
    """Return the 2 MiB that come in front of a disk that guests map as persistent memory.

    It begins with a table of its own, for readers that do not know such memory.
    """
    start = (DAX_BYTES + MIB) // SECTOR_BYTES
    sectors = layout.data_bytes // SECTOR_BYTES
    mbr = _MBR.pack(b"", 0, _NO_CHS, _MBR_LINUX, _NO_CHS, start, sectors, b"", _MBR_END)
    return (mbr.ljust(_PFN_OFFSET, b"\0") + _pfn_superblock()).ljust(DAX_BYTES, b"\0")
