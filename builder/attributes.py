"""`.nydusattributes`: which files of a directory have their content elsewhere (spec 4.11).

A line is a path and what is said of it, as in gitattributes: `models/a type=external
blob_id=… …`. Paths are literal; nothing is matched by wildcards.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from builder.errors import BuildError

__all__ = ["Attributes", "ExternalFile", "parse_attributes"]

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SIZE = re.compile(r"(\d+)\s*((?:[kmg]i?)?)b?", re.IGNORECASE)
_BLOB_ID_LENGTH = 64


class ExternalFile(NamedTuple):
    """Where the content of a file is: offsets and sizes in bytes of an external blob.

    `size` is that of the file, None for what the directory says; `crcs` has a CRC-32C for
    each chunk, or nothing.
    """

    blob_index: int
    blob_id: str
    blob_size: int
    chunk_size: int
    offset: int
    size: int | None = None
    crcs: tuple[int, ...] = ()


class Attributes(NamedTuple):
    """External files by absolute in-image path."""

    files: Mapping[bytes, ExternalFile]


def parse_attributes(path: Path) -> Attributes:
    """Read a file of attributes.

    Raises:
        BuildError: it cannot be read, or a line is not understood; names the line.
    """
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise BuildError(f"attributes cannot be read ({error.strerror})", path=path) from error
    files = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = _parse_line(line.strip())
        except ValueError as error:
            raise BuildError(f"line {number} of the attributes: {error}", path=path) from error
        if found is not None:
            files[found[0]] = found[1]
    return Attributes(files)


def _parse_line(line: str) -> tuple[bytes, ExternalFile] | None:
    """Return path and description of an external file; raise `ValueError`."""
    if not line or line.startswith("#"):
        return None
    pattern, rest = _split_pattern(line)
    values = dict(word.partition("=")[::2] for word in rest.split())
    # A directory is marked so as well, by those who copy what the original tool makes of it.
    if values.pop("type", None) != "external" or not values:
        return None
    path = "/" + "/".join(part for part in pattern.split("/") if part not in ("", "."))
    return path.encode("utf-8", "surrogateescape"), _external(values)


def _split_pattern(line: str) -> tuple[str, str]:
    """Return the path, which may be in double quotes, and the rest."""
    if not line.startswith('"'):
        pattern, _, rest = line.replace("\t", " ").partition(" ")
        return pattern, rest
    end = re.match(r'"(?:[^"\\]|\\.)*"', line)
    if end is None:
        raise ValueError("quotes that do not end")
    return shlex.split(end[0])[0], line[end.end() :]


def _external(values: Mapping[str, str]) -> ExternalFile:
    blob_id = values.get("blob_id", "")
    if len(blob_id) != _BLOB_ID_LENGTH or not blob_id.isascii() or "/" in blob_id:
        raise ValueError(f"blob_id of {_BLOB_ID_LENGTH} characters is needed, got '{blob_id}'")
    return ExternalFile(
        blob_index=_number(values, "blob_index"),
        blob_id=blob_id,
        blob_size=_number(values, "compressed_size"),
        chunk_size=_size(values, "chunk_size"),
        offset=_number(values, "chunk_0_compressed_offset"),
        size=_number(values, "file_size") if "file_size" in values else None,
        crcs=tuple(_crc(text) for text in values.get("crcs", "").split(",") if text),
    )


def _number(values: Mapping[str, str], key: str) -> int:
    text = values.get(key, "")
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise ValueError(f"{key} is not a number: '{text}'")
    return int(text)


def _size(values: Mapping[str, str], key: str) -> int:
    text = values.get(key, "")
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(f"{key} is not a size: '{text}'")
    return int(found[1]) * _UNITS[found[2].lower()]


def _crc(text: str) -> int:
    if not re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", text):
        raise ValueError(f"crcs has what is no CRC-32C: '{text}'")
    return int(text, 16)
