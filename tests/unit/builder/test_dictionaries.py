"""Chunks of other images: dictionaries, parents, and what is chosen for a dictionary."""

import io
import logging
import random
import sqlite3

import pytest

from builder import (
    BuildError,
    BuildOptions,
    DictionaryOptions,
    MergeOptions,
    SourceOptions,
    SourceType,
    WhiteoutSpec,
    build,
    generate_dictionary,
    merge,
    unpack,
)
from builder.backends import blob_directory
from builder.blobtable import BlobTable
from builder.chunkdb import BlobRow, ChunkDatabase, ChunkRow, database_path
from builder.chunkdict import dictionary_path
from builder.dictselect import choose
from builder.merge import InconsistentLayers
from erofs import NydusError, check_image, open_bootstrap
from erofs.cipher import BlobCipher
from erofs.rafs import BlobFeatures, Digester
from tests.fakes.built import member, tar_of

RANDOM = random.Random(11)
DATA = [RANDOM.randbytes(size) for size in (5000, 9000, 300, 20000, 4096, 700)]


def make(folder, *members, name="boot", **changes):
    """Build an image whose blob lies in `folder`."""
    return build(
        io.BytesIO(tar_of(*members)),
        BuildOptions(
            source_type=SourceType.TAR, bootstrap=folder / name, blob_dir=folder,
            **{"chunk_size": 0x1000, **changes},
        ),
    )  # fmt: skip


def files(*numbers):
    return [member(f"f{number}", data=DATA[number]) for number in numbers]


def content(folder, name="boot"):
    target = folder / "content.tar"
    unpack(folder / name, target, blob_directory(folder))
    data = target.read_bytes()
    target.unlink()
    return data


@pytest.mark.parametrize("changes", [{}, {"toc": True}, {"batch_size": 0x1000},
                                     {"encryption": BlobCipher.generate()}])  # fmt: skip
def test_known_chunks_are_not_stored_again(changes, tmp_path):
    base = make(tmp_path, *files(0, 1, 2), name="dict", **changes)
    plain = make(tmp_path, *files(3, 0, 1, 2), name="plain")
    result = make(tmp_path, *files(3, 0, 1, 2), chunk_dict=tmp_path / "dict")
    assert result.blobs[1] == base.blobs[0]
    assert result.blob_content_bytes == len(DATA[3])
    assert result.stats.duplicate_bytes == sum(map(len, DATA[:3]))
    assert content(tmp_path) == content(tmp_path, "plain")
    assert len(plain.blobs) == 1
    with open_bootstrap(tmp_path / "boot") as image:
        assert list(check_image(image)) == []


def test_blob_of_a_dictionary_comes_first_when_it_is_met_first(tmp_path):
    base = make(tmp_path, *files(0), name="dict")
    result = make(tmp_path, *files(0, 3), chunk_dict=tmp_path / "dict")
    assert result.blobs[0] == base.blobs[0]
    unused = make(tmp_path, *files(4), name="other", chunk_dict=tmp_path / "dict")
    assert len(unused.blobs) == 1
    everything = make(tmp_path, *files(0), name="all", chunk_dict=tmp_path / "dict")
    assert everything.blobs == base.blobs
    assert everything.blob_path is None


def test_dictionary_inside_of_a_blob(tmp_path):
    base = build(
        io.BytesIO(tar_of(*files(0, 1))),
        BuildOptions(
            source_type=SourceType.TAR, blob_dir=tmp_path, inline_bootstrap=True, toc=True
        ),
    )
    result = build(
        io.BytesIO(tar_of(*files(1, 2))),
        BuildOptions(
            source_type=SourceType.TAR, blob_dir=tmp_path, inline_bootstrap=True,
            chunk_dict=base.blob_path,
        ),
    )  # fmt: skip
    assert result.blobs == [base.blobs[0], result.blob_path.name]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"chunk_size": 0x2000}, "chunk_size: expected 8192, got 4096"),
        ({"source": SourceOptions(keep_owners=False)}, "explicit_uidgid"),
    ],
)
@pytest.mark.parametrize("role", ["chunk_dict", "parent_bootstrap"])
def test_images_that_do_not_fit(role, changes, what, tmp_path):
    make(tmp_path, *files(0), name="other")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BuildError, match=what) as raised:
        make(tmp_path, *files(1), **{role: tmp_path / "other", **changes})
    assert raised.value.exit_code == 1
    assert str(tmp_path / "other") in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("role", ["chunk_dict", "parent_bootstrap"])
def test_images_that_are_none(role, tmp_path):
    (tmp_path / "junk").write_bytes(b"x" * 10000)
    for name in ("junk", "nowhere"):
        with pytest.raises(NydusError, match=name):
            make(tmp_path, *files(1), **{role: tmp_path / name})
    assert [path.name for path in tmp_path.iterdir()] == ["junk"]


