"""Sparse members: the four forms, and maps that cannot be true."""

import struct

import pytest

from builder.tarheader import TarError
from builder.tarsparse import Extent, MapText
from tests.unit.builder.test_tarstream import (
    END,
    error_of,
    header,
    octal,
    padded,
    pax,
    stream_of,
    with_checksum,
)

# (offset, bytes) and the size of the file: a hole in front, in between and at the end.
PARTS = [(512, b"first"), (1024, b"second" * 100), (9000, b"z")]
SIZE = 10_000
STORED = b"".join(data for _, data in PARTS)


def expected():
    content = bytearray(SIZE)
    for offset, data in PARTS:
        content[offset : offset + len(data)] = data
    return bytes(content)


def entry(offset, size):
    return octal(offset, 12) + octal(size, 12)


def area(parts, count):
    fields = b"".join(entry(offset, len(data)) for offset, data in parts)
    return fields.ljust(24 * count, b"\0")


def old_header(parts, *, size=None, real_size=SIZE, continues=0):
    """Return a header in the old form; its own checksum is made good again."""
    size = sum(len(data) for _, data in parts) if size is None else size
    block = bytearray(header(b"sparse", b"S", size=size, magic=b"ustar  \0"))
    block[386:495] = area(parts, 4) + bytes([continues]) + octal(real_size, 12)
    return with_checksum(bytes(block))


def extension(parts, continues=0):
    return area(parts, 21) + bytes([continues]) + bytes(7)


def old_form():
    return old_header(PARTS) + padded(STORED)


def form_0_0():
    records = [(b"GNU.sparse.size", b"%d" % SIZE), (b"GNU.sparse.numblocks", b"3")]
    for offset, data in PARTS:
        records += [
            (b"GNU.sparse.offset", b"%d" % offset),
            (b"GNU.sparse.numbytes", b"%d" % len(data)),
        ]
    return pax(*records) + header(b"sparse", size=len(STORED)) + padded(STORED)


def form_0_1(**change):
    records = {
        b"GNU.sparse.size": b"%d" % SIZE,
        b"GNU.sparse.map": b",".join(b"%d,%d" % (offset, len(data)) for offset, data in PARTS),
        b"GNU.sparse.name": b"sparse",
    }
    records |= {key.encode().replace(b"_", b"."): value for key, value in change.items()}
    kept = [(key, value) for key, value in records.items() if value is not None]
    return pax(*kept) + header(b"GNUSparseFile.7/x", size=len(STORED)) + padded(STORED)


def form_1_0(text=None, **change):
    if text is None:
        text = b"%d\n" % len(PARTS)
        text += b"".join(b"%d\n%d\n" % (offset, len(data)) for offset, data in PARTS)
    records = {
        b"GNU.sparse.major": b"1",
        b"GNU.sparse.minor": b"0",
        b"GNU.sparse.name": b"sparse",
        b"GNU.sparse.realsize": b"%d" % SIZE,
    }
    records |= {key.encode().replace(b"_", b"."): value for key, value in change.items()}
    body = padded(text) + STORED
    return pax(*records.items()) + header(b"GNUSparseFile.7/x", size=len(body)) + padded(body)


@pytest.mark.parametrize("form", [old_form, form_0_0, form_0_1, form_1_0])
@pytest.mark.parametrize("step", [1, 512, 700, SIZE, 2 * SIZE])
def test_forms(form, step):
    stream = stream_of(form() + header(b"next", size=3) + padded(b"abc") + END)
    walk = iter(stream)
    member = next(walk)
    assert (member.path, member.size, member.stored_size) == (b"sparse", SIZE, len(STORED))
    content = b""
    while piece := stream.read(step):
        content += piece
    assert content == expected()
    assert next(walk).path == b"next"
    assert stream.read(10) == b"abc"
    assert next(walk, None) is None


def test_what_is_not_read_is_skipped():
    stream = stream_of(form_1_0() + header(b"next") + END)
    walk = iter(stream)
    next(walk)
    stream.read(600)
    assert next(walk).path == b"next"


def test_old_form_with_extension_blocks():
    parts = [(number * 1000, b"%05d" % number) for number in range(4 + 21 + 21 + 1)]
    data = old_header(parts[:4], size=5 * len(parts), real_size=50_000, continues=1)
    data += extension(parts[4:25], 1) + extension(parts[25:46], 1) + extension(parts[46:])
    stream = stream_of(data + padded(b"".join(text for _, text in parts)) + END)
    next(iter(stream))
    content = stream.read(1 << 20)
    assert len(content) == 50_000
    assert all(content[place : place + 5] == text for place, text in parts)
    assert content.count(0) == 50_000 - 5 * len(parts)


