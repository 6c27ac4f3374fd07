"""Forward-only walker over a tar stream: members one after the other, content on demand.

All reading of the stream happens here; what the bytes mean is decided in
`builder.tarheader`. Opening and decompressing sources is not done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from builder.errors import TarError
from builder.tarheader import (
    BLOCK_SIZE,
    TYPE_GLOBAL_PAX,
    TYPE_LONG_LINK,
    TYPE_LONG_NAME,
    TYPE_PAX,
    TYPE_SOLARIS_PAX,
    TYPE_VOLUME_LABEL,
    TarHeader,
    TarMember,
    build_member,
    parse_header,
    parse_sparse_extension,
)
from builder.tarpax import parse_pax
from builder.tarsparse import MAX_EXTENTS, Extent, MapText, SparseMap, check_map
from erofs import error_context

__all__ = ["ByteStream", "TarError", "TarMember", "TarStream"]

_ZERO_BLOCK = bytes(BLOCK_SIZE)
_SKIP_SIZE = 1 << 20
# Up to here a stream's own buffer is the fastest way; above, another copy is the slowest.
_SMALL_READ = 64 << 10
_MAX_GLOBAL_RECORDS = 1 << 20
# Content limits of the members that describe other members.
_BODY_LIMITS = {
    TYPE_LONG_LINK: 1 << 20,
    TYPE_LONG_NAME: 1 << 20,
    TYPE_SOLARIS_PAX: 16 << 20,
    TYPE_GLOBAL_PAX: 16 << 20,
    TYPE_PAX: 16 << 20,
}
_AUXILIARY = frozenset((*_BODY_LIMITS, TYPE_VOLUME_LABEL))


class ByteStream(Protocol):
    """What is needed of a stream: pipes, files and decompressors have it.

    Both may return fewer bytes than asked for, and none only at the end.
    """

    def read(self, size: int, /) -> bytes: ...  # noqa: D102 -- as in io.BufferedIOBase
    def readinto(self, buffer: memoryview, /) -> int: ...  # noqa: D102


class TarStream:
    """Iterate over the members of a tar archive, reading forward only.

    Going to the next member skips what was not read of the current one. Iteration
    ends at the end marker, and nothing behind it is read; an archive that just stops
    where a header would begin is accepted, as by GNU tar and the real builder. Sparse
    members are read as they are in a file, with zeros in their holes. After an error
    iteration is over.

    Args:
        stream: source of bytes, best with a large buffer; not closed.
        name: what to call the source in errors.
        seek: skips bytes of a stream that has `length` of them in all; without it they are read.

    Raises:
        TarError: from iteration and reading, with source, entry and byte offset.
    """

    def __init__(
        self,
        stream: ByteStream,
        name: str,
        seek: Callable[[int], object] | None = None,
        length: int = 0,
    ) -> None:
        self._stream = stream
        self._seek = seek
        self._length = length
        self._name = name
        self._position = 0
        self._header_offset = 0
        self._entry: bytes | None = None
        self._remaining = 0
        self._padding = 0
        # Of a sparse member: what is still to be read, and up to where zeros go.
        self._extents: list[Extent] | None = None
        self._file_position = 0
        self._file_size = 0
        self._ended = False
        self._global_records: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[TarMember]:
        while not self._ended:
            try:
                member = self._next_member()
            except TarError as error:
                self._ended = True
                error.add_context(path=self._name, offset=self._header_offset)
                raise
            if member is None:
                self._ended = True
                return
            yield member

    def read(self, length: int) -> bytes | bytearray:
        """Return the next `length` bytes of the current member, fewer only at its end.

        Raises:
            TarError: the stream ends inside the member.
        """
        length = max(0, min(length, self._left))
        if self._extents is None and length <= _SMALL_READ:
            data = self._exactly(length, "content")
            self._remaining -= length
            return data
        buffer = bytearray(length)
        self.readinto(memoryview(buffer))
        return buffer

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer of bytes from the current member, return how many there were.

        Raises:
            TarError: the stream ends inside the member.
        """
        length = min(len(buffer), self._left)
        if self._extents is None:
            self._fill(buffer[:length])
        else:
            self._expand(buffer[:length], self._extents)
        return length

    def take_range(self) -> int | None:
        """Leave out the content of the current member, and return where in the stream it begins.

        None, and nothing left out, where that has to be read: of sparse members, and where the
        stream cannot seek.

        Raises:
            TarError: the stream ends inside the member.
        """
        if self._seek is None or self._extents is not None:
            return None
        start = self._position
        self._skip(self._remaining, "content")
        self._remaining = 0
        return start

    @property
    def _left(self) -> int:
        """Bytes of the current member that were not read."""
        if self._extents is None:
            return self._remaining
        return self._file_size - self._file_position

    def _fill(self, buffer: memoryview) -> None:
        """Fill a buffer with stored bytes."""
        filled = 0
        while filled < len(buffer):
            count = self._stream.readinto(buffer[filled:])
            if not count:
                raise self._truncated("content")
            filled += count
            self._position += count
            self._remaining -= count

    def _expand(self, buffer: memoryview, extents: list[Extent]) -> None:
        """Fill a buffer with a sparse file; the last of `extents` is the next one."""
        done = 0
        while done < len(buffer):
            start, size = extents[-1] if extents else Extent(self._file_size, 0)
            position = self._file_position
            if position >= start + size:
                extents.pop()
                continue
            if position < start:
                piece = buffer[done : done + start - position]
                piece[:] = bytes(len(piece))
            else:
                piece = buffer[done : done + start + size - position]
                self._fill(piece)
            done += len(piece)
            self._file_position += len(piece)

    def _next_member(self) -> TarMember | None:
        if self._remaining:
            self._skip(self._remaining, "content")
        padding, self._remaining, self._padding = self._padding, 0, 0
        self._extents = None
        bodies: dict[int, bytes] = {}
        local_records: dict[bytes, bytes] = {}
        header = self._next_header(padding)
        while header is not None and header.type in _AUXILIARY:
            self._take_auxiliary(header, bodies, local_records)
            header = self._next_header()
        if header is None:
            if bodies:
                raise TarError("archive ends behind an extended header, its member is missing")
            return None
        self._entry = header.path
        old_map = None if header.sparse is None else self._old_map(header, header.sparse)
        member = build_member(
            header,
            bodies.get(TYPE_LONG_NAME),
            bodies.get(TYPE_LONG_LINK),
            self._global_records | local_records if self._global_records else local_records,
            self._position,
            old_map,
        )
        self._entry = member.path
        self._remaining = member.stored_size
        self._padding = -member.stored_size % BLOCK_SIZE
        return member if member.sparse is None else self._begin_sparse(member, member.sparse)

    def _old_map(self, header: TarHeader, first: SparseMap) -> SparseMap:
        """Return the complete map of GNU's old form, reading its extension blocks."""
        extents = list(first.extents or ())
        continues = header.continues
        while continues:
            more, continues = parse_sparse_extension(self._exactly(BLOCK_SIZE, "sparse map"))
            extents += more
            if len(extents) > MAX_EXTENTS:
                raise TarError("sparse file of too many parts", entry=header.path)
        return first._replace(extents=extents)

    def _begin_sparse(self, member: TarMember, found: SparseMap) -> TarMember:
        """Check the map, which of the newest form is still to be read, and prepare for it."""
        with error_context(entry=member.path):
            if found.extents is None:
                found = found._replace(extents=self._read_map())
                member = member._replace(
                    offset=self._position, stored_size=self._remaining, sparse=found
                )
            check_map(found, self._remaining)
        self._extents = list(reversed(found.extents or ()))
        self._file_position, self._file_size = 0, found.real_size
        return member

    def _read_map(self) -> list[Extent]:
        text = MapText()
        while not text.is_complete:
            if self._remaining < BLOCK_SIZE:
                raise TarError("content of a sparse file ends inside its map")
            text.feed(self._exactly(BLOCK_SIZE, "sparse map"))
            self._remaining -= BLOCK_SIZE
        return text.extents()

    def _next_header(self, padding: int = 0) -> TarHeader | None:
        """Read and decode a header block behind some padding; None at the end of the archive."""
        # In one piece: a stream that inflates pays for each.
        block = self._up_to(padding + BLOCK_SIZE)
        self._position += min(padding, len(block))
        if len(block) < padding:
            raise self._truncated("padding")
        self._entry = None
        self._header_offset = self._position
        block = block[padding:]
        if block == _ZERO_BLOCK:
            if any(self._up_to(BLOCK_SIZE)):
                raise TarError("single zero block inside of the archive")
            return None
        if len(block) < BLOCK_SIZE:
            if block:
                raise self._truncated("header")
            return None
        header = parse_header(block)
        self._position += BLOCK_SIZE
        return header

    def _take_auxiliary(
        self, header: TarHeader, bodies: dict[int, bytes], local_records: dict[bytes, bytes]
    ) -> None:
        """Read a member that describes others and add what it says to where it belongs."""
        kind = TYPE_PAX if header.type == TYPE_SOLARIS_PAX else header.type
        if kind == TYPE_VOLUME_LABEL:
            self._skip(header.size + -header.size % BLOCK_SIZE, "volume label")
            return
        if header.size > _BODY_LIMITS[kind]:
            raise TarError(
                f"extended header of type {chr(header.type)!r} has {header.size} bytes, "
                f"the limit is {_BODY_LIMITS[kind]}"
            )
        if kind in bodies:
            raise TarError(f"two extended headers of type {chr(kind)!r} for one member")
        blocks = self._exactly(header.size + -header.size % BLOCK_SIZE, "extended header")
        body = blocks[: header.size]
        if kind == TYPE_GLOBAL_PAX:
            self._merge_global(parse_pax(body))
            return
        bodies[kind] = body
        if kind == TYPE_PAX:
            local_records.update(parse_pax(body))

    def _merge_global(self, records: dict[bytes, bytes]) -> None:
        # They live as long as the archive, so a hostile one must not pile them up.
        self._global_records |= records
        used = sum(len(key) + len(value) for key, value in self._global_records.items())
        if used > _MAX_GLOBAL_RECORDS:
            raise TarError(f"global PAX headers have more than {_MAX_GLOBAL_RECORDS} bytes")

    def _exactly(self, length: int, what: str) -> bytes:
        data = self._up_to(length)
        self._position += len(data)
        if len(data) < length:
            raise self._truncated(what)
        return data

    def _up_to(self, length: int) -> bytes:
        """Read `length` bytes, fewer only at the end of the stream; `_position` stays."""
        data = self._stream.read(length)
        if len(data) == length or not data:
            return data
        parts = [data]
        missing = length - len(data)
        while missing:
            data = self._stream.read(missing)
            if not data:
                break
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def _skip(self, count: int, what: str) -> None:
        if self._seek is not None:
            if self._position + count > self._length:
                self._position = self._length
                raise self._truncated(what)
            self._seek(count)
            self._position += count
            return
        while count:
            count -= len(self._exactly(min(count, _SKIP_SIZE), what))

    def _truncated(self, what: str) -> TarError:
        return TarError(
            f"archive ends inside {what}",
            path=self._name,
            entry=self._entry,
            offset=self._position,
        )
