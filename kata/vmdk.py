"""VMDK descriptors of flat extents: several files in a row as one disk, nothing copied.

Source: spec vm-runtimes 2.7; read by QEMU's `block/vmdk.c`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from kata.errors import OptionError

__all__ = ["Extent", "file_extents", "parse_descriptor", "write_descriptor"]

SECTOR_SIZE = 512
# `twoGbMaxExtentFlat` says so.
MAX_EXTENT_SECTORS = (2 << 30) // SECTOR_SIZE
# 128 partitions of 64 GiB each.
MAX_EXTENTS = 8192
MAX_DESCRIPTOR_BYTES = 4 << 20
_HEAD = (
    "# Disk DescriptorFile",
    "version=1",
    "CID=fffffffe",
    "parentCID=ffffffff",
    'createType="twoGbMaxExtentFlat"',
)
_EXTENT = re.compile(r'RW ([0-9]{1,10}) FLAT "([^"\x00-\x1f]+)" ([0-9]{1,15})\Z')


class Extent(NamedTuple):
    """A piece of a file: its place on the disk follows from those before."""

    path: str
    sectors: int
    offset_sectors: int = 0


def file_extents(path: str, size_bytes: int) -> list[Extent]:
    """Return the extents of a whole file: its size rounded up to sectors, in pieces of 2 GiB."""
    total = -(-size_bytes // SECTOR_SIZE)
    return [
        Extent(path, min(MAX_EXTENT_SECTORS, total - start), start)
        for start in range(0, total, MAX_EXTENT_SECTORS)
    ]


def write_descriptor(extents: Iterable[Extent]) -> str:
    """Return the text of a descriptor.

    Raises:
        OptionError: no extent, a name that cannot be quoted, or an impossible size.
    """
    wanted = list(extents)
    lines = [f'RW {item.sectors} FLAT "{item.path}" {item.offset_sectors}' for item in wanted]
    text = "\n".join([*_HEAD, *lines, ""])
    # A quote or a line end in a name would make it another disk.
    if parse_descriptor(text) != wanted:
        raise OptionError("names of files that a VMDK descriptor cannot hold")
    return text


def parse_descriptor(text: str) -> list[Extent]:
    """Decode a descriptor like ours; comments and keys without a meaning here are passed over.

    Raises:
        OptionError: another kind of disk, or a line that is none.
    """
    if len(text) > MAX_DESCRIPTOR_BYTES:
        raise OptionError("a VMDK descriptor", expected=f"at most {MAX_DESCRIPTOR_BYTES} bytes")
    lines = text.split("\n")
    if lines[0] != _HEAD[0] or _HEAD[4] not in lines:
        raise OptionError("not a VMDK descriptor of flat extents")
    extents: list[Extent] = []
    for number, line in enumerate(lines[1:], 2):
        if not line or line.startswith("#") or re.match(r"[A-Za-z.]+ ?=", line):
            continue
        match = _EXTENT.match(line)
        if match is None:
            raise OptionError(f"line {number} of a VMDK descriptor is not a flat extent")
        extent = Extent(match[2], int(match[1]), int(match[3]))
        if not 1 <= extent.sectors <= MAX_EXTENT_SECTORS:
            expected = f"1 to {MAX_EXTENT_SECTORS} sectors"
            raise OptionError(f"line {number}", expected=expected, got=extent.sectors)
        extents.append(extent)
    if not 1 <= len(extents) <= MAX_EXTENTS:
        raise OptionError("extents", expected=f"1 to {MAX_EXTENTS}", got=len(extents))
    return extents
