"""Archives that Python's tarfile writes, and bytes that nobody should write."""

from __future__ import annotations

import io
import stat
import tarfile
from dataclasses import dataclass

from hypothesis import assume, given
from hypothesis import strategies as st

from builder.tarheader import TarError
from builder.tarstream import TarStream

MAX_REQUEST = 16 << 20
LARGEST_HOLE = 1 << 16
KINDS = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.LNKTYPE: stat.S_IFREG,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


class Pipe:
    """A forward-only source that gives at most `step` bytes and records what is asked."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data = io.BytesIO(data)
        self._step = step
        self.largest = 0

    def read(self, size: int, /) -> bytes:
        assert size >= 0
        self.largest = max(self.largest, size)
        return self._data.read(min(size, self._step))

    def readinto(self, buffer: memoryview, /) -> int:
        return self._data.readinto(buffer[: self._step])


@dataclass
class Planned:
    info: tarfile.TarInfo
    content: bytes


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def names(longest: int) -> st.SearchStrategy[bytes]:
    component = st.binary(min_size=1, max_size=40).map(
        lambda raw: raw.replace(b"\0", b"0").replace(b"/", b"_")
    )
    return st.lists(component, min_size=1, max_size=longest).map(b"/".join)


seconds = st.integers(0, 2**33 - 1)
quarters = st.integers(-(2**36), 2**36).map(lambda n: n / 4)
xattr_keys = st.text("abz.=_é", min_size=1, max_size=9).filter(lambda key: "=" not in key)


@st.composite
def planned(draw: st.DrawFn, format_: int) -> Planned:
    info = tarfile.TarInfo(text_of(draw(names(8))))
    info.type = draw(st.sampled_from(sorted(KINDS)))
    info.mode = draw(st.integers(0, 0o7777))
    largest = 0o7777777 if format_ == tarfile.USTAR_FORMAT else 2**32 - 1
    info.uid = draw(st.integers(0, largest))
    info.gid = draw(st.integers(0, largest))
    if format_ == tarfile.USTAR_FORMAT:
        info.mtime = draw(seconds)
    elif format_ == tarfile.GNU_FORMAT:
        info.mtime = draw(st.integers(-(2**62), 2**62))
    else:
        info.mtime = draw(seconds | quarters)
        info.pax_headers = {
            f"SCHILY.xattr.user.{key}": text_of(value)
            for key, value in draw(st.dictionaries(xattr_keys, st.binary(max_size=40))).items()
        }
    if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = text_of(draw(names(8)))
    if info.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        info.devmajor = draw(st.integers(0, 0o7777777))
        info.devminor = draw(st.integers(0, 0o7777777))
    content = b""
    if info.type == tarfile.REGTYPE:
        content = draw(st.binary(max_size=1500))
        info.size = len(content)
    return Planned(info, content)


def archive_of(plan: list[Planned], format_: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=format_, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for item in plan:
            try:
                archive.addfile(item.info, io.BytesIO(item.content))
            except ValueError:  # ustar has no place for some long names
                assume(False)
    return out.getvalue()


def check_against_tarfile(data: bytes, plan: list[Planned], step: int) -> None:
    stream = TarStream(Pipe(data, step), "generated")
    walk = iter(stream)
    with tarfile.open(
        fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape"
    ) as reference:
        for info, item in zip(reference, plan, strict=True):
            member = next(walk)
            assert member.path.rstrip(b"/") == bytes_of(info.name)
            assert member.kind == KINDS[info.type]
            assert member.is_hardlink == info.islnk()
            assert member.link == bytes_of(info.linkname)
            assert (member.mode, member.uid, member.gid) == (info.mode, info.uid, info.gid)
            assert (member.major, member.minor) == (info.devmajor, info.devminor)
            assert (member.size, member.offset) == (info.size, info.offset_data)
            if member.pax_mtime is None:
                assert member.mtime == info.mtime
            else:
                whole, nanoseconds = member.pax_mtime
                assert 0 <= nanoseconds < 10**9
                assert whole + nanoseconds / 1e9 == info.mtime
            assert member.xattrs == {
                bytes_of(key[13:]): bytes_of(value) for key, value in item.info.pax_headers.items()
            }
            assert stream.read(info.size + 1) == item.content
    assert next(walk, None) is None


formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@given(data=st.data(), format_=formats, step=st.sampled_from([1, 100, 513, 1 << 20]))
def test_same_members_as_tarfile(data: st.DataObject, format_: int, step: int) -> None:
    plan = data.draw(st.lists(planned(format_), max_size=4))
    check_against_tarfile(archive_of(plan, format_), plan, step)


def survives(data: bytes) -> None:
    """Walk and read everything; only TarError may come out, and no huge request may go in."""
    pipe = Pipe(data, 1 << 20)
    stream = TarStream(pipe, "hostile")
    total = 0
    where: dict[str, object] = {}
    try:
        for member in stream:
            assert 0 <= member.size < 1 << 63
            assert 0 <= member.mode <= 0o7777
            assert b"\0" not in member.path + member.link
            # A hole may be larger than all memory.
            rest = LARGEST_HOLE
            while rest and (piece := stream.read(min(4096, rest))):
                total += 0 if member.sparse else len(piece)
                rest -= len(piece) if member.sparse else 0
    except TarError as error:
        where = error.where
    if where:
        assert where["path"] == "hostile"
        assert isinstance(where["offset"], int)
        assert 0 <= where["offset"] <= len(data)
    assert total <= len(data)
    assert pipe.largest <= MAX_REQUEST


@given(st.binary(max_size=3000))
def test_arbitrary_bytes(data: bytes) -> None:
    survives(data)


def with_checksum(block: bytes) -> bytes:
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


sizes = st.integers(0, 1600).map(lambda n: b"%011o\0" % n) | st.binary(min_size=12, max_size=12)
numbers = st.integers(0, 0o777).map(lambda n: b"%07o\0" % n) | st.binary(min_size=8, max_size=8)
record_texts = st.sampled_from(
    [
        b"12 path=abc\n",
        b"10 uid=12\n",
        b"16 size=1234567\n",
        b"13 mtime=1.5\n",
        b"14 mtime=-1.5\n",
        b"32 SCHILY.xattr.user.name=value\n",
        b"36 LIBARCHIVE.xattr.user.name=AAAA\n",
        b"22 GNU.sparse.major=1\n",
        b"22 GNU.sparse.minor=0\n",
        b"26 GNU.sparse.realsize=99\n",
        b"24 GNU.sparse.size=9999\n",
        b"26 GNU.sparse.map=0,5,9,1\n",
        b"23 GNU.sparse.offset=7\n",
        b"25 GNU.sparse.numbytes=7\n",
        b"45 SCHILY.acl.access=u::r-x,g::rw-,o::---,\n\n\n",
    ]
)
bodies = st.lists(record_texts | st.binary(max_size=30), max_size=5).map(b"".join)


@st.composite
def hostile_member(draw: st.DrawFn) -> bytes:
    body = draw(bodies)
    exact = st.just(b"%011o\0" % len(body))
    block = (
        draw(st.binary(max_size=100)).ljust(100, b"\0")
        + b"".join(draw(numbers) for _ in range(3))
        + draw(exact | sizes)
        + draw(st.binary(min_size=12, max_size=12))
        + b" " * 8
        + draw(st.sampled_from([bytes([c]) for c in b"\x000123456789LKxXgVSMDa\xff"]))
        + draw(st.binary(max_size=100)).ljust(100, b"\0")
        + draw(st.sampled_from([b"ustar\x0000", b"ustar  \0", bytes(8)]))
        + bytes(64)
        + draw(numbers)
        + draw(numbers)
        + draw(st.binary(max_size=155)).ljust(167, b"\0")
    )
    return with_checksum(block) + body + bytes(-len(body) % 512)


@given(st.lists(hostile_member(), min_size=1, max_size=5).map(b"".join))
def test_hostile_fields_with_good_checksums(data: bytes) -> None:
    survives(data)


@given(data=st.data(), format_=formats)
def test_mutated_archives(data: st.DataObject, format_: int) -> None:
    plan = data.draw(st.lists(planned(format_), min_size=1, max_size=2))
    archive = bytearray(archive_of(plan, format_))
    block = data.draw(st.integers(0, min(len(archive) // 512 - 1, 6))) * 512
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        archive[block + place] = value
    if data.draw(st.booleans()):
        archive[block : block + 512] = with_checksum(bytes(archive[block : block + 512]))
    survives(bytes(archive[: data.draw(st.integers(0, len(archive)))]))
