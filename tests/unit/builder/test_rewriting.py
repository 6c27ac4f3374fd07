"""`optimize`, `compact` and `stat`: the same files afterwards, and nothing half-written."""

import io
import json
import random

import pytest

from builder import (
    BuildError,
    BuildOptions,
    CompactOptions,
    FileRanges,
    OptimizeOptions,
    PrefetchPolicy,
    SourceType,
    build,
    compact,
    optimize,
    unpack,
)
from builder.backends import BlobPlaces, blob_directory
from builder.cli import main
from builder.optimize import parse_files
from builder.stat import ImageStat
from erofs import IntegrityError, NydusError, check_image, open_bootstrap
from erofs.cipher import BlobCipher
from erofs.rafs import BlobFeatures, Compressor, Digester
from tests.fakes.built import member, tar_of

RANDOM = random.Random(3)
DATA = {name: RANDOM.randbytes(size) for name, size in
        {"a": 10000, "b": 5000, "c": 20000, "d": 300, "e": 4096}.items()}  # fmt: skip
VARIANTS = {
    "plain": {},
    "contents": {"toc": True},
    "batches": {"batch_size": 0x1000},
    "encrypted": {"encryption": BlobCipher.generate()},
    "encrypted batches": {"encryption": BlobCipher.generate(), "batch_size": 0x1000},
}


def make(folder, *members, name="boot", **changes):
    return build(
        io.BytesIO(tar_of(*members)),
        BuildOptions(
            source_type=SourceType.TAR, bootstrap=folder / name, blob_dir=folder,
            **{"chunk_size": 0x1000, **changes},
        ),
    )  # fmt: skip


def files(names):
    return [member(name, data=DATA[name]) for name in names]


def content(folder, name):
    target = folder / "content.tar"
    unpack(folder / name, target, blob_directory(folder))
    data = target.read_bytes()
    target.unlink()
    return data


def optimized(folder, *wanted, name="optimized"):
    return optimize(
        folder / "boot", wanted, blob_directory(folder), OptimizeOptions(folder / name, folder)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_optimized_images_have_the_same_files(variant, tmp_path):
    link = member("link", "link", linkname="a")
    make(tmp_path, *files("abcd"), link, **VARIANTS[variant])
    result = optimized(
        tmp_path,
        FileRanges(b"/d"),
        FileRanges(b"/link"),
        FileRanges(b"/c", ((4097, 1), (0, 0))),
        FileRanges(b"/nowhere"),
    )
    assert content(tmp_path, "optimized") == content(tmp_path, "boot")
    with open_bootstrap(tmp_path / "optimized") as image:
        assert list(check_image(image)) == []
        assert [blob.id for blob in image.blobs] == result.blobs
        new = image.blobs[1]
        is_secret = bool(VARIANTS[variant].get("encryption"))
        assert bool(new.features & BlobFeatures.ENCRYPTED) == is_secret
        assert new.encryption() != image.blobs[0].encryption() or not is_secret
        places = {
            path: [chunk.blob_index for chunk in inode.file_chunks()]
            for path, inode in image.walk()
            if inode.is_regular
        }
    assert places == {
        b"/d": [1], b"/a": [1, 1, 1], b"/link": [1, 1, 1], b"/b": [0, 0], b"/c": [0, 1, 0, 0, 0],
    }  # fmt: skip


def test_nothing_to_optimize(tmp_path, caplog):
    make(tmp_path, *files("ab"), member("dir", "dir"))
    before = sorted(tmp_path.iterdir())
    result = optimized(tmp_path, FileRanges(b"/dir"), FileRanges(b"/x"), FileRanges(b"/a", ()))
    assert len(result.blobs) == 1
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "optimized"])
    assert "/dir is no regular file" in caplog.text
    assert "/x is not in the image" in caplog.text
    assert (tmp_path / "optimized").read_bytes() == (tmp_path / "boot").read_bytes()


