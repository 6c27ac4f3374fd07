"""Hand-made archives of each dialect and each kind of damage."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
from pathlib import Path

import pytest

from builder.tarheader import TarError, TarMember
from builder.tarstream import TarStream
from tests.fixtures_path import FIXTURES, needs_fixtures

END = bytes(1024)


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def with_checksum(block: bytes) -> bytes:
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


def header(
    name: bytes = b"file",
    kind: bytes = b"0",
    *,
    size: int | bytes = 0,
    mode: bytes = b"0000644\0",
    uid: bytes = b"0001750\0",
    gid: bytes = b"0000144\0",
    mtime: bytes = b"14524770400\0",
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    major: bytes = b"",
    minor: bytes = b"",
    prefix: bytes = b"",
    trailer: bytes = b"",
) -> bytes:
    if isinstance(size, int):
        size = octal(size, 12)
    fields = (
        (name, 100),
        (mode, 8),
        (uid, 8),
        (gid, 8),
        (size, 12),
        (mtime, 12),
        (b" " * 8, 8),
        (kind, 1),
        (link, 100),
        (magic, 8),
        (b"root", 32),
        (b"root", 32),
        (major, 8),
        (minor, 8),
        (prefix, 155),
        (trailer, 12),
    )
    return with_checksum(b"".join(value.ljust(width, b"\0") for value, width in fields))


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    body = b"".join(record(key, value) for key, value in records)
    return header(b"pax", kind, size=len(body)) + padded(body)


def gnu_long(kind: bytes, value: bytes) -> bytes:
    body = value + b"\0"
    return header(b"././@LongLink", kind, size=len(body), magic=b"ustar  \0") + padded(body)


def stream_of(data: bytes) -> TarStream:
    return TarStream(io.BytesIO(data), "layer.tar")


def members_of(data: bytes) -> list[TarMember]:
    return list(stream_of(data))


def one(data: bytes) -> TarMember:
    (member,) = members_of(data + END)
    return member


def error_of(data: bytes) -> str:
    with pytest.raises(TarError) as caught:
        members_of(data)
    assert caught.value.where["path"] == "layer.tar"
    return str(caught.value)


class Dribble(io.RawIOBase):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int = -1, /) -> bytes:
        return self._data.read(min(size, 7))

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        return self._data.readinto(buffer[:7])


def test_ustar_fields() -> None:
    member = one(header(b"bin/sh", mode=b"0104755\0", size=0))
    assert member == TarMember(
        path=b"bin/sh",
        kind=stat.S_IFREG,
        is_hardlink=False,
        link=b"",
        mode=0o4755,
        uid=1000,
        gid=100,
        mtime=0o14524770400,
        pax_mtime=None,
        major=0,
        minor=0,
        size=0,
        xattrs={},
        offset=512,
        stored_size=0,
    )


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"prefix": b"a/long/prefix"}, b"a/long/prefix/file"),
        ({"name": b"n" * 100, "prefix": b"p" * 155}, b"p" * 155 + b"/" + b"n" * 100),
        ({"magic": b"ustar  \0", "prefix": b"14524770400"}, b"file"),
        ({"magic": b"", "prefix": b"junk of v7"}, b"file"),
        (
            {
                "prefix": b"dir".ljust(131, b"\0") + b"14524770400\0",
                "trailer": b"\0" * 8 + b"tar\0",
            },
            b"dir/file",
        ),
        ({"name": b"\xff\n \x01"}, b"\xff\n \x01"),
        ({"name": b"cut\0here"}, b"cut"),
    ],
)
def test_path_of_dialects(fields: dict[str, bytes], path: bytes) -> None:
    assert one(header(**fields)).path == path


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        (b"0", b"f", stat.S_IFREG),
        (b"\0", b"f", stat.S_IFREG),
        (b"7", b"f", stat.S_IFREG),
        (b"9", b"f", stat.S_IFREG),
        (b"a", b"f", stat.S_IFREG),
        (b"\xc4", b"f", stat.S_IFREG),
        (b"1", b"f", stat.S_IFREG),
        (b"2", b"f", stat.S_IFLNK),
        (b"2", b"f/", stat.S_IFLNK),
        (b"5", b"f", stat.S_IFDIR),
        (b"5", b"f/", stat.S_IFDIR),
        (b"6", b"f", stat.S_IFIFO),
        (b"\0", b"f/", stat.S_IFDIR),
        (b"0", b"f/", stat.S_IFDIR),
    ],
)
def test_kinds(kind: bytes, name: bytes, expected: int) -> None:
    member = one(header(name, kind, link=b"target"))
    assert (member.path, member.kind) == (name, expected)
    assert member.is_hardlink == (kind == b"1")
    assert member.link == (b"target" if kind in b"12" else b"")


@pytest.mark.parametrize("kind", [b"3", b"4"])
def test_devices(kind: bytes) -> None:
    member = one(header(b"d", kind, major=b"0000010\0", minor=b"221505 \0"))
    assert member.kind == (stat.S_IFCHR if kind == b"3" else stat.S_IFBLK)
    assert (member.major, member.minor) == (8, 0x12345)
    assert "blank device number" in error_of(header(b"d", kind, major=b"0000010\0"))
    assert "unparsable device number" in error_of(header(b"d", kind, major=b"x", minor=b"1"))


@pytest.mark.parametrize("kind", [b"1", b"2", b"5", b"6"])
@pytest.mark.parametrize("extension", [b"", pax((b"size", b"900"))])
def test_kinds_without_content_ignore_the_size(kind: bytes, extension: bytes) -> None:
    data = extension + header(b"a", kind, size=700, link=b"t") + header(b"b") + END
    assert [(m.path, m.size) for m in members_of(data)] == [(b"a", 0), (b"b", 0)]


def test_directory_by_slash_has_its_content_skipped() -> None:
    data = header(b"old/", b"\0", size=3) + padded(b"abc") + header(b"b") + END
    assert [m.path for m in members_of(data)] == [b"old/", b"b"]


def test_gnu_long_name_and_link() -> None:
    data = gnu_long(b"K", b"l" * 300) + gnu_long(b"L", b"n" * 600) + header(b"n" * 100, b"2")
    member = one(data)
    assert (member.path, member.link) == (b"n" * 600, b"l" * 300)
    assert member.offset == len(data)


def test_long_name_decides_about_the_directory_and_wins_over_pax() -> None:
    data = gnu_long(b"L", b"n" * 200 + b"/") + pax((b"path", b"other")) + header(b"n" * 100)
    member = one(data)
    assert (member.path, member.kind) == (b"n" * 200 + b"/", stat.S_IFDIR)


def test_long_name_is_for_one_member() -> None:
    data = gnu_long(b"L", b"long") + header(b"a") + header(b"b") + END
    assert [m.path for m in members_of(data)] == [b"long", b"b"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"\x80" + (70000).to_bytes(7, "big"), 70000),
        (b"\x80" + (2**32 - 1).to_bytes(7, "big"), 2**32 - 1),
        (b"0000010 ", 8),
        (b"     10\0", 8),
        (b"10\0junk\0", 8),
        (b"77777777", 0o77777777),
        (b"", 0),
        (b"        ", 0),
    ],
)
def test_number_fields(field: bytes, value: int) -> None:
    assert one(header(uid=field)).uid == value


@pytest.mark.parametrize(
    "field", [b"x", b"8", b"1_0", b"0o7", b"-1", b"+1", b"1 2", b"\xff" * 8, b"\x80\1" + b"\0" * 6]
)
def test_damaged_number_fields(field: bytes) -> None:
    for name in ("mode", "uid", "gid"):
        text = error_of(header(**{name: field}))
        assert name in text
        assert "entry file, offset 0x0" in text


@pytest.mark.parametrize(
    ("field", "mtime"),
    [
        (b"14524770400\0", 0o14524770400),
        (b"\x80" + (2**33).to_bytes(11, "big"), 2**33),
        ((-77).to_bytes(12, "big", signed=True), -77),
        (b"\x80" + b"\0\0\0" + b"\xff" * 8, -1),
        (b"nonsense", 0),
        (b"-1", 0),
        (b"", 0),
    ],
)
def test_header_mtime(field: bytes, mtime: int) -> None:
    member = one(header(mtime=field))
    assert (member.mtime, member.pax_mtime) == (mtime, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"0", (0, 0)),
        (b"1700000000.123456789", (1700000000, 123456789)),
        (b"1.5", (1, 500000000)),
        (b"1.0000000019", (1, 1)),
        (b"1.", (1, 0)),
        (b"-1", (-1, 0)),
        (b"-1.5", (-2, 500000000)),
        (b"-0.1", (-1, 900000000)),
        (b"-1.0000000001", (-2, 999999999)),
        (b"-1.0000000000", (-1, 0)),
        (b"99999999999.999999999", (99999999999, 999999999)),
        (b"", None),
    ],
)
def test_pax_mtime(text: bytes, expected: tuple[int, int] | None) -> None:
    member = one(pax((b"mtime", text)) + header())
    assert (member.mtime, member.pax_mtime) == (0o14524770400, expected)


@pytest.mark.parametrize("kind", [b"x", b"X"])
def test_pax_overrides(kind: bytes) -> None:
    records = (
        (b"path", b"new\xff=name"),
        (b"linkpath", b"unused"),
        (b"uid", b"4294967295"),
        (b"gid", b"70000"),
        (b"uname", b"ignored"),
        (b"hdrcharset", b"BINARY"),
        (b"size", b"3"),
    )
    data = pax(*records, kind=kind) + header(b"old", size=0) + padded(b"abc") + header(b"next")
    stream = stream_of(data + END)
    walk = iter(stream)
    member = next(walk)
    assert (member.path, member.uid, member.gid) == (b"new\xff=name", 2**32 - 1, 70000)
    assert (member.size, stream.read(100)) == (3, b"abc")
    assert next(walk).path == b"next"


def test_pax_link_path() -> None:
    assert one(pax((b"linkpath", b"t" * 500)) + header(kind=b"2")).link == b"t" * 500


def test_the_last_record_of_a_key_counts_and_an_empty_one_gives_way() -> None:
    assert one(pax((b"path", b"a"), (b"path", b"b")) + header()).path == b"b"
    assert one(pax((b"path", b""), (b"uid", b"")) + header()).path == b"file"


def test_global_pax_holds_until_overridden() -> None:
    data = (
        pax((b"uid", b"7"), (b"gid", b"8"), (b"comment", b"c"), kind=b"g")
        + header(b"a")
        + pax((b"uid", b"9"))
        + header(b"b")
        + pax((b"gid", b"1"), kind=b"g")
        + header(b"c")
        + pax((b"comment", b"at the end"), kind=b"g")
        + END
    )
    assert [(m.path, m.uid, m.gid) for m in members_of(data)] == [
        (b"a", 7, 8),
        (b"b", 9, 8),
        (b"c", 7, 1),
    ]


def test_xattrs() -> None:
    data = pax(
        (b"LIBARCHIVE.xattr.user.a", b"b3RoZXI"),
        (b"SCHILY.xattr.user.a", b"raw\n\0\xff="),
        (b"SCHILY.xattr.user.empty", b""),
        (b"LIBARCHIVE.xattr.user.%C3%A4%3D", b"AP8"),
        (b"LIBARCHIVE.xattr.user.padded", b"AA=="),
    )
    assert one(data + header()).xattrs == {
        b"user.a": b"raw\n\0\xff=",
        b"user.empty": b"",
        b"user.\xc3\xa4=": b"\0\xff",
        b"user.padded": b"\0",
    }
    assert [m.xattrs for m in members_of(data + header(b"a") + header(b"b"))][1] == {}


@pytest.mark.parametrize("value", [b"A", b"AA!A", b"\xff"])
def test_bad_base64_xattr(value: bytes) -> None:
    data = pax((b"LIBARCHIVE.xattr.user.a", value)) + header()
    assert "entry file" in error_of(data)
    assert "xattr is not base64: got user.a" in error_of(data)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"12 path=ab\n", "wrong length: got 12"),
        (b"9 path=ab\n", "does not end with a newline"),
        (b"10 path=abc", "does not end with a newline"),
        (b"0 path=a\n", "wrong length: got 0"),
        (b"2 path=a\n", "wrong length: got 2"),
        (b"9999999999999999999999 a=b\n", "has no length"),
        (b"99999999999999999 a=b\n", "wrong length"),
        (b"x path=a\n", "has no length"),
        (b"-9 path=a\n", "has no length"),
        (b" path=a\n", "has no length"),
        (b"path=a\n", "has no length"),
        (b"6 =ab\n", "no keyword"),
        (b"6 abc\n", "no keyword"),
        (record(b"path", b"a") + b"\0\0\0", "at byte 9 has no length"),
    ],
)
@pytest.mark.parametrize("kind", [b"x", b"g"])
def test_malformed_pax_records(kind: bytes, body: bytes, text: str) -> None:
    data = header(b"0") + header(b"pax", kind, size=len(body)) + padded(body) + header()
    message = error_of(data + END)
    assert text in message
    assert "offset 0x200" in message


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        (b"uid", b"-1", "unparsable PAX uid"),
        (b"uid", b"4294967296", "PAX uid out of range"),
        (b"gid", b"1.0", "unparsable PAX gid"),
        (b"size", b"-5", "unparsable PAX size"),
        (b"size", b"1_0", "unparsable PAX size"),
        (b"size", b"9223372036854775808", "PAX size out of range"),
        (b"size", b"1" * 5000, "unparsable PAX size"),
        (b"mtime", b"1e5", "unparsable PAX mtime"),
        (b"mtime", b"nan", "unparsable PAX mtime"),
        (b"mtime", b"1" * 5000, "unparsable PAX mtime"),
        (b"path", b"a\0b", "PAX path has a zero byte"),
    ],
)
def test_bad_pax_values(key: bytes, value: bytes, text: str) -> None:
    assert text in error_of(pax((key, value)) + header())


def test_refused_types() -> None:
    assert "multi-volume" in error_of(header(kind=b"M"))
    for kind in (b"N", b"A"):
        assert f"unsupported tar member type '{kind.decode()}'" in error_of(header(kind=kind))


def test_directory_of_an_incremental_backup() -> None:
    data = header(b"dir/", b"D", size=8) + padded(b"Yfile\0\0") + header(b"dir/file") + END
    directory, file = members_of(data)
    assert (directory.kind, directory.path) == (stat.S_IFDIR, b"dir/")
    assert file.path == b"dir/file"


def test_volume_label_is_skipped() -> None:
    data = header(b"label", b"V", size=5) + padded(b"12345") + header(b"a") + END
    assert [m.path for m in members_of(data)] == [b"a"]


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80\0\0\0\x80" + b"\0" * 7, b"-0000000001"])
def test_hostile_sizes(size: bytes) -> None:
    assert "size" in error_of(header(size=size))


def test_huge_size_is_a_truncation() -> None:
    text = error_of(header(size=b"\x80\0\0\0\x7f" + b"\xff" * 7) + b"abc")
    assert text == "layer.tar, entry file, offset 0x203: archive ends inside content"


@pytest.mark.parametrize(("kind", "limit"), [(b"L", 1 << 20), (b"K", 1 << 20), (b"x", 16 << 20)])
def test_extended_headers_are_limited(kind: bytes, limit: int) -> None:
    assert f"the limit is {limit}" in error_of(header(kind=kind, size=limit + 1))
    assert "archive ends inside extended header" in error_of(header(kind=kind, size=limit))


def test_global_records_are_limited_together() -> None:
    headers = (pax((b"SCHILY.xattr.user.%d" % i, b"v" * 300_000), kind=b"g") for i in range(4))
    assert "global PAX headers have more than" in error_of(b"".join(headers) + header())


def test_extended_headers_need_one_member_each() -> None:
    assert "two extended headers of type 'L'" in error_of(gnu_long(b"L", b"a") * 2 + header())
    assert "two extended headers of type 'x'" in error_of(
        pax((b"uid", b"1")) + pax((b"uid", b"1"), kind=b"X") + header()
    )
    assert "its member is missing" in error_of(gnu_long(b"L", b"a") + END)
    assert "its member is missing" in error_of(pax((b"uid", b"1")))


def test_checksum() -> None:
    good = header()
    text = error_of(header(b"a") + good[:10] + b"!" + good[11:])
    assert text.startswith("layer.tar, offset 0x200: wrong tar header checksum: expected ")
    assert "unparsable checksum" in error_of(good[:148] + b"zzzzzz\0 " + good[156:])


def test_signed_checksum() -> None:
    block = header(b"\xff\xfe")
    signed = sum(b - 256 if b > 127 else b for b in block[:148] + b" " * 8 + block[156:])
    assert one(block[:148] + b"%06o\0 " % signed + block[156:]).path == b"\xff\xfe"


def test_ends() -> None:
    assert members_of(b"") == []
    assert members_of(END) == []
    assert members_of(bytes(512)) == []
    assert [m.path for m in members_of(header(b"a"))] == [b"a"]
    assert [m.path for m in members_of(header(b"a") + bytes(512))] == [b"a"]
    assert [m.path for m in members_of(header(b"a") + bytes(700))] == [b"a"]
    assert "single zero block" in error_of(header(b"a") + bytes(512) + header(b"b"))
    assert "archive ends inside header" in error_of(header(b"a") + header(b"b")[:511])
    assert "archive ends inside header" in error_of(bytes(511))


def test_nothing_behind_the_end_marker_is_read() -> None:
    source = io.BytesIO(header(b"a") + END + b"rest")
    stream = TarStream(source, "x")
    assert [m.path for m in stream] == [b"a"]
    assert list(stream) == []
    assert source.read() == b"rest"


@pytest.mark.parametrize("length", [0, 1, 510])
def test_truncated_padding(length: int) -> None:
    message = error_of(header(size=1) + b"a" + bytes(length))
    assert "entry file" in message
    assert "archive ends inside padding" in message


def test_iteration_is_over_after_an_error() -> None:
    stream = stream_of(b"!" * 512 + header() + END)
    with pytest.raises(TarError):
        list(stream)
    assert list(stream) == []


@pytest.mark.parametrize("source", [io.BytesIO, Dribble])
def test_content(source: type[io.BytesIO] | type[Dribble]) -> None:
    first, second = bytes(range(256)) * 5, b"x" * 512
    data = header(b"a", size=1280) + padded(first) + header(b"b", size=512) + second
    stream = TarStream(source(data + header(b"c", size=9) + padded(b"123456789") + END), "x")
    walk = iter(stream)
    assert stream.read(10) == b""
    assert next(walk).offset == 512
    assert stream.read(0) == b""
    assert stream.read(1000) + stream.read(1000) == first
    assert stream.read(1) == b""
    assert next(walk).offset == 512 + 1536 + 512
    buffer = bytearray(600)
    assert stream.readinto(memoryview(buffer)[:100]) == 100
    assert stream.readinto(memoryview(buffer)[100:]) == 412
    assert buffer == second + bytes(88)
    assert stream.readinto(memoryview(buffer)) == 0
    assert next(walk).path == b"c"
    assert stream.read(-1) == b""
    assert stream.read(3) == b"123"
    assert next(walk, None) is None
    assert stream.read(3) == b""


def test_truncated_content() -> None:
    expected = "layer.tar, entry a, offset 0x207: archive ends inside content"
    data = header(b"a", size=10) + b"1234567"
    stream = stream_of(data)
    next(iter(stream))
    with pytest.raises(TarError) as caught:
        stream.read(10)
    assert str(caught.value) == expected
    stream = stream_of(data)
    next(iter(stream))
    with pytest.raises(TarError) as caught:
        stream.readinto(memoryview(bytearray(10)))
    assert str(caught.value) == expected
    assert error_of(data) == expected


INPUTS = FIXTURES / "made-by-nydus-image" / "inputs"
# Nothing at all is refused before it is taken for a tar.
EMPTY = "empty.tar"
FAILING = {"trunc.tar": "archive ends inside content"}


def input_bytes(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def same_as_tarfile(data: bytes) -> int:
    """Compare members and contents with what Python's tarfile reads."""
    stream = stream_of(data)
    count = 0
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8") as reference:
        for member, info in zip(stream, reference, strict=True):
            count += 1
            assert member.path.rstrip(b"/") == info.name.rstrip("/").encode(
                "utf-8", "surrogateescape"
            )
            assert member.mode == info.mode & 0o7777
            assert (member.uid, member.gid) == (info.uid, info.gid)
            assert (member.kind == stat.S_IFDIR, member.is_hardlink) == (info.isdir(), info.islnk())
            if info.issym() or info.islnk():
                assert member.link == info.linkname.encode("utf-8", "surrogateescape")
            if info.ischr() or info.isblk():
                assert (member.major, member.minor) == (info.devmajor, info.devminor)
            if info.isreg():
                content = reference.extractfile(info)
                assert content is not None
                assert member.size == info.size
                assert stream.read(info.size + 1) == content.read()
            if member.pax_mtime is not None:
                seconds, nanoseconds = member.pax_mtime
                assert seconds + nanoseconds / 1e9 == info.mtime
            else:
                assert member.mtime == info.mtime
            assert member.xattrs == {
                key[13:].encode(): value.encode("utf-8", "surrogateescape")
                for key, value in info.pax_headers.items()
                if key.startswith("SCHILY.xattr.")
            }
    return count


@needs_fixtures
def test_inputs_of_the_real_builder() -> None:
    paths = sorted(INPUTS.glob("*.tar*"))
    assert len(paths) >= 20
    counts = {}
    for path in paths:
        if path.name in FAILING:
            assert FAILING[path.name] in error_of(input_bytes(path))
        elif path.name != EMPTY:
            counts[path.name] = same_as_tarfile(input_bytes(path))
    assert counts["zeroblocks.tar"] == 0
    assert counts["l1.tar.gz"] > 300
    assert counts["fifo-blank-dev.tar"] > 0


@needs_fixtures
def test_fractional_and_negative_times_of_l1() -> None:
    times = [m.pax_mtime for m in members_of(input_bytes(INPUTS / "l1.tar.gz")) if m.pax_mtime]
    assert any(seconds < 0 for seconds, _ in times)
    assert any(seconds > 1 << 32 for seconds, _ in times)
    assert any(nanoseconds for _, nanoseconds in times)
