"""Tables of contents of eStargz: what they must say, and images of nothing else."""

import io
import json

import pytest
from fakes.estargz import estargz, toc_of
from fakes.layer_image import Stored, content
from fakes.memory_reader import MemoryReader

from builder import BuildError, unpack
from builder.backends import blob_directory
from builder.build import BuildOptions, SourceType, build
from builder.chunkreader import ChunkReader
from builder.cli.createwords import add_options
from builder.datacheck import check_data
from builder.source.options import SourceOptions
from builder.stargz import read_toc
from erofs import Chunk, FormatError, check_image, open_bootstrap
from erofs.citable import parse_cached
from erofs.console import CommandParser
from erofs.rafs import BlobFeatures
from fscache.cache.cachedblob import CachedBlob
from fscache.cache.layer import LayerReader
from fscache.fetch.fetcher import Fetcher
from fscache.metrics import CacheMetrics

FILES = {
    "dir": None,
    "dir/one": content(100_000, 1),
    "empty": b"",
    "large": content(300_000, 2),
    "again": content(100_000, 1),
    ".prefetch.landmark": b"\xf0",
    "tiny": b"1",
    "zeros": bytes(200_000),
}
LINKS = [("symlink", "dir/one"), ("hard", "=dir/one")]
CHUNK = 0x20000
ID = "e" * 64


@pytest.fixture(scope="module")
def layer():
    return estargz(FILES, chunk_size=CHUNK, links=LINKS)


def options(folder, **changes):
    values = {
        "source_type": SourceType.ESTARGZTOC_REF,
        "bootstrap": folder / "boot",
        "blob_id": ID,
        "chunk_size": CHUNK,
    }
    return BuildOptions(**values | changes)


def entries(toc, name, /, **changes):
    """Return a table with fields of one entry changed, or gone where they are None."""
    values = json.loads(toc)
    for entry in values["entries"]:
        if entry["name"] == name:
            entry.update(changes)
            for key in [key for key, value in entry.items() if value is None]:
                del entry[key]
            break
    return json.dumps(values)


def test_layer_and_its_image(tmp_path, layer):
    stored, toc = layer
    (tmp_path / ID).write_bytes(stored)
    assert toc_of(stored) == toc
    build(
        io.BytesIO(toc.encode()), options(tmp_path, blob_dir=tmp_path, blob_data_size=len(stored))
    )
    with open_bootstrap(tmp_path / "boot") as image:
        assert list(check_image(image)) == []
        found = list(check_data(image, [ID], blob_directory(tmp_path), tmp_path / "boot"))
        # The id is made up.
        assert [str(finding.severity) for _, finding in found] == ["warning"]
        (entry,) = image.blobs
        assert entry.compressed_size == len(stored)
        assert entry.features == (
            BlobFeatures.ALIGNED | BlobFeatures.SEPARATE | BlobFeatures.CAP_TAR_TOC
        )
        names = {path for path, _ in image.walk()}
        expected = {*FILES, *(name for name, _ in LINKS)} - {".prefetch.landmark"}
        assert names == {b"/", *(b"/" + name.encode() for name in expected)}
        assert image.lookup(b"/hard").nid == image.lookup(b"/dir/one").nid
        assert image.lookup(b"/dir/one").mtime == 1648495560
        # Equal chunks are one.
        assert len(image.chunk_infos) == 1 + 3 + 1 + 2
    with (tmp_path / "out.tar").open("wb") as output:
        unpack(tmp_path / "boot", output, blob_directory(tmp_path))
    assert content(300_000, 2) in (tmp_path / "out.tar").read_bytes()