def test_dictionary_of_other_digests_is_of_no_use(tmp_path, caplog):
    make(tmp_path, *files(0), name="dict", digester=Digester.SHA256)
    with caplog.at_level(logging.WARNING):
        result = make(tmp_path, *files(0), chunk_dict=tmp_path / "dict")
    assert result.blob_content_bytes == len(DATA[0])
    assert "its digests are sha256" in caplog.text


def test_words_for_a_dictionary():
    assert str(dictionary_path("bootstrap=a/b")) == str(dictionary_path("a/b")) == "a/b"
    with pytest.raises(BuildError, match="boltdb"):
        dictionary_path("boltdb=x")


def whiteout(name):
    return member(f".wh.{name}")


def test_tar_on_a_parent(tmp_path):
    lower = make(tmp_path, *files(0, 1, 2), name="lower")
    upper = [member("f0", data=DATA[4]), whiteout("f1"), *files(3), member("copy", data=DATA[2])]
    result = make(tmp_path, *upper, parent_bootstrap=tmp_path / "lower")
    assert result.blobs[0] == lower.blobs[0]
    assert result.blob_content_bytes == len(DATA[4]) + len(DATA[3])
    make(tmp_path, *upper[:1], *files(2, 3), upper[-1], name="flat")
    assert content(tmp_path) == content(tmp_path, "flat")
    kept = make(
        tmp_path, *upper, name="kept", parent_bootstrap=tmp_path / "lower",
        source=SourceOptions(whiteout_spec=WhiteoutSpec.NONE),
    )  # fmt: skip
    with open_bootstrap(kept.bootstrap) as image:
        assert image.lookup(b"/f1") is not None
        assert image.lookup(b"/.wh.f1") is not None


def test_directory_on_a_parent(tmp_path):
    make(tmp_path, *files(0, 1), member("dir", "dir"), member("dir/x", data=b"x"), name="lower")
    source = tmp_path / "source"
    (source / "dir").mkdir(parents=True)
    (source / "f2").write_bytes(DATA[2])
    (source / "dir" / ".wh..wh..opq").touch()
    (source / ".wh.f0").touch()
    build(
        source,
        BuildOptions(
            bootstrap=tmp_path / "boot", blob_dir=tmp_path, chunk_size=0x1000,
            parent_bootstrap=tmp_path / "lower",
        ),
    )  # fmt: skip
    with open_bootstrap(tmp_path / "boot") as image:
        assert list(check_image(image)) == []
        names = {path for path, _ in image.walk()}
        assert names == {b"/", b"/dir", b"/f1", b"/f2"}


def test_blob_that_parent_and_dictionary_have_is_there_once(tmp_path):
    make(tmp_path, *files(0, 1), name="lower")
    result = make(
        tmp_path, *files(0, 3), parent_bootstrap=tmp_path / "lower", chunk_dict=tmp_path / "lower"
    )
    assert len(result.blobs) == 2
    assert len(set(result.blobs)) == 2


def test_two_blobs_of_one_name(tmp_path):
    make(tmp_path, *files(0), name="lower", blob_id="mine")
    with pytest.raises(BuildError, match="one name"):
        make(tmp_path, *files(1), parent_bootstrap=tmp_path / "lower", blob_id="mine")


def test_table_numbers_in_order_of_reference(tmp_path):
    with open_bootstrap(make(tmp_path, *files(0)).bootstrap) as image:
        blank = image.blobs[0]
    one, two, own = (blank._replace(blob_id=name) for name in (b"1", b"2", b"own"))
    table = BlobTable([one])
    assert [table.add(two), table.own(), table.add(one), table.own()] == [1, 2, 0, 2]
    assert [blob.blob_id for blob in table.entries(own)] == [b"1", b"2", b"own"]
    assert [blob.blob_index for blob in table.entries(own)] == [0, 1, 2]


def test_merge_of_layers_on_a_dictionary(tmp_path):
    make(tmp_path, *files(0, 1), name="dict")
    for name, numbers in (("one", (0, 2)), ("two", (1, 3))):
        make(tmp_path, *files(*numbers), name=name, chunk_dict=tmp_path / "dict")
    layers = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(BuildError, match="one blob besides"):
        merge(layers, MergeOptions(bootstrap=tmp_path / "merged"))
    options = MergeOptions(bootstrap=tmp_path / "merged", chunk_dict=tmp_path / "dict")
    result = merge(layers, options)
    assert sorted(result.blobs)[-2:] == ["one", "two"]
    with open_bootstrap(tmp_path / "merged") as image:
        assert list(check_image(image)) == []
        assert len(image.blobs) == 3
    make(tmp_path, *files(0), name="large", chunk_size=0x2000)
    with pytest.raises(InconsistentLayers):
        merge(layers, MergeOptions(bootstrap=tmp_path / "x", chunk_dict=tmp_path / "large"))