@pytest.mark.parametrize("pairs", [[], [(0, 0)], [(SIZE, 0)], [(0, 0), (SIZE, 0)]])
def test_files_of_holes_only(pairs):
    text = b"%d\n" % len(pairs) + b"".join(b"%d\n%d\n" % pair for pair in pairs)
    records = ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
               (b"GNU.sparse.realsize", b"%d" % SIZE))  # fmt: skip
    body = padded(text)
    stream = stream_of(pax(*records) + header(b"hole", size=len(body)) + body + END)
    assert next(iter(stream)).path == b"hole"
    assert stream.read(SIZE + 1) == bytes(SIZE)


def test_map_of_many_blocks():
    numbers = [(number * 1000, 1) for number in range(5000)]
    text = b"5000\n" + b"".join(b"%d\n%d\n" % pair for pair in numbers)
    found = MapText()
    for start in range(0, len(text), 512):
        assert not found.is_complete
        found.feed(text[start : start + 512].ljust(512, b"\0"))
    assert found.is_complete
    assert found.extents() == [Extent(*pair) for pair in numbers]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"GNU_sparse_map": b"0,700,600,1"}, "overlap"),
        ({"GNU_sparse_map": b"700,5,0,1"}, "overlap"),
        ({"GNU_sparse_map": b"0,5"}, "other parts than stored"),
        ({"GNU_sparse_map": b"9999,606"}, "outside"),
        ({"GNU_sparse_map": b"0,5,7"}, "impossible length"),
        ({"GNU_sparse_map": b"0,x"}, "no number"),
        ({"GNU_sparse_map": b"0,-606"}, "no number"),
        ({"GNU_sparse_map": b"0," + b"9" * 30}, "no number"),
        ({"GNU_sparse_map": None}, "without a map"),
        ({"GNU_sparse_size": None}, "without its size"),
        ({"GNU_sparse_size": b"10"}, "outside"),
        ({"GNU_sparse_size": b"%d" % (1 << 50)}, "too large"),
        ({"GNU_sparse_major": b"2"}, "unknown version"),
        ({"GNU_sparse_name": b"a\0b"}, "zero byte"),
    ],
)
def test_wrong_records(change, text):
    message = error_of(form_0_1(**change))
    assert text in message
    assert "entry" in message


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"1\n0\n606\n\n".ljust(512, b"x"), ""),
        (b"2\n0\n606\n", "end of a line"),
        (b"1\n0\n60\n", "other parts than stored"),
        (b"-1\n", "no number"),
        (b"9999999\n", "too many parts"),
        (b"1" * 512, "end of a line"),
    ],
)
def test_wrong_maps_in_front_of_the_content(text, what):
    data = form_1_0(text)
    if what:
        assert what in error_of(data + END)
    else:
        assert len(list(stream_of(data + END))) == 1


def test_map_longer_than_the_content():
    body = (b"100000\n" + b"1\n" * 300)[:512]
    records = ((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
               (b"GNU.sparse.realsize", b"1"))  # fmt: skip
    data = pax(*records) + header(b"x", size=len(body)) + body
    assert "ends inside its map" in error_of(data + END)


def test_pairs_in_the_wrong_order():
    records = [(b"GNU.sparse.size", b"1"), (b"GNU.sparse.numbytes", b"1")]
    assert "wrong order" in error_of(pax(*records) + header())


def test_old_form_without_end():
    data = old_header(PARTS, continues=1) + extension(PARTS, 1) * 3
    assert "archive ends inside sparse map" in error_of(data)


def test_old_form_with_wrong_numbers():
    block = bytearray(old_header(PARTS))
    block[386:398] = struct.pack("12s", b"offset")
    assert "unparsable offset" in error_of(with_checksum(bytes(block)))


def test_suns_form_is_refused():
    text = error_of(pax((b"SUN.holesdata", b" 0 5 10")) + header(b"holes"))
    assert "SUN.holesdata" in text
    assert "entry holes" in text


def test_truncated_inside_a_part():
    stream = stream_of(old_form()[:700])
    next(iter(stream))
    with pytest.raises(TarError, match="ends inside content"):
        stream.read(SIZE)
