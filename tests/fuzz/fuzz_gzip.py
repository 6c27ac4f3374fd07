"""Unpacking any bytes as gzip gives what Python's gzip gives, or raises NydusError; so for zstd."""

import gzip
import io
import zlib

from harness import instrument, run

with instrument():
    from builder.source.unpacking import GzipStream, ZstdStream
    from erofs.errors import NydusError

_OUTPUT_MAX = 1 << 20


def unpacked(stream):
    """Return the content of a stream, as far as it goes here, or None when it is broken."""
    found = bytearray()
    buffer = memoryview(bytearray(5000))
    try:
        while len(found) < _OUTPUT_MAX and (count := stream.readinto(buffer)):
            found += buffer[:count]
    except NydusError:
        return None
    finally:
        stream.close()
    return bytes(found)


def target(data):
    found = unpacked(GzipStream(io.BytesIO(data)))
    unpacked(ZstdStream(io.BytesIO(data)))
    if found is None or len(found) >= _OUTPUT_MAX:
        return
    try:
        assert gzip.decompress(data) == found
    except (OSError, EOFError, zlib.error) as error:
        raise AssertionError(f"taken, but broken: {error}") from error


def seeds():
    import zstandard

    content = b"12345" * 3000 + bytes(range(256))
    yield gzip.compress(content, mtime=0)
    yield gzip.compress(content[:5000], 1, mtime=0) + gzip.compress(content, 0, mtime=0)
    yield gzip.compress(b"", mtime=0) + bytes(100)
    # With a name, extra fields, a comment and a checksum of the header.
    fields = b"\x1f\x8b\x08\x1e" + bytes(6) + b"\x04\0abcd" + b"name\0" + b"comment\0"
    fields += (zlib.crc32(fields) & 0xFFFF).to_bytes(2, "little")
    yield fields + gzip.compress(content, mtime=0)[10:]
    yield zstandard.ZstdCompressor(write_checksum=True).compress(content)


if __name__ == "__main__":
    run(target, seeds())