def test_prefetch_table_stays(tmp_path):
    make(tmp_path, *files("ab"), prefetch_policy=PrefetchPolicy.FS, prefetch_patterns=[b"/b"])
    optimized(tmp_path, FileRanges(b"/a"))
    with open_bootstrap(tmp_path / "optimized") as image:
        assert [image.inode(nid).size for nid in image.prefetch_nids] == [len(DATA["b"])]


def test_equal_chunks_are_copied_once(tmp_path):
    make(tmp_path, member("zeros", data=bytes(0x5000)), member("more", data=bytes(0x1000)))
    optimized(tmp_path, FileRanges(b"/zeros"), FileRanges(b"/more"), FileRanges(b"/zeros"))
    with open_bootstrap(tmp_path / "optimized") as image:
        assert image.blobs[1].chunk_count == 1
    assert content(tmp_path, "optimized") == content(tmp_path, "boot")


def test_damaged_data_is_not_copied(tmp_path):
    result = make(tmp_path, *files("ab"), compressor=Compressor.NONE)
    stored = bytearray(result.blob_path.read_bytes())
    stored[0] ^= 1
    result.blob_path.write_bytes(stored)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(IntegrityError):
        optimized(tmp_path, FileRanges(b"/a"))
    with pytest.raises(IntegrityError):
        compacted(tmp_path, min_used_ratio=99, compact_blob_size=1 << 20, name="boot")
    assert sorted(tmp_path.iterdir()) == before


def test_lists_of_files(caplog):
    text = '{"version": "v1", "files": [{"path": "/a"}, {"path": "rel"},'
    text += ' {"path": "/b", "ranges": [[0, 5], [9, 1]]}, {"path": "/c", "ranges": null}]}'
    assert parse_files(text) == [
        FileRanges(b"/a"), FileRanges(b"/b", ((0, 5), (9, 1))), FileRanges(b"/c"),
    ]  # fmt: skip
    assert "not absolute, skipping: rel" in caplog.text
    assert parse_files(" \n") == []
    for wrong in ("{", "[]", '{"version": "v1"}', '{"version": "v1", "files": [{"path": 1}]}',
                  '{"version": "v1", "files": [{"path": "/a", "ranges": [[-1, 2]]}]}',
                  '{"version": "v1", "files": [{"path": "/a", "ranges": [[1]]}]}'):  # fmt: skip
        with pytest.raises(BuildError, match="not understood"):
            parse_files(wrong)
    with pytest.raises(BuildError, match="version"):
        parse_files('{"version": "v2", "files": []}')


def test_ranges_that_only_touch_a_piece():
    ranges = FileRanges(b"/a", ((4096, 4096),))
    assert [ranges.wants(start, 4096) for start in (0, 4096, 8192)] == [False, True, False]


# Compacting.


def compacted(folder, *, name="top", **changes):
    return compact(
        folder / name,
        blob_directory(folder),
        CompactOptions(folder / "compacted", folder, **changes),
    )


def generations(folder, **changes):
    """Build three generations; of the first blob little is used, of the second nothing."""
    make(folder, *files("abc"), name="one", **changes)
    make(folder, *files("de"), name="two", parent_bootstrap=folder / "one", **changes)
    upper = [member(f".wh.{name}") for name in "bcde"]
    return make(
        folder, *upper, member("new", data=DATA["d"][:200]), name="top",
        parent_bootstrap=folder / "two", **changes,
    )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_compacted_images_have_the_same_files(variant, tmp_path):
    before = generations(tmp_path, **VARIANTS[variant])
    assert len(before.blobs) == 3
    result = compacted(tmp_path, min_used_ratio=60, compact_blob_size=0)
    assert content(tmp_path, "compacted") == content(tmp_path, "top")
    assert len(result.blobs) == 2
    assert before.blobs[1] not in result.blobs
    with open_bootstrap(tmp_path / "compacted") as image:
        assert list(check_image(image)) == []
        assert image.blobs[0].chunk_count == 3
        assert [blob.id for blob in image.blobs] == result.blobs
    joined = compacted(tmp_path)
    assert len(joined.blobs) == 1
    assert content(tmp_path, "compacted") == content(tmp_path, "top")


