"""Inflating any bytes from any context gives as many bytes as it says, or raises CodecError;
finding contexts in any bytes ends, and raises nothing but NydusError."""

import gzip
import io
import struct
import tarfile

from harness import instrument, run

with instrument():
    from builder.source.unpacking import GzipStream
    from builder.tarstream import TarStream
    from builder.zran import BlockStream, ZranLimits, ZranPlaces
    from erofs.contexts import ZranContext, parse_zran
    from erofs.errors import CodecError, FormatError, NydusError

_CHUNK = 0x1000
_LIMITS = ZranLimits(64, 128, 8192)
_OUTPUT_MAX = 1 << 20


def _inflate(data):
    """Take the input as the number of contexts, these, dictionaries, and stored bytes."""
    count = data[0] % 4
    area = memoryview(data)[1:]
    try:
        contexts, dictionaries = parse_zran(area[:400], count)
    except FormatError:
        return
    for context in contexts:
        context = context._replace(out_len=min(context.out_len, 1 << 16))
        try:
            plain = context.inflate(area[count * 40 :], dictionaries)
        except CodecError:
            continue
        assert len(plain) == context.out_len


def _gunzip(data):
    buffer = memoryview(bytearray(5000))
    total = 0
    with GzipStream(io.BytesIO(data)) as stream:
        try:
            while total < _OUTPUT_MAX and (count := stream.readinto(buffer)):
                total += count
        except NydusError:
            pass


def _index(data):
    stream = BlockStream(io.BytesIO(data))
    zran = ZranPlaces(stream, _CHUNK, _LIMITS)
    tar = TarStream(stream, "input")
    total = 0
    try:
        for member in tar:
            for _ in range(0, min(member.size, _OUTPUT_MAX), _CHUNK):
                zran.begin_chunk()
                total += len(tar.read(_CHUNK))
                place = zran.end_chunk()
                context = zran.contexts[place.context]
                assert context.in_offset + context.in_len <= len(data)
                if total > _OUTPUT_MAX:
                    return
    except NydusError:
        return
    found, _ = parse_zran(
        memoryview(b"".join(c.pack() for c in zran.contexts) + bytes(zran.dictionaries)),
        len(zran.contexts),
    )
    assert list(found) == zran.contexts


def target(data):
    if data:
        _inflate(data)
        _gunzip(data)
        _index(data)


def seeds():
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for number, data in enumerate((b"12345" * 3000, b"", bytes(9000), bytes(range(256)) * 20)):
            info = tarfile.TarInfo(str(number))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    tar = plain.getvalue()
    packed = gzip.compress(tar[:20_000], mtime=0) + gzip.compress(tar[20_000:], 1, mtime=0)
    yield packed
    yield gzip.compress(tar, 0, mtime=0)
    context = ZranContext(10, 0, 0, 2000, 5000, 0, 0, 0)
    yield struct.pack("B", 1) + context.pack() + packed[10:2010]
    middle = ZranContext(400, 3000, 0, 2000, 5000, 100, packed[399], 3)
    yield struct.pack("B", 2) + context.pack() + middle.pack() + bytes(100) + packed[400:]


if __name__ == "__main__":
    run(target, seeds())
