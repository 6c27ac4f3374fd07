"""The mounts that this process sees, as the kernel lists them.

Anybody who may mount something, a user by FUSE, too, chooses names here: of all bytes, only
blanks, tabs, line feeds and backslashes are escaped.
Source: Linux `Documentation/filesystems/proc.rst` 3.5, `fs/proc_namespace.c`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["MountLine", "mounts", "parse_mountinfo"]

_MOUNTINFO = Path("/proc/self/mountinfo")


class MountLine(NamedTuple):
    """One mount: its number, that of the mount it is on, and where; `device` is its `st_dev`.

    `kind` is the type of the file system, `source` what it was given as such, `options` its own.
    """

    id: bytes
    parent: bytes
    mountpoint: bytes
    device: int
    kind: str
    source: str
    options: bytes


def parse_mountinfo(content: bytes) -> Iterator[MountLine]:
    """Yield what the lines say, in their order: of two mounts at one place the later is on top."""
    # Not by what Python takes for white space or ends of lines: those may be in names.
    for line in content.split(b"\n"):
        head, mark, tail = line.partition(b" - ")
        if not mark:
            continue
        number, parent, device, _, mountpoint, *_ = head.split(b" ")
        kind, source, options = tail.split(b" ", 2)
        yield MountLine(
            number,
            parent,
            _unescape(mountpoint),
            os.makedev(*map(int, device.split(b":"))),
            os.fsdecode(kind),
            os.fsdecode(_unescape(source)),
            options,
        )


def mounts() -> Iterator[MountLine]:
    """Yield the mounts of now."""
    return parse_mountinfo(_MOUNTINFO.read_bytes())


def _unescape(field: bytes) -> bytes:
    """Undo the octal escapes."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 0xFF]), field)