def test_blobs_that_become_one_share_their_chunks(tmp_path):
    generations(tmp_path)
    make(tmp_path, *files("a"), name="other")
    make(tmp_path, member("second", data=DATA["a"]), name="dictless")
    compacted(tmp_path)
    with open_bootstrap(tmp_path / "compacted") as image:
        digests = [chunk.digest for chunk in image.chunk_infos]
        assert len(set(digests)) == len(digests) == image.blobs[0].chunk_count


@pytest.mark.parametrize(
    ("changes", "blobs"),
    [
        ({"compact_blob_size": 0}, 2),
        ({"layers_to_compact": 4}, 3),
        ({"layers_to_compact": 3}, 1),
        ({"max_compact_size": 100}, 2),
    ],
)
def test_what_is_not_worth_compacting(changes, blobs, tmp_path):
    before = generations(tmp_path)
    result = compacted(tmp_path, **changes)
    assert len(result.blobs) == blobs
    if blobs > 1:
        assert set(result.blobs) <= set(before.blobs)
    assert content(tmp_path, "compacted") == content(tmp_path, "top")


def test_blobs_of_a_dictionary_stay_and_are_used(tmp_path):
    generations(tmp_path)
    dictionary = make(tmp_path, *files("a"), name="dict")
    result = compacted(tmp_path, chunk_dict=tmp_path / "dict", min_used_ratio=99)
    assert dictionary.blobs[0] in result.blobs
    assert content(tmp_path, "compacted") == content(tmp_path, "top")
    with open_bootstrap(tmp_path / "compacted") as image:
        used = {chunk.blob_index for chunk in image.lookup(b"/a").file_chunks()}
        assert [image.blobs[number].id for number in used] == dictionary.blobs


def test_blobs_from_two_places(tmp_path):
    generations(tmp_path)
    remote, local = tmp_path / "remote", tmp_path / "local"
    remote.mkdir()
    local.mkdir()
    for number, path in enumerate(sorted(p for p in tmp_path.iterdir() if len(p.name) == 64)):
        path.rename((remote if number % 2 else local) / path.name)
    places = BlobPlaces(local, blob_directory(local), blob_directory(remote))
    result = compact(tmp_path / "top", places, CompactOptions(tmp_path / "compacted", local))
    assert (local / result.blobs[0]).is_file()
    with pytest.raises(NydusError):
        BlobPlaces(local, blob_directory(local), None).open("b" * 64).size()


def test_images_that_are_not_written(tmp_path):
    build(
        io.BytesIO(tar_of(*files("a"))),
        BuildOptions(source_type=SourceType.TARFS, bootstrap=tmp_path / "top", blob_dir=tmp_path),
    )
    with pytest.raises(BuildError, match="tarfs"):
        compacted(tmp_path)
    with pytest.raises(BuildError, match="cannot be opened"):
        compacted(tmp_path, name="nowhere")


def test_full_disk_leaves_nothing(tmp_path):
    generations(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BuildError):
        compact(
            tmp_path / "top",
            blob_directory(tmp_path),
            CompactOptions(tmp_path / "no" / "where", tmp_path),
        )
    assert sorted(tmp_path.iterdir()) == before


# The command lines.


def test_words_of_optimize(tmp_path, capsys):
    make(tmp_path, *files("ab"))
    (tmp_path / "list").write_text('{"version":"v1","files":[{"path":"/a"}]}')
    base = ["-l", "warn", "optimize", "-B", str(tmp_path / "boot"), "-D", str(tmp_path)]
    assert main(base) == 1
    assert "missing parameter `output-blob-dir`" in capsys.readouterr().err
    base += ["--output-blob-dir", str(tmp_path)]
    assert main(base) == 1
    assert "missing parameter `prefetch-files`" in capsys.readouterr().err
    report = tmp_path / "report"
    words = ["-p", str(tmp_path / "list"), "-O", str(tmp_path / "new"), "-J", str(report)]
    assert main([*base, *words]) == 0
    assert len(json.loads(report.read_text())["blobs"]) == 2
    assert main([*base[:5], "--output-blob-dir", str(tmp_path), *words]) == 1
    assert "--blob-dir or --backend-type must be specified" in capsys.readouterr().err