def test_length_of_the_layer_is_a_guess_without_it(tmp_path, layer):
    stored, toc = layer
    build(io.BytesIO(toc.encode()), options(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["boot"]
    with open_bootstrap(tmp_path / "boot") as image:
        (entry,) = image.blobs
        last = max(info.compressed_offset for info in image.chunk_infos)
        # Behind the last chunk there is only the table itself.
        assert last < entry.compressed_size
        infos = sorted(image.chunk_infos, key=lambda info: info.chunk_index)
        with (tmp_path / "layer").open("wb") as file:
            file.write(stored)
        reader = ChunkReader(image.blobs, ["layer"], blob_directory(tmp_path))
        for path, inode in image.walk():
            if inode.is_regular and inode.size and not path.startswith(b"/zeros"):
                data = b"".join(
                    reader.read(chunk) for chunk in map(Chunk.from_info, image.file_chunks(inode))
                )
                assert data == FILES["dir/one" if path == b"/hard" else path[1:].decode()]
        assert [info.chunk_index for info in infos] == list(range(len(infos)))


def test_table_in_the_form_of_caches(tmp_path, layer):
    build(
        io.BytesIO(layer[1].encode()),
        options(tmp_path, blob_dir=tmp_path, blob_meta=tmp_path / "meta"),
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3
    table = parse_cached((tmp_path / "meta").read_bytes())
    with open_bootstrap(tmp_path / "boot") as image:
        assert all(table.agrees(info) for info in image.chunk_infos)
        assert names[0] == image.blobs[0].blob_meta_digest.hex()


def test_without_data(tmp_path):
    _, toc = estargz({"dir": None, "empty": b""})
    result = build(io.BytesIO(toc.encode()), options(tmp_path))
    assert result.blobs == []


def test_chunk_that_seems_not_to_be_compressed(layer):
    """The distance to the next member is exactly the chunk's size."""
    digest = "sha256:" + "0" * 64
    toc = {
        "version": 1,
        "entries": [
            {"name": "a", "type": "reg", "size": 700, "offset": 0, "digest": digest},
            {"name": "b", "type": "reg", "size": 800, "offset": 700, "digest": digest},
        ],
    }
    source = io.BytesIO(json.dumps(toc).encode())
    one, other = read_toc(source, CHUNK, None, SourceOptions()).files
    assert one.chunks[0].stored_size == 699
    assert other.chunks[0].stored_size == 800 + 151


BROKEN = {
    "no digest": ("large", {"chunkDigest": None}, "chunk without a digest"),
    "digest": ("tiny", {"chunkDigest": "md5:00"}, "is no SHA-256"),
    "type": ("tiny", {"type": "door"}, "unknown type"),
    "no type": ("tiny", {"type": None}, "unknown type"),
    "no text": ("tiny", {"name": 7}, "is no text"),
    "size": ("tiny", {"size": -1}, "no number that it can be"),
    "bool": ("tiny", {"size": True}, "no number that it can be"),
    "float": ("tiny", {"offset": 1.5}, "no number that it can be"),
    "owner": ("tiny", {"uid": 1 << 32}, "no number that it can be"),
    "time": ("tiny", {"modtime": "yesterday"}, "is no time"),
    "month": ("tiny", {"modtime": "2022-13-28T19:26:00Z"}, "is no time"),
    "xattrs": ("tiny", {"xattrs": {"user.a": "?"}}, "not base64"),
    "xattr list": ("tiny", {"xattrs": ["user.a"]}, "no object"),
    "xattr name": ("tiny", {"xattrs": {"strange": "AAAA"}}, "xattr name"),
    "inner": ("tiny", {"innerOffset": 5}, "several files in one member"),
    "cut": ("large", {"chunkSize": 0x10000}, "cut in another way"),
    "short": ("large", {"size": 100}, "cut in another way"),
    "long": ("tiny", {"size": CHUNK + 1}, "cut in another way"),
    "zero": ("tiny", {"name": "a\0b"}, "zero byte"),
    "up": ("tiny", {"name": "../up"}, "component"),
    "link": ("hard", {"linkName": "nowhere"}, "not there"),
    "order": ("tiny", {"offset": 3}, "impossible place"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tables(tmp_path, layer, case):
    name, change, text = BROKEN[case]
    toc = entries(layer[1], name, **change)
    with pytest.raises((BuildError, FormatError), match=text):
        build(io.BytesIO(toc.encode()), options(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"version": 2, "entries": []}',
        b'{"version": 1, "entries": {}}',
        b'{"version": 1, "entries": [7]}',
        b'{"version": 1, "entries": [{"type": "chunk", "name": "x"}]}',
        b"\x1f\x8b" + bytes(100),
        b"[" * 100_000,
    ],
)
def test_what_is_no_table(tmp_path, text):
    with pytest.raises(BuildError):
        build(io.BytesIO(text), options(tmp_path))
    assert not list(tmp_path.iterdir())


def test_layer_that_is_too_short(tmp_path, layer):
    with pytest.raises(BuildError, match="impossible place"):
        build(io.BytesIO(layer[1].encode()), options(tmp_path, blob_data_size=1000))


def test_id_is_needed(tmp_path, layer):
    with pytest.raises(BuildError, match="--blob-id is needed"):
        build(io.BytesIO(layer[1].encode()), options(tmp_path, blob_id=None))


def test_members_are_served(tmp_path, layer):
    """By the daemon's own way of reading chunks."""
    stored, toc = layer
    build(io.BytesIO(toc.encode()), options(tmp_path, blob_data_size=len(stored)))
    with open_bootstrap(tmp_path / "boot") as image:
        (entry,), chunks = image.blobs, list(image.chunk_infos)
    reader = LayerReader(MemoryReader(Stored(ID, stored)), MemoryReader(Stored("none", b"")))
    fetcher = Fetcher()
    cached = CachedBlob.open(tmp_path, entry, chunks, reader, CacheMetrics(tmp_path))
    fetcher.attach(cached)
    fetcher.fetch_all(cached)
    assert content(300_000, 2)[:CHUNK] in cached.path.read_bytes()
    assert reader.tables.reads == []
    fetcher.close(5)


@pytest.mark.parametrize("text", ["2a", "0x2A", "0X2a"])
def test_size_of_the_layer_is_hexadecimal(text):
    """As the real tool reads it, with or without a prefix."""
    parser = CommandParser()
    add_options(parser)
    assert parser.parse_args(["--blob-data-size", text, "toc"]).blob_data_size == 42
