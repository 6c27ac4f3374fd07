"""Gzip data of any shape, its chunks by contexts; tables of contents and ACLs of any bytes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from contextlib import suppress
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

import builder.blocksahead
from builder import BuildError
from builder.blob import Place
from builder.blocksahead import BlocksAhead
from builder.errors import TarError
from builder.source.opening import drain
from builder.source.options import SourceOptions
from builder.source.unpacking import GzipStream, ZstdStream
from builder.stargz import read_toc
from builder.taracl import parse_acl
from builder.tarstream import ByteStream, TarStream
from builder.zran import BlockStream, ZranLimits, ZranPlaces
from erofs.contexts import ZranContext
from erofs.errors import CodecError, FormatError

contents = st.lists(
    st.one_of(
        st.binary(max_size=3000),
        st.builds(lambda data, n: data * n, st.binary(max_size=300), st.integers(1, 200)),
        st.builds(lambda n: bytes(range(256)) * n, st.integers(1, 100)),
    ),
    min_size=1,
    max_size=6,
)


def tar_of(files: list[bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number, data in enumerate(files):
            info = tarfile.TarInfo(str(number))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


FLUSHES = [zlib.Z_NO_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_FINISH]
# (bytes, level, memory, strategy, what ends them); the last one ends a member.
Piece = tuple[int, int, int, int, int]
pieces = st.lists(
    st.tuples(
        st.integers(0, 20_000),
        st.sampled_from([6, 0, 1, 9]),
        st.integers(1, 9),
        st.integers(0, 4),
        st.sampled_from(FLUSHES),
    ),
    max_size=6,
)


def gzipped(data: bytes, plan: list[Piece]) -> bytes:
    """Pack data in members and blocks as planned, the rest in one."""
    packed, start = b"", 0
    compressor = None
    for size, level, memory, strategy, flush in [*plan, (len(data), 6, 8, 0, zlib.Z_FINISH)]:
        if compressor is None:
            compressor = zlib.compressobj(level, zlib.DEFLATED, 31, memory, strategy)
        packed += compressor.compress(data[start : start + size]) + compressor.flush(flush)
        start += size
        if flush == zlib.Z_FINISH:
            compressor = None
    return packed


def places(stream: ByteStream, zran: ZranPlaces, chunk_size: int) -> list[tuple[Place, bytes]]:
    """Return place and content of each chunk of a tar."""
    found = []
    tar = TarStream(stream, "tar")
    for member in tar:
        for start in range(0, member.size, chunk_size):
            zran.begin_chunk()
            content = tar.read(min(chunk_size, member.size - start))
            found.append((zran.end_chunk(), bytes(content)))
    return found


@given(files=contents, plan=pieces, shift=st.integers(0, 6))
def test_every_chunk_is_where_its_context_says(
    files: list[bytes], plan: list[Piece], shift: int
) -> None:
    packed = gzipped(tar_of(files), plan)
    chunk_size = 0x1000
    least = 64 << shift
    stream = BlockStream(io.BytesIO(packed))
    zran = ZranPlaces(stream, chunk_size, ZranLimits(least, 2 * least, 16 * least))
    found = places(stream, zran, chunk_size)
    assert b"".join(content for _, content in found) == b"".join(files)
    dictionaries = memoryview(bytes(zran.dictionaries))
    for place, content in found:
        context = zran.contexts[place.context or 0]
        stored = packed[context.in_offset : context.in_offset + context.in_len]
        plain = context.inflate(stored, dictionaries)
        assert plain[place.data : place.data + len(content)] == content


@settings(max_examples=30)
@given(
    files=contents,
    plan=pieces,
    shift=st.integers(0, 6),
    piece=st.integers(500, 5000),
    stops=st.integers(1, 9),
    slots=st.integers(1, 3),
)
def test_inflating_ahead_stops_at_the_same_places(
    files: list[bytes], plan: list[Piece], shift: int, piece: int, stops: int, slots: int
) -> None:
    packed = gzipped(tar_of(files), plan)
    limits = ZranLimits(64 << shift, 128 << shift, 1024 << shift)
    blocks = BlockStream(io.BytesIO(packed))
    expected = ZranPlaces(blocks, 0x1000, limits)
    found = places(blocks, expected, 0x1000)
    with (
        patch.multiple(
            builder.blocksahead,
            _PIECE_BYTES=piece,
            _PIECE_STOPS=stops,
            _SLOT_BYTES=piece + stops * 64,
            _SLOTS=slots,
        ),
        BlocksAhead(io.BytesIO(packed), 0x1000, digested=True) as ahead,
    ):
        zran = ZranPlaces(ahead, 0x1000, limits)
        assert places(ahead, zran, 0x1000) == found
        drain(ahead)
    assert zran.contexts == expected.contexts
    assert zran.dictionaries == expected.dictionaries
    assert ahead.layer == (hashlib.sha256(packed).hexdigest(), len(packed))


@given(
    stored=st.binary(max_size=500),
    dictionary=st.binary(max_size=300),
    size=st.integers(1, 1 << 16),
    bits=st.integers(0, 7),
    byte=st.integers(0, 255),
)
def test_any_bytes_inflate_or_are_refused(
    stored: bytes, dictionary: bytes, size: int, bits: int, byte: int
) -> None:
    context = ZranContext(0, 0, 0, len(stored), size, len(dictionary), byte, bits)
    with suppress(CodecError):
        assert len(context.inflate(stored, memoryview(dictionary))) == size


@given(st.binary(max_size=300), st.sampled_from([b"", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd"]))
def test_any_bytes_unpack_or_are_refused(data: bytes, magic: bytes) -> None:
    for kind in (GzipStream, ZstdStream):
        with suppress(BuildError), kind(io.BytesIO(magic + data)) as stream:
            stream.read(1 << 20)


words = st.sampled_from(
    ["name", "type", "size", "offset", "mode", "digest", "chunkDigest", "chunkOffset", "chunkSize",
     "linkName", "xattrs", "modtime", "uid", "devMajor", "innerOffset"]
)  # fmt: skip
values = st.one_of(
    st.sampled_from(
        ["reg", "dir", "chunk", "symlink", "hardlink", "char", "a", "a/b", "..",
         "sha256:" + "0" * 64, "2022-03-28T19:26:00.123456789Z", "0001-01-01T00:00:00Z"]
    ),
    st.integers(-5, 1 << 65),
    st.none(),
    st.booleans(),
    st.text(max_size=5),
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=2),
)  # fmt: skip


@given(st.lists(st.dictionaries(words, values, max_size=9), max_size=6))
def test_any_table_of_contents_is_read_or_refused(entries: list[dict[str, object]]) -> None:
    source = io.BytesIO(json.dumps({"version": 1, "entries": entries}).encode())
    try:
        toc = read_toc(source, 0x1000, None, SourceOptions())
    except (BuildError, FormatError):
        return
    for file in toc.files:
        assert sum(chunk.size for chunk in file.chunks) == file.node.size


permissions = st.sampled_from([b"rwx", b"r--", b"---", b"rw", b"R--"])
lines = st.builds(
    lambda *parts: b":".join(parts),
    st.sampled_from([b"user", b"u", b"group", b"mask", b"other", b"default", b"", b"x"]),
    st.sampled_from([b"", b"1000", b"root", b"lisa", b"99999999999"]),
    permissions,
)


@given(st.lists(lines, max_size=6).map(b"\n".join) | st.binary(max_size=60))
def test_any_acl_is_read_or_refused(text: bytes) -> None:
    try:
        acl = parse_acl(text)
    except TarError:
        return
    assert 0 <= acl.permissions <= 0o777
    assert acl.xattr is None or len(acl.xattr) % 8 == 4