def test_words_of_compact(tmp_path, capsys):
    generations(tmp_path)
    base = ["-l", "warn", "compact", "-B", str(tmp_path / "top"), "-D", str(tmp_path)]
    assert main([*base, "-J", str(tmp_path / "report")]) == 0
    assert (tmp_path / "top.bootstrap.compact").is_file()
    assert len(json.loads((tmp_path / "report").read_text())["blobs"]) == 1
    for words in (["--min-used-ratio", "100"], ["--compact-blob-size", "much"], ["-B"]):
        with pytest.raises(SystemExit) as raised:
            main([*base, *words])
        assert raised.value.code == 2
    capsys.readouterr()


def test_words_of_stat(tmp_path, capsys):
    make(tmp_path, *files("ab"), name="one")
    make(tmp_path, *files("bc"), name="two")
    assert main(["-l", "warn", "stat"]) == 1
    assert "must be specified" in capsys.readouterr().err
    assert main(["-l", "warn", "stat", "-D", str(tmp_path), "-T", str(tmp_path / "two")]) == 0
    out = capsys.readouterr().out
    assert "Target Image Statistics:" in out
    assert "Chunk Deduplication Statistics:" in out
    assert main(["-l", "warn", "stat", "-D", str(tmp_path / "one")]) == 1


def test_stat_counts_blobs_with_inlined_metadata(tmp_path, capsys):
    build(
        io.BytesIO(tar_of(*files("ab"))),
        BuildOptions(source_type=SourceType.TAR, blob_dir=tmp_path, inline_bootstrap=True),
    )
    report = tmp_path / "report.json"
    assert main(["-l", "warn", "stat", "-D", str(tmp_path), "-J", str(report)]) == 0
    assert json.loads(report.read_text())["base_image"]["files"] == 2


def test_words_of_chunkdict(tmp_path, capsys):
    assert main(["chunkdict"]) == 0
    assert "Usage: nydus-image chunkdict" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["chunkdict", "generate", str(tmp_path)])
    assert "--bootstrap <bootstrap>" in capsys.readouterr().err
    words = ["chunkdict", "generate", "-B", str(tmp_path / "d"), "--database", "x", "a:1/boot"]
    assert main(words) == 1
    assert "Invalid database URL" in capsys.readouterr().err


def test_counts_of_shared_chunks(tmp_path):
    make(tmp_path, *files("ab"), name="one")
    make(tmp_path, *files("bc"), name="two")
    stat = ImageStat(Digester.BLAKE3)
    for name in ("one", "two"):
        with open_bootstrap(tmp_path / name) as image:
            stat.add_base(image)
    with open_bootstrap(tmp_path / "one") as image:
        stat.add_target(image)
    stat.deduplicate()
    values = stat.as_json()
    base, target = values["base_image"], values["target_image"]
    assert base["dedup_uncomp_size"] == sum(len(DATA[name]) for name in "abc")
    assert base["own_uncomp_size"] == sum(len(DATA[name]) for name in "abbc")
    assert (target["ref_uncomp_size"], target["own_chunks"]) == (15000, 0)
    lines = list(stat.lines())
    rows = lines[next(n for n, line in enumerate(lines) if line.startswith("Global")) + 1 :]
    # b's two chunks are in both images: from a threshold of three on they are stored twice.
    assert [int(line.split()[2], 16) for line in rows[:3]] == [10, 10, 12]
    with pytest.raises(BuildError):
        stat.deduplicate()
