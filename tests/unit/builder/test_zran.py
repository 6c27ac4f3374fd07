"""Where contexts of zran begin, and that every chunk is where they say."""

import hashlib
import io
import json

import pytest
from fakes.layer_image import content, gzipped, layer_tar

from builder import BuildError
from builder.tarstream import TarStream
from builder.zran import BlockStream, ZranLimits, ZranPlaces
from tests.fixtures_path import FIXTURES, needs_fixtures

NYDUS = FIXTURES / "nydus"
RECORD = 10240


def places(packed, chunk_size, limits=None, tars=1):
    """Return contexts, and (place, content) of each chunk of the tars in it."""
    stream = BlockStream(io.BytesIO(packed))
    zran = ZranPlaces(stream, chunk_size, limits)
    found, read = [], 0
    for _ in range(tars):
        tar = TarStream(stream, "tar")
        for member in tar:
            for start in range(0, member.size, chunk_size):
                zran.begin_chunk()
                data = tar.read(min(chunk_size, member.size - start))
                found.append((zran.end_chunk(), data))
        # On to the end of the record, where another tar may begin.
        read = stream.output_position
        while read % RECORD and (data := stream.read(RECORD - read % RECORD)):
            read += len(data)
    return zran, found


def assert_all_there(packed, zran, found):
    dictionaries = memoryview(bytes(zran.dictionaries))
    for place, data in found:
        context = zran.contexts[place.context]
        stored = packed[context.in_offset : context.in_offset + context.in_len]
        plain = context.inflate(stored, dictionaries)
        assert plain[place.data : place.data + len(data)] == data


def test_input_is_taken_in_the_pieces_of_the_real_builder():
    """Where such a piece ends decides how far the last chunk before it is looked at."""

    class Source(io.BytesIO):
        positions = [0]

        def read(self, size=-1, /):
            data = super().read(size)
            self.positions.append(self.tell())
            return data

    packed = gzipped(layer_tar(content(300_000)))
    with BlockStream(Source(packed)) as blocks:
        while blocks.read(1 << 20):
            pass
    assert len(packed) > 2 << 16
    assert sorted(set(Source.positions)) == [*range(0, len(packed), 1 << 16), len(packed)]


@needs_fixtures
@pytest.mark.parametrize(
    "name",
    [
        "zran/bgzip.tar.gz",
        "zran/zran-single-stream.tar.gz",
        "zran/zran-two-streams.tar.gz",
    ],
)
def test_as_others_find_them(name):
    cases = json.loads((NYDUS / "expected" / "zran-generated.json").read_text())
    expected = cases[name]
    limits = expected["limits"]
    packed = (NYDUS / name).read_bytes()
    zran, found = places(
        packed,
        expected["chunk_size"],
        ZranLimits(limits["mn"], limits["mx"], limits["mu"]),
        tars=2 if "two" in name else 1,
    )
    assert len(zran.contexts) == len(expected["contexts"])
    for context, fields in zip(zran.contexts, expected["contexts"], strict=True):
        end = context.dict_offset + context.dict_size
        window = bytes(zran.dictionaries[context.dict_offset : end])
        assert hashlib.sha256(window).hexdigest() == fields.pop("dict_sha256")
        assert {key: getattr(context, key) for key in fields} == fields
    for (place, data), fields in zip(found, expected["chunks"], strict=True):
        assert fields == {
            "zran_index": place.context,
            "zran_offset": place.data,
            "size": len(data),
            "compressed_offset": place.offset,
            "compressed_size": place.size,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    assert_all_there(packed, zran, found)


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("members", [1, 3, 50])
@pytest.mark.parametrize("chunk_size", [0x1000, 0x10000, 0x100000])
def test_every_chunk_is_there(level, members, chunk_size):
    files = [content(size, size) for size in (1, 511, 70_000, 512, 0, 300_000)]
    packed = gzipped(layer_tar(*files), members, level)
    zran, found = places(packed, chunk_size, ZranLimits(1 << 12, 1 << 13, 1 << 15))
    assert b"".join(data for _, data in found) == b"".join(files)
    assert_all_there(packed, zran, found)
    assert [context.out_len <= 1 << 24 for context in zran.contexts]
    numbers = [place.context for place, _ in found]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(len(zran.contexts)))


def test_blocks_that_are_too_large():
    """A block of zeros is as long as its file, and a chunk at its end needs it all."""
    packed = gzipped(layer_tar(bytes(40 << 20)), level=9)
    with pytest.raises(BuildError, match="too large to refer to"):
        places(packed, 0x1000000)


def test_chunk_before_everything():
    zran = ZranPlaces(BlockStream(io.BytesIO(gzipped(b"data"))), 0x1000)
    with pytest.raises(BuildError, match="first block"):
        zran.begin_chunk()
