"""The errors of the whole project: one root, and the leaves that formats raise.

Every error says what went wrong and where. Inner code knows offsets, outer code
adds the path, the blob or the chunk through `error_context`; only a `cli` and the
owner of a kernel reply catch `NydusError`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "BadMagic",
    "CodecError",
    "CorruptStructure",
    "FormatError",
    "IntegrityError",
    "NydusError",
    "OutOfBounds",
    "UnsupportedFeature",
    "error_context",
]

_PLACES = ("path", "entry", "blob", "chunk", "offset")


def _show(value: object) -> str:
    if isinstance(value, bytes):
        return repr(value)[2:-1]
    return str(value)


class NydusError(Exception):
    """Root of all expected failures.

    Args:
        what: what went wrong, one clause, without a place.
        where: any of `path`, `entry`, `blob`, `chunk`, `offset` (bytes), and
            `expected` and `got`.
    """

    exit_code = 1
    errno = errno.EIO

    def __init__(self, what: str, **where: object) -> None:
        super().__init__(what)
        self.what = what
        self.where = {key: value for key, value in where.items() if value is not None}

    def add_context(self, **where: object) -> None:
        """Add places that the raising code did not know; known ones stay."""
        for key, value in where.items():
            if value is not None:
                self.where.setdefault(key, value)

    @property
    def reason(self) -> str:
        """What went wrong with `expected` and `got`, without the place."""
        text = self.what
        if "expected" in self.where:
            text += f": expected {_show(self.where['expected'])}"
            if "got" in self.where:
                text += f", got {_show(self.where['got'])}"
        elif "got" in self.where:
            text += f": got {_show(self.where['got'])}"
        return text

    def __str__(self) -> str:
        places = []
        for key in _PLACES:
            value = self.where.get(key)
            if value is None:
                continue
            if key == "path":
                places.append(_show(value))
            elif key == "offset" and isinstance(value, int):
                places.append(f"offset {value:#x}")
            else:
                places.append(f"{key} {_show(value)}")
        return f"{', '.join(places)}: {self.reason}" if places else self.reason


class FormatError(NydusError):
    """Bytes that are not what the format says; parsing raises nothing else."""


class BadMagic(FormatError):
    """Not the kind of structure that was looked for."""


class UnsupportedFeature(FormatError):
    """A valid structure that this code does not read."""


class OutOfBounds(FormatError):
    """A length, offset or count that points outside of what holds it."""


class CorruptStructure(FormatError):
    """Fields that contradict each other or the format."""


class IntegrityError(NydusError):
    """Data that does not have the digest, checksum or length it was promised to have."""


class CodecError(NydusError):
    """Data that does not decompress, or a codec that is not there."""


@contextmanager
def error_context(**where: object) -> Iterator[None]:
    """Add places to every `NydusError` that leaves the block."""
    try:
        yield
    except NydusError as error:
        error.add_context(**where)
        raise
