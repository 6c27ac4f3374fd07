"""`build` and `merge` as functions: repeatable bytes, options, and nothing left after errors."""

import gzip
import io
import os
import random
import tarfile
import threading
from pathlib import Path

import pytest

from builder import (
    BuildError,
    BuildOptions,
    MergeOptions,
    PrefetchPolicy,
    SourceOptions,
    SourceType,
    build,
    merge,
)
from builder.cli import main
from builder.cli.common import read_patterns
from builder.merge import InconsistentLayers
from builder.prefetch import parse_patterns
from erofs import FormatError, digest, open_bootstrap
from erofs.rafs import Compressor


def make_tar(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


_LARGE = random.Random(0).randbytes(5_000_000)
CONTENT = {
    "small": b"small",
    "empty": b"",
    "large": _LARGE,
    "copy": _LARGE,
}


def options(folder, **changes):
    return BuildOptions(
        source_type=SourceType.TAR, bootstrap=folder / "boot", blob_dir=folder, **changes
    )


def outputs(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("chunk_size", [0x1000, 0x100000])
def test_the_number_of_workers_changes_no_byte(tmp_path, chunk_size):
    made = []
    for workers in (1, 2, 7):
        folder = tmp_path / str(workers)
        folder.mkdir()
        build(
            io.BytesIO(make_tar(**CONTENT)),
            options(folder, workers=workers, chunk_size=chunk_size),
        )
        made.append(outputs(folder))
    assert made[0] == made[1] == made[2]
    assert len(made[0]) == 2


def test_result_counts(tmp_path):
    seen = []
    result = build(io.BytesIO(make_tar(**CONTENT)), options(tmp_path, progress=seen.append))
    size = len(CONTENT["large"])
    assert result.names == 5
    assert result.stats.content_bytes == 2 * size + 5 == sum(seen)
    assert result.stats.duplicate_bytes == size
    assert result.blob_content_bytes == size + 5
    assert result.blob_path.stat().st_size == result.blob_size
    assert result.blobs == [result.blob_path.name]


def test_gzip_and_pipes(tmp_path):
    plain, packed, piped = (tmp_path / name for name in ("plain", "packed", "piped"))
    data = make_tar(**CONTENT)
    for folder in (plain, packed, piped):
        folder.mkdir()
    build(io.BytesIO(data), options(plain))
    build(io.BytesIO(gzip.compress(data)), options(packed))
    read, write = os.pipe()
    with open(read, "rb") as source, open(write, "wb") as sink:
        feeder = threading.Thread(target=lambda: (sink.write(data), sink.close()))
        feeder.start()
        build(source, options(piped))
        feeder.join()
        assert not source.closed
    assert outputs(plain) == outputs(packed) == outputs(piped)


@pytest.mark.parametrize("kind", [SourceType.TAR, SourceType.TARGZ_REF])
def test_gzip_of_nothing_is_a_layer_without_members(tmp_path, kind):
    build(io.BytesIO(gzip.compress(b"")), options(tmp_path)._replace(source_type=kind))
    with open_bootstrap(tmp_path / "boot") as image:
        assert [path for path, _ in image.walk()] == [b"/"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "empty file"),
        (make_tar(**CONTENT)[:5000], "end"),
        (gzip.compress(make_tar(**CONTENT))[:2000], "broken gzip"),
        (b"\x1f\x8b" + bytes(600), "broken gzip"),
    ],
)
def test_broken_sources_leave_nothing(tmp_path, data, text):
    with pytest.raises(BuildError, match=text):
        build(io.BytesIO(data), options(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_size": 3000},
        {"chunk_size": 0x2000000},
        {"blob_id": "a/b"},
        {"blob_id": "x" * 65},
        {"inline_bootstrap": True},
    ],
)
def test_options_that_are_refused(tmp_path, changes):
    with pytest.raises(BuildError):
        build(io.BytesIO(make_tar(a=b"a")), options(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_missing_parents_land_where_they_belong(tmp_path):
    build(io.BytesIO(make_tar(**{"b/x": b"1", "a/y/2": b"2", "a/z": b"3"})), options(tmp_path))
    with open_bootstrap(tmp_path / "boot") as image:
        paths = {path for path, inode in image.walk() if inode.is_regular}
    assert paths == {b"/b/x", b"/a/y/2", b"/a/z"}


def member(name, kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def tar_of(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info in members:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return io.BytesIO(buffer.getvalue())


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ([member("../up")], r"'\.\.' component"),
        ([member("a/../../up")], r"'\.\.' component"),
        ([member("a"), member("a/b")], "not a directory"),
        ([member("l", tarfile.LNKTYPE, linkname="nowhere")], "not there"),
        ([member("d/f"), member("l", tarfile.LNKTYPE, linkname="d")], "which is a directory"),
        ([member("l", tarfile.LNKTYPE, linkname="l")], "not there"),
        (
            [
                member("l", tarfile.LNKTYPE, linkname="m"),
                member("m", tarfile.LNKTYPE, linkname="l"),
            ],
            "not there",
        ),
        ([member("s", tarfile.SYMTYPE, linkname="x"), member("s/f")], "symlink to nowhere"),
        ([member("s", tarfile.SYMTYPE, linkname="s"), member("s/f")], "loop of symlinks"),
        (
            [
                member("s", tarfile.SYMTYPE, linkname="../t/."),
                member("t", tarfile.SYMTYPE, linkname="/s"),
                member("l", tarfile.LNKTYPE, linkname="t/f"),
            ],
            "loop of symlinks",
        ),
        ([member("s", tarfile.SYMTYPE, linkname="x" * 4096)], "length of a symlink"),
        ([member("x" * 256)], "impossible component"),
        ([member(".")], "root is not a directory"),
        ([member("f", pax_headers={"SCHILY.xattr.other.x": "1"})], "xattr"),
    ],
)
def test_hostile_members_are_named(tmp_path, members, text):
    with pytest.raises((BuildError, FormatError), match=text) as caught:
        build(tar_of(*members), options(tmp_path))
    assert caught.value.where["entry"]
    assert not list(tmp_path.iterdir())


def test_pax_times_on_request(tmp_path):
    def times(**source):
        build(
            tar_of(member("f", mtime=1700000000.25)),
            options(tmp_path, source=SourceOptions(**source)),
        )
        with open_bootstrap(tmp_path / "boot") as image:
            inode = image.lookup(b"/f")
            return inode.mtime, inode.mtime_nsec

    # Python's tarfile puts the rounded seconds into the header.
    assert times() == (1700000000, 0)
    assert times(pax_mtime=True) == (1700000000, 250_000_000)


def test_last_of_two_members_wins_and_children_stay(tmp_path):
    build(
        tar_of(
            member("d", tarfile.DIRTYPE, mode=0o700),
            member("d/f", size=5),
            member("d", tarfile.DIRTYPE, mode=0o711),
            member("d/f", size=9),
        ),
        options(tmp_path),
    )
    with open_bootstrap(tmp_path / "boot") as image:
        assert image.lookup(b"/d").mode & 0o777 == 0o711
        assert image.lookup(b"/d/f").size == 9


def test_full_disk_at_the_end(tmp_path, monkeypatch):
    """A disk that fills up may say so only when delayed writes are flushed."""

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(BuildError, match="No space left"):
        build(io.BytesIO(make_tar(**CONTENT)), options(tmp_path))
    assert not list(tmp_path.iterdir())


def test_bootstrap_that_cannot_be_written_leaves_no_blob(tmp_path):
    (tmp_path / "blobs").mkdir()
    with pytest.raises(BuildError, match="cannot be written"):
        build(
            io.BytesIO(make_tar(**CONTENT)),
            BuildOptions(
                source_type=SourceType.TAR,
                bootstrap=tmp_path / "missing" / "boot",
                blob_dir=tmp_path / "blobs",
            ),
        )
    assert not list((tmp_path / "blobs").iterdir())


@pytest.mark.parametrize("place", ["bootstrap", "blob"])
def test_output_that_is_a_directory_leaves_nothing(tmp_path, place):
    paths = {"bootstrap": tmp_path / "boot", "blob": tmp_path / "blob"}
    paths[place].mkdir()
    with pytest.raises(BuildError, match="is a directory"):
        build(io.BytesIO(make_tar(**CONTENT)), BuildOptions(source_type=SourceType.TAR, **paths))
    assert [path.name for path in tmp_path.rglob("*")] == [paths[place].name]


def test_named_blob_without_data_is_an_empty_file(tmp_path):
    """Callers go on with that name; the blob of an earlier build must not stay there."""
    paths = {"bootstrap": tmp_path / "boot", "blob": tmp_path / "blob"}
    for content in (b"old", b""):
        build(io.BytesIO(make_tar(a=content)), BuildOptions(source_type=SourceType.TAR, **paths))
    assert paths["blob"].read_bytes() == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blob", "boot"]


@pytest.mark.parametrize("policy", [PrefetchPolicy.FS, PrefetchPolicy.BLOB])
def test_files_to_prefetch_come_first_in_the_blob_of_a_directory(tmp_path, policy, caplog):
    source = tmp_path / "source"
    (source / "d").mkdir(parents=True)
    for name in ("a", "b", "d/e"):
        (source / name).write_text(name)
    build(
        source,
        BuildOptions(
            bootstrap=tmp_path / "boot", blob_dir=tmp_path, prefetch_policy=policy,
            prefetch_patterns=[b"/d", b"/nothing", b"/b"],
        ),
    )  # fmt: skip
    assert caplog.text.count("names nothing") == 1
    with open_bootstrap(tmp_path / "boot") as image:
        offsets = {
            name: next(iter(image.lookup(name).file_chunks())).uncompressed_offset
            for name in (b"/d/e", b"/b", b"/a")
        }
        assert list(offsets) == sorted(offsets, key=offsets.__getitem__)
        assert bool(image.prefetch_nids) is (policy is PrefetchPolicy.FS)


def test_device_that_is_full(tmp_path):
    with pytest.raises(BuildError, match=r"/dev/full: writing failed \(No space left"):
        build(
            io.BytesIO(make_tar(**CONTENT)),
            BuildOptions(
                source_type=SourceType.TAR,
                bootstrap=tmp_path / "boot",
                blob=Path("/dev/full"),
                compressor=Compressor.NONE,
            ),
        )
    assert not list(tmp_path.iterdir())


def test_worker_that_fails(tmp_path, monkeypatch, capsys):
    """Whatever it was: one line, and nothing is left."""

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(digest, "function", lambda algorithm: fail)
    (tmp_path / "layer.tar").write_bytes(make_tar(**CONTENT))
    out = tmp_path / "out"
    out.mkdir()
    words = ["create", "--type", "tar-rafs", "-B", out / "boot", "-D", out, tmp_path / "layer.tar"]
    assert main([str(word) for word in words]) == 1
    assert capsys.readouterr().err == "Error: out of memory, nothing was left behind\n"
    assert not list(out.iterdir())


def layers(tmp_path, *tars, **changes):
    paths = []
    for number, data in enumerate(tars):
        path = tmp_path / f"l{number}.boot"
        build(
            io.BytesIO(data),
            BuildOptions(source_type=SourceType.TAR, bootstrap=path, blob_dir=tmp_path, **changes),
        )
        paths.append(path)
    return paths


def test_merge(tmp_path):
    paths = layers(tmp_path, make_tar(a=b"1", b=b"2"), make_tar(**{".wh.a": b"", "c": b"3"}))
    result = merge(
        paths,
        MergeOptions(
            bootstrap=tmp_path / "merged",
            prefetch_policy=PrefetchPolicy.FS,
            prefetch_patterns=[b"/c", b"/nothing"],
        ),
    )
    assert result.blobs == ["l0", "l1"]
    assert result.compressor is Compressor.ZSTD
    with open_bootstrap(tmp_path / "merged") as image:
        names = {path for path, _ in image.walk()}
        assert names == {b"/", b"/b", b"/c"}
        assert image.prefetch_nids == (image.lookup(b"/c").nid,)


def test_merge_refuses_what_does_not_fit(tmp_path):
    (one,) = layers(tmp_path, make_tar(a=b"1"))
    (tmp_path / "other").mkdir()
    (two,) = layers(tmp_path / "other", make_tar(a=b"1"), chunk_size=0x1000)
    target = tmp_path / "merged"
    with pytest.raises(InconsistentLayers) as caught:
        merge([one, two], MergeOptions(bootstrap=target))
    assert caught.value.exit_code == 2
    with pytest.raises(BuildError, match="doesn't match"):
        merge([one], MergeOptions(bootstrap=target, blob_sizes=[1, 2]))
    with pytest.raises(BuildError, match="digest"):
        merge([one], MergeOptions(bootstrap=target, blob_digests=[b"short"]))
    with pytest.raises(BuildError, match="number of sources"):
        merge([], MergeOptions(bootstrap=target))
    assert not target.exists()


def test_patterns():
    lines = [b" /a ", b"", b"relative", b"/a/b", b"/ab", b"//c//d/", b"/a"]
    assert parse_patterns(lines) == [b"/a", b"/ab", b"/c/d"]
    assert parse_patterns([b"/", b"/x"]) == [b"/"]
    assert parse_patterns([b"/x/y", b"/x", b"/", b"/z"]) == [b"/x/y", b"/x", b"/"]


def test_patterns_of_standard_input(monkeypatch):
    text = b"/a\rb\n\n/c\x0bd\r\n/e"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert parse_patterns(read_patterns()) == [b"/a\rb", b"/c\x0bd", b"/e"]
