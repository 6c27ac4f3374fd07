"""Compressed tars as streams: pieces one behind the other, ends in the wrong place, bombs."""

import gzip
import io
import random
import tracemalloc

import pytest
import zstandard

from builder import BuildError
from builder.source import unpacking
from builder.source.opening import open_tar
from builder.source.unpacking import GzipStream, ZstdStream, is_gzip, is_zstd
from erofs import inflate

DATA = random.Random(1).randbytes(3000) * 100 + bytes(100_000)
SKIPPED = b"\x5a\x2a\x4d\x18\x05\0\0\0abcde"


@pytest.fixture(params=["zlib-ng", "libz"])
def library(request, monkeypatch):
    """Both libraries, whichever is there first."""
    if request.param == "libz":
        monkeypatch.setattr(inflate, "_library", inflate._libz)
    else:
        pytest.importorskip("zlib_ng")


def gzipped(*pieces, level=6):
    return b"".join(gzip.compress(piece, level, mtime=0) for piece in pieces)


def zstd(*pieces):
    packer = zstandard.ZstdCompressor(write_checksum=True)
    return b"".join(packer.compress(piece) for piece in pieces)


def unpacked(stream, step):
    with stream:
        return b"".join(iter(lambda: stream.read(step), b""))


class Trickle(io.RawIOBase):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data, step=7):
        self._data = io.BytesIO(data)
        self._step = step

    def readable(self):
        return True

    def readinto(self, buffer):
        data = self._data.read(min(len(buffer), self._step))
        buffer[: len(data)] = data
        return len(data)


GZIP = {
    "one": gzipped(DATA),
    "stored": gzipped(DATA, level=0),
    "many": gzipped(*(DATA[start : start + 9999] for start in range(0, len(DATA), 9999))),
    "empty": gzipped(b"", DATA, b"", b""),
    "padded": gzipped(DATA) + bytes(700_000),
    "between": gzipped(DATA[:5]) + bytes(3) + gzipped(DATA[5:]),
}
ZSTD = {
    "one": zstd(DATA),
    "two": zstd(DATA[:77777], DATA[77777:]),
    "skipped": SKIPPED + zstd(DATA[:9]) + SKIPPED * 2 + zstd(DATA[9:]) + SKIPPED,
    "empty": zstd(b"", DATA, b""),
}


@pytest.mark.parametrize("form", GZIP)
@pytest.mark.parametrize("step", [1 << 20, 5000])
@pytest.mark.usefixtures("library")
def test_gzip(form, step):
    assert unpacked(GzipStream(io.BytesIO(GZIP[form])), step) == DATA


@pytest.mark.usefixtures("library")
def test_gzip_from_a_pipe():
    assert unpacked(GzipStream(Trickle(GZIP["many"], 700)), 1 << 20) == DATA
    assert unpacked(GzipStream(Trickle(gzipped(b"abc", b"def"), 1)), 1) == b"abcdef"


@pytest.mark.parametrize("form", ZSTD)
@pytest.mark.parametrize("step", [1 << 20, 5000])
def test_zstd(form, step):
    assert is_zstd(ZSTD[form][:4])
    assert unpacked(ZstdStream(io.BytesIO(ZSTD[form])), step) == DATA


@pytest.mark.parametrize("cut", [1, 4, 8, 9, 100, 2000])
@pytest.mark.usefixtures("library")
def test_truncated_gzip(cut):
    with pytest.raises(BuildError, match="ends too early"):
        unpacked(GzipStream(io.BytesIO(GZIP["one"][:-cut])), 1 << 20)


@pytest.mark.parametrize("cut", [1, 4, 5, 9, 100, 2000])
def test_truncated_zstd(cut):
    with pytest.raises(BuildError, match="ends too early"):
        unpacked(ZstdStream(io.BytesIO(ZSTD["one"][:-cut])), 1 << 20)


@pytest.mark.parametrize("place", [3, 1000, -6, -2])
@pytest.mark.usefixtures("library")
def test_broken_gzip(place):
    data = bytearray(GZIP["one"])
    data[place] ^= 0x55
    with pytest.raises(BuildError, match="gzip data"):
        unpacked(GzipStream(io.BytesIO(data)), 1 << 20)


@pytest.mark.parametrize("place", [4, 1000, -2])
def test_broken_zstd(place):
    data = bytearray(ZSTD["one"])
    data[place] ^= 0x55
    with pytest.raises(BuildError, match="zstd data") as caught:
        unpacked(ZstdStream(io.BytesIO(data)), 1 << 20)
    assert caught.value.where["offset"] <= len(data)


@pytest.mark.parametrize("behind", [b"x", b"\0\0x", b"\x1f", b"\x1f\x8b", b"\x1f\x8bxxxxxxxxxxxx"])
@pytest.mark.usefixtures("library")
def test_something_behind_gzip(behind):
    with pytest.raises(BuildError, match="gzip data"):
        unpacked(GzipStream(io.BytesIO(GZIP["one"] + behind)), 1 << 20)


def test_something_behind_zstd():
    with pytest.raises(BuildError, match="zstd data"):
        unpacked(ZstdStream(io.BytesIO(ZSTD["one"] + b"xxxxx")), 1 << 20)


def test_bombs_take_little_memory():
    packed = gzip.compress(bytes(64 << 20), 9)
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(512 << 20))
    for stream in (GzipStream(io.BytesIO(packed)), ZstdStream(io.BytesIO(frame * 3))):
        buffer = memoryview(bytearray(1 << 16))
        tracemalloc.start()
        done = 0
        while done < 48 << 20:
            done += stream.readinto(buffer)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 80 << 20


def test_magic():
    assert is_gzip(b"\x1f\x8b\x08\0")
    assert not is_gzip(b"\x1f")
    assert not is_zstd(b"")
    assert not is_zstd(b"\x28\xb5\x2f")
    assert not is_zstd(b"\x60\x2a\x4d\x18")


def test_missing_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(unpacking.CodecError, match="zstandard is not installed"):
        ZstdStream(io.BytesIO())


def test_what_is_behind_the_tar_is_read(tmp_path):
    """So that a wrong checksum is found, and a writer into a pipe is not killed."""
    data = gzipped(DATA)
    path = tmp_path / "packed"
    path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    with pytest.raises(BuildError, match="gzip data") as caught, open_tar(path) as stream:
        assert stream.read(10) == DATA[:10]
    assert caught.value.where["path"] == str(path)
    pipe = io.BytesIO(DATA)
    with open_tar(pipe) as stream:
        stream.read(10)
    assert pipe.tell() == len(DATA)