def test_merge_keeps_ids_when_blobs_are_at_hand(tmp_path):
    one = make(tmp_path, *files(0), name="one")
    two = build(
        io.BytesIO(tar_of(*files(1))),
        BuildOptions(
            source_type=SourceType.TAR, blob_dir=tmp_path, inline_bootstrap=True, chunk_size=0x1000
        ),
    )
    options = MergeOptions(bootstrap=tmp_path / "merged", keep_ids=True, inlined=True)
    result = merge([tmp_path / "one", two.blob_path], options)
    assert result.blobs == [one.blobs[0], two.blob_path.name]


def test_merge_of_different_blobs_of_one_name(tmp_path):
    for folder, number in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        make(tmp_path / folder, member(f"of {folder}", data=DATA[number]), name="layer.boot")
    layers = [tmp_path / folder / "layer.boot" for folder in "ab"]
    with pytest.raises(BuildError, match="different blobs of one name"):
        merge(layers, MergeOptions(bootstrap=tmp_path / "merged"))
    merge(layers, MergeOptions(bootstrap=tmp_path / "merged", original_blob_ids=["a", "b"]))


# Choosing chunks.


def row(image, version, digest, size=100):
    return ChunkRow(image, version, f"blob of {image}", digest, 1, size, size, 0, 0)


def versions(image, *sets):
    return [row(image, f"v1.{number}", name) for number, names in enumerate(sets) for name in names]


def test_what_keeps_coming_back_is_chosen():
    rows = versions("app", "abc", "abd", "abe", "abf", "abg", "abh")
    choice = choose(rows)
    assert {chunk.digest for chunk in choice.chunks} <= set("ab")
    assert choice.chunks
    assert choice.noise == ["app"]


def test_one_version_teaches_nothing():
    assert choose(versions("app", "abc")).chunks == []
    assert choose([]).chunks == []


def test_versions_are_ordered_by_their_numbers():
    rows = [row("app", f"v1.{number}", "common") for number in (10, 9, 2, 1)]
    rows += [row("app", f"v1.{number}", f"of {number}") for number in (10, 9, 2, 1)]
    assert {chunk.digest for chunk in choose(rows).chunks} <= {"common"}


def test_images_with_the_same_base_are_a_cluster():
    rows = []
    for number in range(12):
        for version in range(3):
            name = f"image{number}"
            rows += [row(name, f"{version}", f"base{part}") for part in range(20)]
            rows.append(row(name, f"{version}", f"own {name}"))
    rows += [row("stranger", str(version), f"s{version}") for version in range(3)]
    choice = choose(rows)
    assert {f"base{part}" for part in range(20)} <= {chunk.digest for chunk in choice.chunks}
    assert choice.noise == ["stranger"]


def test_database_addresses():
    assert database_path("sqlite:///a/b.db") == "/a/b.db"
    assert database_path("sqlite://:memory:") == ":memory:"
    for text in ("sqlite:/a", "a.db", "sqlite://a/b", "a://b://c"):
        with pytest.raises(BuildError, match="Invalid database URL"):
            database_path(text)
    with pytest.raises(BuildError, match="Unsupported database type: mysql"):
        database_path("mysql:///a")


def add_and_fail(path, blob, chunks):
    with ChunkDatabase(path) as database:
        database.add([blob], chunks)
        raise KeyError


