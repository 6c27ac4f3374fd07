import os
import random
import subprocess
import sys
from importlib.machinery import PathFinder

import lz4.block
import pytest
import zstandard

from erofs import codec
from erofs import digest as digest_module
from erofs.codec import compress, decompress
from erofs.digest import crc32c, digest
from erofs.errors import CodecError
from erofs.rafs import Compressor, Digester

_TEXT = b"the quick brown fox jumps over the lazy dog. " * 100


def test_digests_of_the_published_vectors():
    assert digest(Digester.SHA256, b"abc").hex() == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert digest(Digester.BLAKE3, b"").hex() == (
        "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    )
    assert crc32c(b"123456789") == 0xE3069283


def test_crc32c_of_a_package_with_another_layout(monkeypatch):
    find = PathFinder.find_spec
    monkeypatch.setattr(
        PathFinder,
        "find_spec",
        lambda name, *args: None if name == "_crc32c" else find(name, *args),
    )
    assert digest_module._crc32c.__wrapped__()(b"123456789") == 0xE3069283


@pytest.mark.parametrize("algorithm", [Compressor.LZ4_BLOCK, Compressor.ZSTD])
def test_round_trip(algorithm):
    stored = compress(algorithm, _TEXT)
    assert len(stored) < len(_TEXT)
    assert decompress(algorithm, memoryview(stored), len(_TEXT)) == _TEXT


def test_lz4_is_a_raw_block_that_other_readers_take():
    assert lz4.block.decompress(compress(Compressor.LZ4_BLOCK, _TEXT), len(_TEXT)) == _TEXT
    # LZ4_compress_default: the literal run, one match of the whole rest, the last five bytes.
    assert compress(Compressor.LZ4_BLOCK, b"a" * 40).hex() == "1f610100" + "0f" + "506161616161"


def test_zstd_is_one_frame_with_its_size_and_without_a_checksum():
    parameters = zstandard.get_frame_parameters(compress(Compressor.ZSTD, _TEXT))
    assert parameters.content_size == len(_TEXT)
    assert not parameters.has_checksum


@pytest.mark.parametrize("algorithm", Compressor)
def test_what_does_not_shrink_stays(algorithm):
    if algorithm is not Compressor.GZIP:
        assert compress(algorithm, os.urandom(64)) is None
        assert compress(algorithm, b"") is None


def test_none_checks_the_length():
    assert decompress(Compressor.NONE, b"abc", 3) == b"abc"
    with pytest.raises(CodecError, match="expected 4, got 3"):
        decompress(Compressor.NONE, b"abc", 4)


@pytest.mark.parametrize("algorithm", [Compressor.LZ4_BLOCK, Compressor.ZSTD])
@pytest.mark.parametrize("size", [len(_TEXT) - 1, len(_TEXT) + 1, 0])
def test_the_wrong_length_is_refused(algorithm, size):
    with pytest.raises(CodecError):
        decompress(algorithm, compress(algorithm, _TEXT), size)


@pytest.mark.parametrize("algorithm", [Compressor.LZ4_BLOCK, Compressor.ZSTD, Compressor.GZIP])
@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x28\xb5\x2f\xfd", bytes(100)])
def test_garbage_is_refused(algorithm, data):
    with pytest.raises(CodecError):
        decompress(algorithm, data, 100)


def test_bombs_are_refused_at_the_promised_size():
    bomb = bytes(1 << 26)
    sized = zstandard.ZstdCompressor().compress(bomb)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bomb)
    block = lz4.block.compress(bomb, store_size=False)
    for algorithm, data in (
        (Compressor.ZSTD, sized),
        (Compressor.ZSTD, unsized),
        (Compressor.LZ4_BLOCK, block),
    ):
        with pytest.raises(CodecError):
            decompress(algorithm, data, 4096)


def test_frame_without_a_content_size():
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(_TEXT)
    assert decompress(Compressor.ZSTD, frame, len(_TEXT)) == _TEXT


@pytest.mark.parametrize("algorithm", [Compressor.ZSTD, Compressor.LZ4_BLOCK, Compressor.NONE])
def test_many_at_once_are_what_each_is_alone(algorithm):
    rng = random.Random(6)
    sizes = [1, 2, 7, 100, 4096, 65536, 70000, 1 << 20]
    pieces = [rng.randbytes(size // 2) + bytes(size - size // 2) for size in sizes]
    pieces += [rng.randbytes(300), b"a" * 300, bytearray(5000), b""]
    alone = [codec.compress(algorithm, memoryview(piece)) for piece in pieces]
    for count in (len(pieces), len(pieces) - 1, 1, 0):
        found = codec.compress_all(algorithm, pieces[:count])
        assert [each if each is None else bytes(each) for each in found] == alone[:count]


def test_without_the_function_for_many(monkeypatch):
    expected = codec.compress(Compressor.ZSTD, bytes(1000))
    monkeypatch.setattr(codec, "_zstd_compress_all", lambda pieces: None)
    assert codec.compress_all(Compressor.ZSTD, [bytes(1000)] * 2) == [expected] * 2


@pytest.mark.parametrize("algorithm", Compressor)
def test_a_library_is_loaded_ahead(algorithm):
    program = (
        "import sys; from erofs import codec; from erofs.rafs import Compressor\n"
        f"codec.load(Compressor({int(algorithm)}))\n"
        "print([name for name in ('zstandard', 'lz4.block') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    names = {Compressor.ZSTD: b"['zstandard']", Compressor.LZ4_BLOCK: b"['lz4.block']"}
    assert done.stdout.strip() == names.get(algorithm, b"[]")


@pytest.mark.parametrize("algorithm", [Compressor.ZSTD, Compressor.LZ4_BLOCK, Compressor.NONE])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_many_pieces_decompress_as_each_of_them(algorithm, count, monkeypatch):
    plain = [bytes([number]) * (1000 + number) for number in range(count)]
    stored = [memoryview(codec.compress(algorithm, each) or each) for each in plain]
    sizes = [len(each) for each in plain]
    assert codec.decompress_all(algorithm, stored, sizes) == plain
    monkeypatch.setattr(codec, "_zstd_decompress_all", lambda pieces, sizes: None)
    assert codec.decompress_all(algorithm, stored, sizes) == plain


@pytest.mark.parametrize("algorithm", [Compressor.ZSTD, Compressor.LZ4_BLOCK])
@pytest.mark.parametrize("wrong", [999, 1001])
def test_one_wrong_size_or_broken_frame_of_many_is_refused(algorithm, wrong):
    stored = [codec.compress(algorithm, bytes(1000))] * 3
    with pytest.raises(CodecError):
        codec.decompress_all(algorithm, stored, [1000, wrong, 1000])
    with pytest.raises(CodecError):
        codec.decompress_all(algorithm, [stored[0], b"broken", stored[0]], [1000] * 3)
