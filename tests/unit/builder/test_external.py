"""Files whose content is elsewhere, and cache files in place of a blob."""

import re

import pytest

from builder import BuildError, BuildOptions, SourceType, build
from builder.attributes import parse_attributes
from builder.cli import main
from builder.options import check_options
from erofs import check_image, framing, open_bootstrap
from erofs.citable import parse_cached
from erofs.inlined import read_inlined_bootstrap
from erofs.rafs import BlobFeatures, Compressor
from erofs.view import View

ID = "a" * 64
LINE = (
    f"models/large type=external blob_index=0 blob_id={ID} chunk_size=4096"
    " chunk_0_compressed_offset=8192 compressed_size=1000000"
)


def attributes(tmp_path, *lines):
    path = tmp_path / "attributes"
    path.write_text("\n".join(lines))
    return parse_attributes(path)


def test_lines_of_attributes(tmp_path):
    found = attributes(
        tmp_path,
        "# a comment",
        "",
        f"  {LINE}  crcs=0x1234,abcd file_size=5000",
        LINE.replace("models/large", '"/with space"').replace("4096", "4KiB"),
        "models type=external",
        "other type=ignore",
    ).files
    assert list(found) == [b"/models/large", b"/with space"]
    large = found[b"/models/large"]
    assert (large.size, large.crcs, large.offset) == (5000, (0x1234, 0xABCD), 8192)
    assert found[b"/with space"].chunk_size == 4096


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (LINE.replace(ID, "short"), "blob_id"),
        (LINE.replace("blob_index=0", ""), "blob_index"),
        (LINE.replace("8192", "0x2000"), "chunk_0_compressed_offset"),
        (LINE.replace("4096", "4parsec"), "chunk_size"),
        (LINE + " crcs=0x123456789", "CRC-32C"),
        ('"unfinished type=external blob_id=x', "quotes"),
    ],
)
def test_lines_that_are_not_understood(line, what, tmp_path):
    with pytest.raises(BuildError, match=f"line 2 of the attributes: .*{what}"):
        attributes(tmp_path, "# first", line)


def test_attributes_that_are_not_there(tmp_path):
    with pytest.raises(BuildError, match="No such file"):
        parse_attributes(tmp_path / "nowhere")


def source_of(tmp_path):
    source = tmp_path / "source"
    (source / "models" / "deep").mkdir(parents=True)
    (source / "plain").write_bytes(b"plain")
    (source / "models" / "large").write_bytes(b"l" * 10000)
    (source / "models" / "small").write_bytes(b"small")
    return source


def options(tmp_path, found, **changes):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    places = {"bootstrap": out / "image.boot", "blob_dir": out}
    return BuildOptions(attributes=found, chunk_size=4096, **{**places, **changes})


def test_external_files_are_in_a_bootstrap_of_their_own(tmp_path):
    found = attributes(tmp_path, LINE + " crcs=0x1,0x2,0x3")
    result = build(source_of(tmp_path), options(tmp_path, found))
    assert result.external_blobs == [ID]
    assert result.external_bootstrap == tmp_path / "out" / "image.external"
    with open_bootstrap(result.bootstrap) as image:
        names = {path for path, inode in image.walk() if inode.is_regular}
        assert names == {b"/plain", b"/models/small"}
        assert list(check_image(image)) == []
    with open_bootstrap(result.external_bootstrap) as image:
        assert list(check_image(image)) == []
        assert {path for path, _ in image.walk()} == {b"/", b"/models", b"/models/large"}
        inode = image.lookup(b"/models/large")
        chunks = list(inode.file_chunks())
        assert [chunk.compressed_offset for chunk in chunks] == [8192, 12288, 16384]
        assert [chunk.uncompressed_size for chunk in chunks] == [4096, 4096, 1808]
        assert [chunk.crc32c for chunk in chunks] == [1, 2, 3]
        (blob,) = image.blobs
        assert blob.features & BlobFeatures.EXTERNAL
        assert blob.uncompressed_size == 1003520
        assert blob.compressed_size == 1000000


def test_size_of_the_attributes_counts(tmp_path):
    found = attributes(tmp_path, LINE + " file_size=4097")
    result = build(source_of(tmp_path), options(tmp_path, found))
    with open_bootstrap(result.external_bootstrap) as image:
        assert image.lookup(b"/models/large").size == 4097


def test_external_bootstrap_beside_one_without_a_name(tmp_path):
    found = attributes(tmp_path, LINE)
    result = build(source_of(tmp_path), options(tmp_path, found, bootstrap=None))
    assert result.external_bootstrap.name == result.bootstrap.name + ".external"