def test_database_keeps_rows(tmp_path):
    path = str(tmp_path / "chunks.db")
    blob = BlobRow("b", 1, 2, "zstd", 3, 4, 5)
    chunks = [row("i", "1", "0a" * 32), row("i", "1", "f9" * 32)]
    with ChunkDatabase(path) as database:
        database.add([blob], chunks)
    with pytest.raises(KeyError):
        add_and_fail(path, blob, chunks)
    with ChunkDatabase(path) as database:
        assert database.chunks() == chunks
        assert database.chunks("nobody's") == []
        assert database.blob("b") == blob
        with pytest.raises(BuildError, match="not in the database"):
            database.blob("c")
    (tmp_path / "chunks.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(BuildError, match="database failed"):
        ChunkDatabase(path)
    with pytest.raises(BuildError, match="database failed"):
        ChunkDatabase(str(tmp_path / "no" / "directory"))


@pytest.mark.parametrize("change", [
    "chunk SET chunk_digest = NULL", "chunk SET image_reference = NULL",
    "chunk SET chunk_compressed_size = 'few'", "chunk SET chunk_uncompressed_size = 1 << 32",
    "chunk SET chunk_uncompressed_offset = 1.5", "chunk SET chunk_compressed_offset = -1",
    "blob SET blob_compressor = NULL", "blob SET blob_meta_ci_offset = -1",
])  # fmt: skip
def test_database_with_a_row_that_is_none(change, tmp_path):
    path = str(tmp_path / "chunks.db")
    with ChunkDatabase(path) as database:
        database.add([BlobRow("b", 1, 2, "zstd", 3, 4, 5)], [row("i", "1", "0a" * 32)])
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE {change}")
    with pytest.raises(BuildError, match="neither a chunk nor a blob") as caught:
        ChunkDatabase(path)
    assert caught.value.where["path"] == path


def generation(tmp_path, count=4, **changes):
    sources = []
    for number in range(count):
        folder = tmp_path / f"registry:5000:app:v{number}"
        folder.mkdir()
        make(folder, *files(0, 1, 3), member("own", data=RANDOM.randbytes(5000)), **changes)
        sources.append(folder / "boot")
    return sources


@pytest.mark.parametrize("changes", [{}, {"toc": True}, {"batch_size": 0x1000},
                                     {"encryption": BlobCipher.generate()},
                                     {"digester": Digester.SHA256}])  # fmt: skip
def test_generated_dictionary_can_be_built_on(changes, tmp_path):
    sources = generation(tmp_path, **changes)
    result = generate_dictionary(sources, DictionaryOptions(bootstrap=tmp_path / "dict"))
    assert result.blobs
    with open_bootstrap(tmp_path / "dict") as image:
        assert list(check_image(image)) == []
        assert image.digester is changes.get("digester", Digester.BLAKE3)
        for blob in image.blobs:
            assert blob.features & BlobFeatures.IS_CHUNKDICT_GENERATED
            assert blob.uncompressed_size % 4096 == 0
    plain = {key: value for key, value in changes.items() if key == "digester"}
    built = make(tmp_path, *files(0, 2, 3), chunk_dict=tmp_path / "dict", **plain)
    assert built.blob_content_bytes == len(DATA[2])
    for source in sources:
        for path in source.parent.iterdir():
            if path.name in result.blobs:
                (tmp_path / path.name).write_bytes(path.read_bytes())
    make(tmp_path, *files(0, 2, 3), name="plain", **plain)
    assert content(tmp_path) == content(tmp_path, "plain")


def test_chunks_of_earlier_runs_count(tmp_path):
    sources = generation(tmp_path)
    options = DictionaryOptions(str(tmp_path / "chunks.db"), tmp_path / "dict")
    assert generate_dictionary(sources[:1], options).blobs == []
    found = [generate_dictionary([source], options).blobs for source in sources[1:]]
    assert found[-1]
    with sqlite3.connect(tmp_path / "chunks.db") as connection:
        (count,) = connection.execute("SELECT count(DISTINCT version) FROM chunk").fetchone()
    assert count == 4
    with open_bootstrap(tmp_path / "dict") as image:
        assert list(check_image(image)) == []


@pytest.mark.parametrize("text", ["no digest", "0a", "0g" * 32])
def test_chunks_of_earlier_runs_without_a_digest(text, tmp_path):
    sources = generation(tmp_path)
    options = DictionaryOptions(str(tmp_path / "chunks.db"), tmp_path / "dict")
    generate_dictionary(sources[:-1], options)
    (tmp_path / "dict").unlink()
    with sqlite3.connect(tmp_path / "chunks.db") as connection:
        connection.execute("UPDATE chunk SET chunk_digest = ?", [text])
    with pytest.raises(BuildError, match="without a digest"):
        generate_dictionary(sources[-1:], options)
    assert not (tmp_path / "dict").exists()


def test_sources_that_cannot_be_in_a_dictionary(tmp_path):
    make(tmp_path, *files(0))
    options = DictionaryOptions(bootstrap=tmp_path / "dict")
    with pytest.raises(BuildError, match="IMAGE:VERSION"):
        generate_dictionary([tmp_path / "boot"], options)
    sources = generation(tmp_path, 2)
    other = tmp_path / "other:1"
    other.mkdir()
    make(other, *files(0), digester=Digester.SHA256)
    with pytest.raises(BuildError, match="digester"):
        generate_dictionary([*sources, other / "boot"], options)
    make(other, *files(0), chunk_size=0x2000)
    with pytest.raises(BuildError, match="chunk_size"):
        generate_dictionary([*sources, other / "boot"], options)
    assert not (tmp_path / "dict").exists()
