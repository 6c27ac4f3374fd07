"""Build from the table of contents of an eStargz layer alone; the layer is not looked at.

Each chunk is the beginning of a member of gzip of its own (spec rafs-v6 4.10; stargz-snapshotter
docs/estargz.md "TOC").
"""

from __future__ import annotations

import base64
import json
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from builder.errors import BuildError
from builder.source.opening import open_source, source_name
from builder.source.options import SourceOptions
from builder.source.tar import TreeLoader
from builder.tarstream import TarMember
from erofs import Node
from erofs.errors import error_context
from erofs.rafs import MAX_CHUNK_SIZE, MAX_CHUNKS_PER_BLOB

__all__ = ["StargzFile", "StargzToc", "TocChunk", "read_toc"]

_MAX_SIZE = 1 << 28
_MAX_NUMBER = (1 << 63) - 1
_MAX_U32 = (1 << 32) - 1
# Go writes up to nine digits of a second, where Python takes six.
_TIME = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8})(?:\.([0-9]{1,9}))?(Z|[+-][0-9:]{5})")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_KINDS = {
    "dir": stat.S_IFDIR,
    "reg": stat.S_IFREG,
    "symlink": stat.S_IFLNK,
    "hardlink": stat.S_IFREG,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
}
# No member of gzip is larger for so many bytes: five for each block, header and trailer, and
# what the tar has in front of the next file.
_BLOCK_SIZE, _BLOCK_EXTRA, _MEMBER_EXTRA = 16384, 5, 151


@dataclass(slots=True)
class TocChunk:
    """A piece of a file: where its member of gzip begins, and how long that may be."""

    offset: int
    size: int
    digest: bytes
    stored_size: int = 0


@dataclass(slots=True)
class StargzFile:
    """A regular file and its chunks, in order."""

    node: Node
    chunks: list[TocChunk] = field(default_factory=list)


@dataclass(slots=True)
class StargzToc:
    """What a table of contents says: the tree, and the files that have content, in order."""

    root: Node
    files: list[StargzFile]


class _Entry:
    """One object of the list, whose fields have the types that they should have."""

    def __init__(self, values: object) -> None:
        if not isinstance(values, dict):
            raise BuildError("entry that is no object")
        self._values: Mapping[str, Any] = values

    def text(self, key: str) -> str:
        value = self._values.get(key, "")
        if not isinstance(value, str):
            raise BuildError(f"'{key}' is no text")
        return value

    def path(self, key: str) -> bytes:
        # Go writes names that are not UTF-8 with replacement characters; nothing brings them back.
        name = self.text(key).encode("utf-8", "surrogatepass")
        if b"\0" in name:
            raise BuildError(f"'{key}' has a zero byte")
        return name

    def number(self, key: str, most: int = _MAX_NUMBER) -> int:
        value = self._values.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise BuildError(f"'{key}' is no number that it can be", got=str(value)[:40])
        return value

    def digest(self, key: str) -> bytes | None:
        text = self.text(key)
        found = _DIGEST.fullmatch(text)
        if text and found is None:
            raise BuildError(f"'{key}' is no SHA-256", got=text[:100])
        return None if found is None else bytes.fromhex(found[1])

    def xattrs(self) -> dict[bytes, bytes]:
        found = self._values.get("xattrs") or {}
        if not isinstance(found, dict):
            raise BuildError("'xattrs' is no object")
        try:
            return {
                key.encode(): base64.b64decode(text, validate=True) for key, text in found.items()
            }
        except (ValueError, TypeError) as error:
            raise BuildError("xattr that is not base64") from error

    def time(self, key: str) -> tuple[int, int]:
        """Return seconds and nanoseconds; no time is 0."""
        text = self.text(key)
        found = _TIME.fullmatch(text)
        if not text:
            return 0, 0
        try:
            if found is None:
                raise ValueError(text)
            moment = datetime.fromisoformat(found[1] + found[3])
            return int(moment.timestamp()), int((found[2] or "")[:9].ljust(9, "0"))
        except (ValueError, OverflowError) as error:
            raise BuildError(f"'{key}' is no time", got=text[:40]) from error


def _member(entry: _Entry, kind: str) -> TarMember:
    seconds, nanoseconds = entry.time("modtime")
    return TarMember(
        path=entry.path("name"),
        kind=_KINDS[kind],
        is_hardlink=kind == "hardlink",
        link=entry.path("linkName"),
        mode=entry.number("mode") & 0o7777,
        uid=entry.number("uid", _MAX_U32),
        gid=entry.number("gid", _MAX_U32),
        mtime=seconds,
        pax_mtime=(seconds, nanoseconds),
        major=entry.number("devMajor", _MAX_U32),
        minor=entry.number("devMinor", _MAX_U32),
        size=entry.number("size") if kind == "reg" else 0,
        xattrs=entry.xattrs(),
        offset=entry.number("offset"),
        stored_size=0,
    )


