"""Inflating from the middle of gzip files, by either library."""

import gzip
import random
import zlib

import pytest

from erofs import inflate
from erofs.contexts import ZranContext
from erofs.errors import CodecError
from erofs.inflate import MAX_WINDOW, Inflater, inflate_at

DATA = b"".join(random.Random(n).randbytes(400) + b"words to refer to " * 60 for n in range(900))


@pytest.fixture(params=["zlib-ng", "libz"], autouse=True)
def library(request, monkeypatch):
    if request.param == "libz":
        monkeypatch.setattr(inflate, "_library", inflate._libz)
    else:
        pytest.importorskip("zlib_ng")
    return request.param


def boundaries(packed, size):
    """Return where inflating can start: (input, output, bits, byte, window)."""
    found, target, done = [], memoryview(bytearray(size + 1)), 0
    with Inflater() as inflater:
        inflater.feed(packed)
        while not inflater.ended:
            done += inflater.inflate(target[done:], to_boundary=True)
            if inflater.at_boundary:
                place = len(packed) - inflater.pending
                bits = inflater.unused_bits
                byte = inflater.last_byte if bits else 0
                found.append((place, done, bits, byte, inflater.window()))
                assert inflater.window_size == len(found[-1][-1])
    assert target[:done] == DATA[:size]
    return found


def test_every_boundary_is_a_place_to_start():
    packed = gzip.compress(DATA, 6, mtime=0)
    found = boundaries(packed, len(DATA))
    assert len(found) > 10
    assert found[0] == (10, 0, 0, 0, b"")
    assert {bits for _, _, bits, _, _ in found} > {0, 1, 2}
    assert max(len(window) for *_, window in found) == MAX_WINDOW
    for place, start, bits, byte, window in found:
        assert window == DATA[max(0, start - MAX_WINDOW) : start][-len(window) :]
        size = min(100_000, len(DATA) - start)
        assert inflate_at(packed[place:], size, window, bits, byte) == DATA[start : start + size]


def test_both_libraries_find_the_same(library, monkeypatch):
    if library == "libz":
        return
    packed = gzip.compress(DATA, 1, mtime=0)
    ours = boundaries(packed, len(DATA))
    monkeypatch.setattr(inflate, "_library", inflate._libz)
    assert boundaries(packed, len(DATA)) == ours


def test_members_in_the_range():
    parts = [DATA[:50_000], b"", DATA[50_000:50_010], DATA[50_010:90_000]]
    packed = b"".join(gzip.compress(part, mtime=0) for part in parts)
    for size in (1, 49_999, 50_000, 50_001, 90_000):
        assert inflate_at(packed[10:], size, b"", 0, 0) == DATA[:size]
    with pytest.raises(CodecError, match="too short: expected 90001, got 90000"):
        inflate_at(packed[10:], 90_001, b"", 0, 0)


def test_optional_fields_of_members():
    first = gzip.compress(b"first ", mtime=0)
    second = gzip.compress(b"second", mtime=1)
    # Extra field, name and comment.
    header = second[:3] + bytes([0x04 | 0x08 | 0x10]) + second[4:10]
    second = header + b"\x04\0abcd" + b"name\0" + b"comment\0" + second[10:]
    assert inflate_at(first[10:] + second, 12, b"", 0, 0) == b"first second"


@pytest.mark.parametrize("cut", [0, 1, 5, 100])
def test_too_little_data(cut):
    packed = gzip.compress(DATA[:9000], mtime=0)[10:]
    with pytest.raises(CodecError):
        inflate_at(packed[:cut], 9000, b"", 0, 0)


def test_broken_data():
    packed = bytearray(gzip.compress(DATA[:9000], mtime=0)[10:])
    for place in (0, 5):
        broken = bytearray(packed)
        broken[place] ^= 0x77
        with pytest.raises(CodecError, match="gzip data"):
            inflate_at(broken, 9000, b"", 0, 0)


def test_another_dictionary_gives_other_data():
    compressor = zlib.compressobj(9, wbits=-15, zdict=DATA[:3000])
    packed = compressor.compress(DATA[:2000]) + compressor.flush()
    assert inflate_at(packed, 2000, DATA[:3000], 0, 0) == DATA[:2000]
    assert inflate_at(packed, 2000, bytes(3000), 0, 0) != DATA[:2000]
    with pytest.raises(CodecError, match="too far back"):
        inflate_at(packed, 2000, b"", 0, 0)


def test_context():
    packed = gzip.compress(DATA, 6, mtime=0)
    place, start, bits, byte, window = boundaries(packed, len(DATA))[5]
    context = ZranContext(place, start, 7, 30_000, 40_000, len(window), byte, bits)
    stored = memoryview(packed)[place : place + 30_000]
    dictionaries = memoryview(b"another" + window + b"third")
    assert context.inflate(stored, dictionaries) == DATA[start : start + 40_000]


def test_neither_library(monkeypatch):
    monkeypatch.setattr(inflate, "_LIBZ", "libnothing.so.7")
    with pytest.raises(CodecError, match=r"zlib-ng or libnothing\.so\.7"):
        inflate._libz()


def test_what_is_closed_is_closed():
    inflater = Inflater()
    inflater.close()
    inflater.close()