def test_inlined_metadata_of_external_files(tmp_path):
    found = attributes(tmp_path, LINE)
    inlined = {"bootstrap": None, "inline_bootstrap": True, "toc": True}
    source = source_of(tmp_path)
    with pytest.raises(BuildError, match="--external-blob"):
        build(source, options(tmp_path, found, **inlined))
    assert list((tmp_path / "out").iterdir()) == []
    path = tmp_path / "external"
    build(source, options(tmp_path, found, external_blob=path, **inlined))
    blob = View(path.read_bytes())
    assert [s.name for s in framing.read_sections(blob)] == [b"image.boot", b"rafs.blob.toc"]
    image = open_bootstrap(read_inlined_bootstrap(blob))
    assert image.lookup(b"/models/large") is not None


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (LINE.replace("chunk_size=4096", "chunk_size=8192"), "chunks of another size"),
        (LINE.replace("8192", "8191"), "impossible place"),
        (LINE.replace("1000000", "8192"), "impossible place"),
        (LINE + " crcs=0x1", "number of CRCs"),
        (LINE.replace("blob_index=0", "blob_index=1"), "numbered one by one"),
        (LINE.replace("models/large", "models"), "no regular file"),
        (LINE.replace("models/large", "nowhere"), "not in the directory"),
    ],
)
def test_external_files_that_cannot_be(line, what, tmp_path):
    source = source_of(tmp_path)
    with pytest.raises(BuildError, match=what):
        build(source, options(tmp_path, attributes(tmp_path, line)))
    assert list((tmp_path / "out").iterdir()) == []


def test_two_names_for_one_external_blob(tmp_path):
    other = LINE.replace("models/large", "plain").replace("a" * 64, "b" * 64)
    with pytest.raises(BuildError, match="two external blobs of number 0"):
        build(source_of(tmp_path), options(tmp_path, attributes(tmp_path, LINE, other)))


def test_cache_files(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    source = source_of(tmp_path)
    changes = {"blob_dir": None, "blob_cache_dir": cache, "compressor": Compressor.ZSTD}
    result = build(source, options(tmp_path, None, **changes))
    names = sorted(path.name for path in cache.iterdir())
    assert names == [f"{result.blobs[0]}.blob.data", f"{result.blobs[0]}.blob.meta"]
    data = (cache / names[0]).read_bytes()
    table = parse_cached((cache / names[1]).read_bytes())
    assert len(data) == table.uncompressed_size
    with open_bootstrap(result.bootstrap) as image:
        assert image.blobs[0].compressor == Compressor.NONE
        for info in image.chunk_infos:
            assert table.agrees(info)
        inode = image.lookup(b"/plain")
        (chunk,) = inode.file_chunks()
        assert data[chunk.uncompressed_offset :].startswith(b"plain\0")


def test_cache_files_of_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    cache = tmp_path / "cache"
    cache.mkdir()
    changes = {"blob_dir": None, "blob_cache_dir": cache}
    assert build(tmp_path / "empty", options(tmp_path, None, **changes)).blobs == []
    assert list(cache.iterdir()) == []


def test_cache_files_are_made_whole_or_not_at_all(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    bad = options(tmp_path, None, blob_dir=None, blob_cache_dir=cache,
                  bootstrap=tmp_path / "no" / "where")  # fmt: skip
    with pytest.raises(BuildError, match="cannot be written"):
        build(source_of(tmp_path), bad)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"blob_cache_dir": "here"}, "instead of a blob"),
        ({"blob_cache_dir": "nowhere", "blob_dir": None}, "does not exist"),
        ({"source_type": SourceType.TAR, "attributes": "some"}, "--attributes"),
        ({"source_type": SourceType.TARFS, "batch_size": 4096}, "--batch-size"),
        ({"source_type": SourceType.TARFS, "chunk_dict": "x"}, "--chunk-dict"),
        ({"source_type": SourceType.TARFS, "parent_bootstrap": "x"}, "--parent-bootstrap"),
    ],
)
def test_options_that_exclude_each_other(changes, what, tmp_path):
    values = dict(changes)
    if "blob_cache_dir" in values:
        values["blob_cache_dir"] = tmp_path / values["blob_cache_dir"].replace("here", "")
    if "attributes" in values:
        values["attributes"] = attributes(tmp_path, LINE)
    with pytest.raises(BuildError, match=what):
        check_options(options(tmp_path, values.pop("attributes", None), **values))


@pytest.mark.parametrize(
    "words", [["--blob", "b"], ["-D", "."], ["--compressor", "none"], ["--blob-inline-meta"]]
)
def test_words_that_exclude_cache_files(words, tmp_path, capsys):
    place = [] if "--blob-inline-meta" in words else ["-B", str(tmp_path / "boot")]
    command = ["create", "--blob-cache-dir", str(tmp_path), *place, *words, str(tmp_path)]
    with pytest.raises(SystemExit) as raised:
        main(command)
    assert raised.value.code == 2
    assert re.search("'--blob-cache-dir <blob-cache-dir>' cannot be used", capsys.readouterr().err)