class _Reader:
    """Takes the entries one by one; chunks belong to the file before them."""

    def __init__(self, name: str, chunk_size: int, options: SourceOptions) -> None:
        self._loader = TreeLoader(name, options)
        self._chunk_size = chunk_size
        self._file: StargzFile | None = None
        # Of the file that chunks belong to, also of one that is not taken.
        self._size = 0
        self._whole: bytes | None = None
        self._chunks: list[TocChunk] = []
        self._files: list[StargzFile] = []
        self._all: list[TocChunk] = []

    def take(self, entry: _Entry) -> None:
        """Add an entry; raise `BuildError`."""
        kind = entry.text("type")
        if kind == "chunk":
            self._add_chunk(entry)
            return
        self._end_file()
        if kind not in _KINDS:
            raise BuildError("unknown type", got=kind[:40])
        member = _member(entry, kind)
        node = self._loader.add(member)
        if kind != "reg":
            return
        self._size, self._whole = member.size, entry.digest("digest")
        if node is not None and member.size:
            self._file = StargzFile(node)
        if member.size:
            self._add_chunk(entry)

    def _add_chunk(self, entry: _Entry) -> None:
        if entry.number("innerOffset"):
            raise BuildError("several files in one member of gzip, which cannot be referred to")
        place = len(self._chunks) * self._chunk_size
        rest = self._size - place
        size = entry.number("chunkSize") or rest
        if entry.number("chunkOffset") != place or size != min(rest, self._chunk_size) or not size:
            raise BuildError(
                "file is cut in another way: give the layer's --chunk-size",
                expected=f"{min(rest, self._chunk_size)} bytes at {place}",
                got=f"{size} bytes at {entry.number('chunkOffset')}",
            )
        digest = entry.digest("chunkDigest")
        if digest is None and size == self._size:
            digest = self._whole
        if digest is None:
            raise BuildError("chunk without a digest")
        self._chunks.append(TocChunk(entry.number("offset"), size, digest))

    def _end_file(self) -> None:
        have = sum(chunk.size for chunk in self._chunks)
        if have != self._size:
            raise BuildError("chunks of a file are missing", expected=self._size, got=have)
        self._all += self._chunks
        if self._file is not None:
            self._file.chunks = self._chunks
            self._files.append(self._file)
        self._file, self._chunks, self._size = None, [], 0

    def finish(self) -> tuple[StargzToc, list[TocChunk]]:
        """Return what was found, and all chunks, also those that no file has."""
        self._end_file()
        return StargzToc(self._loader.finish(), self._files), self._all


def _settle_sizes(chunks: Sequence[TocChunk], data_size: int | None) -> None:
    """Tell how much has to be read for each chunk: at most up to the next one."""
    if len(chunks) > MAX_CHUNKS_PER_BLOB:
        raise BuildError("too many chunks for one blob", expected=MAX_CHUNKS_PER_BLOB)
    for chunk, following in zip_longest(chunks, chunks[1:]):
        most = chunk.size + chunk.size // _BLOCK_SIZE * _BLOCK_EXTRA + _MEMBER_EXTRA
        end = data_size if following is None else following.offset
        size = most if end is None else min(most, end - chunk.offset)
        if size == chunk.size:
            # Tables of this kind would take it for not compressed; at its end is the trailer.
            size -= 1
        if not 0 < size <= MAX_CHUNK_SIZE:
            raise BuildError("chunk at an impossible place of the layer", offset=chunk.offset)
        chunk.stored_size = size


def read_toc(
    source: Path | BinaryIO, chunk_size: int, data_size: int | None, options: SourceOptions
) -> StargzToc:
    """Read a table of contents, as JSON.

    Args:
        source: a file, FIFO or stream.
        chunk_size: into which the layer's files are cut.
        data_size: length of the layer, as far as it is known.
        options: what to take from it.

    Raises:
        BuildError: not such a table, or one that cannot be expressed; names the entry.
    """
    name = source_name(source)
    with open_source(source) as stream:
        text = stream.read(_MAX_SIZE + 1)
        if len(text) > _MAX_SIZE:
            raise BuildError("table of contents is too large", expected=_MAX_SIZE)
        reader = _Reader(name, chunk_size, options)
        for number, values in enumerate(_entries(text)):
            label = values.get("name", number) if isinstance(values, dict) else number
            with error_context(entry=label):
                reader.take(_Entry(values))
        toc, chunks = reader.finish()
        _settle_sizes(chunks, data_size)
    return toc


def _entries(text: bytes) -> list[object]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BuildError(f"table of contents is not JSON ({error})") from error
    entries = values.get("entries") if isinstance(values, dict) else None
    if not isinstance(entries, list) or values.get("version") != 1:
        raise BuildError("no table of contents of eStargz, version 1")
    return entries
