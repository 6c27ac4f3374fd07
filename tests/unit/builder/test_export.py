"""Disks: what lies where, what is verified, and that nothing is left after a failure."""

import gzip
import io
import itertools
import json
import os
import random
import stat

import pytest

from builder import BuildOptions, SourceType, build, merge
from builder.backends import blob_directory
from builder.cli import main
from builder.export import ExportOptions, VerityOptions, export_block
from builder.merge import MergeOptions
from erofs import (
    CorruptStructure,
    IntegrityError,
    NydusError,
    UnsupportedFeature,
    open_bootstrap,
)
from erofs.layout import DEVICE_TABLE_OFFSET
from erofs.rafs import BlobFeatures, Compressor
from erofs.verity import NYDUS_FILLER
from tests.fakes import disk_files
from tests.fakes.built import built, member, tar_of
from tests.fixtures_path import FIXTURES, needs_fixtures

NOISE = random.Random(7).randbytes(3 << 20)
FILES = {
    "small": b"content",
    "large": NOISE[: (1 << 20) + 5],
    "zeros": bytes(50000),
    "text": b"compressible text\n" * 5000,
    "again": b"content",
}


def layer(names=FILES):
    return tar_of(*(member(name, data=FILES[name]) for name in names))


def tarfs(folder, tar, name="boot"):
    result = build(
        io.BytesIO(tar),
        BuildOptions(source_type=SourceType.TARFS, bootstrap=folder / name, blob_dir=folder),
    )
    (folder / result.blobs[0]).write_bytes(tar)
    return folder / name


def export(bootstrap, **options):
    """Export with the blobs beside the bootstrap; return the result and the bytes."""
    folder = bootstrap.parent
    result = export_block(
        bootstrap, folder / "disk", blob_directory(folder), ExportOptions(**options)
    )
    return result, result.disk.read_bytes()


def files_of(disk):
    return {path.decode(): content for path, content in disk_files.files_of(disk).items()}


@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD])
@pytest.mark.parametrize("chunk_size", [0x1000, 0x100000])
@pytest.mark.parametrize("toc", [False, True])
def test_disk_of_a_native_image(tmp_path, compressor, chunk_size, toc):
    bootstrap = built(tmp_path, layer(), compressor=compressor, chunk_size=chunk_size, toc=toc)
    result, disk = export(bootstrap)
    assert files_of(disk) == FILES
    assert result.tree is None
    with open_bootstrap(bootstrap) as image:
        (slot,) = image.devices
        end = (slot.mapped_blkaddr + slot.blocks) * 4096
        start = slot.mapped_blkaddr * 4096
        assert bytes(image.view.data) == disk[: image.view.length]
        assert not any(disk[image.view.length : start])
    assert (result.size, len(disk), result.block_size) == (end, end, 4096)
    assert stat.S_IMODE(result.disk.stat().st_mode) == 0o644


def test_disk_of_tarfs(tmp_path):
    tar = layer()
    bootstrap = tarfs(tmp_path, tar)
    result, disk = export(bootstrap)
    assert files_of(disk) == FILES
    assert disk[0x80000:] == tar
    assert (result.block_size, result.size) == (512, 0x80000 + len(tar))


def test_tar_that_ends_inside_of_a_block(tmp_path):
    tar = layer() + b"rest"
    result, disk = export(tarfs(tmp_path, tar))
    assert disk[0x80000:] == tar[:-4]
    assert result.size == len(disk)


def test_disk_of_a_layer_with_its_metadata_inside(tmp_path):
    blob = built(tmp_path, layer(), inline_bootstrap=True, toc=True)
    result, disk = export(blob)
    assert files_of(disk) == FILES
    assert result.blobs == [blob.name]


def test_disk_of_merged_layers(tmp_path):
    names = list(FILES)
    layers = []
    for number, part in enumerate((names[:3], names[3:])):
        where = tmp_path / str(number)
        where.mkdir()
        bootstrap = built(where, layer(part))
        with open_bootstrap(bootstrap) as image:
            blob_id = image.blobs[0].id
        (where / blob_id).rename(tmp_path / blob_id)
        layers.append(bootstrap.rename(tmp_path / f"{blob_id}.boot"))
    merge(layers, MergeOptions(bootstrap=tmp_path / "merged"))
    assert files_of(export(tmp_path / "merged")[1]) == FILES


def test_disk_of_merged_tarfs(tmp_path):
    names = list(FILES)
    layers = [
        tarfs(tmp_path, layer(part), str(number))
        for number, part in enumerate((names[:3], names[3:]))
    ]
    merge(layers, MergeOptions(bootstrap=tmp_path / "merged"))
    result, disk = export(tmp_path / "merged", verity=VerityOptions())
    assert files_of(disk) == FILES
    assert result.tree.data_blocks == result.size // 512


def test_chunks_that_no_file_has_any_more_are_there(tmp_path):
    """As on the real tool's disks: the whole blob is."""
    lower = layer(["text", "large"])
    upper = tar_of(member("large", data=b"new"))
    layers = []
    for tar in (lower, upper):
        bootstrap = built(tmp_path, tar, toc=True)
        with open_bootstrap(bootstrap) as image:
            layers.append(bootstrap.rename(tmp_path / f"{image.blobs[0].id}.boot"))
    merge(layers, MergeOptions(bootstrap=tmp_path / "merged"))
    _, disk = export(tmp_path / "merged")
    assert files_of(disk) == {"large": b"new", "text": FILES["text"]}
    assert FILES["large"] in disk


def test_image_without_data_is_its_metadata(tmp_path):
    bootstrap = built(tmp_path, tar_of(member("dir", "dir")))
    result, disk = export(bootstrap, verity=VerityOptions())
    assert disk[: result.size] == bootstrap.read_bytes()
    assert result.tree.data_blocks == result.size // 4096


def test_zeros_take_no_room(tmp_path):
    tar = tar_of(member("zeros", data=bytes(8 << 20)))
    result, _ = export(tarfs(tmp_path, tar))
    assert result.size > 8 << 20
    assert result.disk.stat().st_blocks * 512 < 3 << 20


@pytest.mark.parametrize("make", [tarfs, built])
def test_same_bytes_for_any_number_of_threads_and_each_time(tmp_path, make):
    bootstrap = make(tmp_path, layer())
    disks = {export(bootstrap, threads=count, verity=VerityOptions())[1] for count in (1, 4, 4)}
    assert len(disks) == 1


def test_hash_tree_follows_the_data(tmp_path):
    bootstrap = tarfs(tmp_path, layer())
    plain = export(bootstrap)[1]
    result, disk = export(bootstrap, verity=VerityOptions())
    tree = result.tree
    assert disk[: result.size] == plain
    assert tree.hash_offset == -(-len(plain) // 4096) * 4096
    assert len(disk) == tree.end
    filled, other = export(bootstrap, verity=VerityOptions(filler=NYDUS_FILLER))
    assert filled.tree.root != tree.root
    assert other[: len(plain)] == plain


def test_progress_counts_data_and_tree(tmp_path):
    done = []
    result, _ = export(tarfs(tmp_path, layer()), verity=VerityOptions(), progress=done.append)
    assert sum(done) > result.size - 0x80000 + result.size


# What is wrong, and that nothing is left of it


@pytest.fixture
def failing(tmp_path):
    """Give a function that expects an error of an export and nothing but the inputs behind it."""

    def fail(bootstrap, kind, match, **options):
        before = sorted(os.listdir(bootstrap.parent))
        with pytest.raises(kind, match=match):
            export(bootstrap, **options)
        assert sorted(os.listdir(bootstrap.parent)) == before

    return fail


def blob_of(bootstrap):
    with open_bootstrap(bootstrap) as image:
        return bootstrap.parent / image.blobs[0].id


@pytest.mark.parametrize("make", [tarfs, built])
def test_missing_blob(tmp_path, failing, make):
    bootstrap = make(tmp_path, layer())
    blob_of(bootstrap).unlink()
    failing(bootstrap, NydusError, "no such blob", verity=VerityOptions())


def test_tar_that_is_too_short(tmp_path, failing):
    bootstrap = tarfs(tmp_path, layer())
    blob = blob_of(bootstrap)
    blob.write_bytes(blob.read_bytes()[:-1])
    failing(bootstrap, IntegrityError, "too short")


@pytest.mark.parametrize("place", [0, 5000, 1 << 20])
def test_flipped_byte_of_a_chunk(tmp_path, failing, place):
    bootstrap = built(tmp_path, layer(), compressor=Compressor.NONE)
    blob = blob_of(bootstrap)
    data = bytearray(blob.read_bytes())
    data[place] ^= 1
    blob.write_bytes(data)
    failing(bootstrap, IntegrityError, "chunk has another digest")


def test_flipped_byte_of_a_chunk_that_only_the_blob_knows(tmp_path, failing):
    upper = built(tmp_path, tar_of(member("text", data=b"new")))
    upper = upper.rename(blob_of(upper).with_suffix(".boot"))
    # One of its files stays, so that the blob does.
    lower = built(tmp_path, layer(["text", "small"]), compressor=Compressor.NONE, toc=True)
    lower = lower.rename(blob_of(lower).with_suffix(".boot"))
    merge([lower, upper], MergeOptions(bootstrap=tmp_path / "merged"))
    blob = lower.with_suffix("")
    data = bytearray(blob.read_bytes())
    data[data.index(b"compressible")] ^= 1
    blob.write_bytes(data)
    failing(tmp_path / "merged", IntegrityError, "chunk has another digest")


def test_blob_of_another_image(tmp_path, failing):
    bootstrap = built(tmp_path, layer())
    other = tmp_path / "other"
    other.mkdir()
    wrong = blob_of(built(other, layer(["text"])))
    blob_of(bootstrap).write_bytes(wrong.read_bytes())
    failing(bootstrap, NydusError, "blob")


@pytest.mark.parametrize("at", [0, 2, 4])
def test_full_disk(tmp_path, failing, monkeypatch, at):
    bootstrap = tarfs(tmp_path, layer())
    pwrite, writes = os.pwrite, itertools.count()

    def fill_up(*arguments):
        if next(writes) >= at:
            raise OSError(28, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", fill_up)
    failing(bootstrap, NydusError, "No space left", verity=VerityOptions())


@pytest.mark.parametrize(
    ("field", "value", "error", "match"),
    [
        (68, 0, UnsupportedFeature, "places"),
        (68, 1, CorruptStructure, "over what is before"),
        (64, 1, CorruptStructure, "blocks of a blob"),
    ],
)
def test_impossible_places(tmp_path, failing, field, value, error, match):
    bootstrap = built(tmp_path, layer())
    data = bytearray(bootstrap.read_bytes())
    place = DEVICE_TABLE_OFFSET + field
    data[place : place + 4] = value.to_bytes(4, "little")
    bootstrap.write_bytes(data)
    failing(bootstrap, error, match)


def test_blob_that_is_longer_than_its_chunks(tmp_path, failing):
    bootstrap = built(tmp_path, layer())
    with open_bootstrap(bootstrap) as image:
        start = image.extended.blob_table_offset
        size = image.blobs[0].uncompressed_size
    data = bytearray(bootstrap.read_bytes())
    for place, length, value in (
        (start + 96, 8, size + 4096),
        (DEVICE_TABLE_OFFSET + 64, 4, size // 4096 + 1),
    ):
        data[place : place + length] = value.to_bytes(length, "little")
    bootstrap.write_bytes(data)
    failing(bootstrap, CorruptStructure, "do not fill")


@pytest.mark.parametrize("feature", [BlobFeatures.EXTERNAL, BlobFeatures.IS_CHUNKDICT_GENERATED])
def test_blobs_whose_space_is_elsewhere(tmp_path, failing, feature):
    bootstrap = built(tmp_path, layer())
    with open_bootstrap(bootstrap) as image:
        place = image.extended.blob_table_offset + 84
        features = image.blobs[0].features | feature
    data = bytearray(bootstrap.read_bytes())
    data[place : place + 4] = features.to_bytes(4, "little")
    bootstrap.write_bytes(data)
    failing(bootstrap, UnsupportedFeature, "disk of such blobs")


def test_exported_disk_is_no_bootstrap_to_export(tmp_path, failing):
    bootstrap = built(tmp_path, layer())
    export(bootstrap)[0].disk.rename(tmp_path / "boot.disk")
    failing(tmp_path / "boot.disk", CorruptStructure, "over what is before")


@needs_fixtures
def test_rafs_v5_has_no_disk(tmp_path, failing):
    cases = FIXTURES / "made-by-nydus-image/cases/tar-v5"
    (boot,) = cases.glob("boot*")
    data = boot.read_bytes()
    if boot.suffix == ".gz":
        data = gzip.decompress(data)
    (tmp_path / "boot").write_bytes(data)
    failing(tmp_path / "boot", UnsupportedFeature, "v5")


# The command line


def run(*words):
    return main(["--log-level", "warn", "export", "--block", *map(str, words)])


def test_command_prints_the_line_and_nothing_else(tmp_path, capsys):
    bootstrap = tarfs(tmp_path, layer())
    assert run("-B", bootstrap, "-D", tmp_path, "--verity", "-J", tmp_path / "out.json") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    verity = report["verity"]
    assert capsys.readouterr().out == (
        'dm-verity options: --no-superblock --format=1 -s "" --hash=sha256'
        " --data-block-size=512 --hash-block-size=4096"
        f" --data-blocks {verity['data_blocks']} --hash-offset {verity['hash_offset']}"
        f" {verity['root_hash']}\n"
    )
    assert report["disk"] == str(tmp_path / "boot.disk")
    assert report["blobs"] == [blob_of(bootstrap).name]
    assert verity["zero_padding"] is True


def test_command_without_verity_prints_nothing(tmp_path, capsys):
    bootstrap = tarfs(tmp_path, layer())
    out = tmp_path / "out.json"
    assert run("-B", bootstrap, "-D", tmp_path, "-O", tmp_path / "d", "-J", out) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(out.read_text())["verity"] is None
    assert (tmp_path / "d").exists()


@pytest.mark.parametrize("at", [1, 4])
def test_interrupted_command_leaves_nothing(tmp_path, capsys, monkeypatch, at):
    bootstrap = tarfs(tmp_path, layer())
    before = sorted(os.listdir(tmp_path))
    pwrite, writes = os.pwrite, itertools.count()

    def interrupt(*arguments):
        if next(writes) == at:
            raise KeyboardInterrupt
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", interrupt)
    assert run("-B", bootstrap, "-D", tmp_path, "--verity") == 130
    assert capsys.readouterr().out == ""
    assert sorted(os.listdir(tmp_path)) == before


def test_command_with_a_blob_entry(tmp_path):
    bootstrap = tarfs(tmp_path, layer())
    entry = {
        "type": "bootstrap",
        "id": "image",
        "config": {
            "backend_type": "localfs",
            "backend_config": {"dir": str(tmp_path)},
            "cache_type": "fscache",
            "cache_config": {"work_dir": str(tmp_path)},
            "metadata_path": str(bootstrap),
        },
    }
    config = tmp_path / "entry.json"
    config.write_text(json.dumps(entry))
    assert run("-C", config, "-O", tmp_path / "d") == 0
    assert files_of((tmp_path / "d").read_bytes()) == FILES


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["-D", "DIR"], 2, "-B/--bootstrap"),
        (["-B", "BOOT", "-C", "x"], 2, "cannot be used"),
        (["-B", "BOOT"], 2, "--localfs-dir"),
        (["-B", "BOOT", "-D", "DIR/none"], 1, "does not exist"),
        (["-B", "DIR/none", "-D", "DIR"], 1, "No such file"),
        (["-B", "DIR", "-D", "DIR"], 1, "Is a directory"),
        (["-B", "BOOT", "-D", "DIR", "-O", "DIR"], 1, "not a regular file"),
        (["-B", "BOOT", "-D", "DIR", "-O", "DIR/none/d"], 1, "No such file"),
        (["-B", "BOOT", "-D", "DIR", "--threads", "0"], 2, "1..=32"),
        (["-B", "BOOT", "-D", "DIR", "--threads", "33"], 2, "1..=32"),
        (["-B", "BOOT", "-D", "DIR", "--verity-padding", "ones"], 2, "ones"),
        (["-C", "BOOT", "-O", "DIR/d"], 1, "cannot be read"),
        (["-C", "DIR/none", "-O", "DIR/d"], 1, "No such file"),
        (["-C", "BOOT"], 2, "--output"),
    ],
)
def test_wrong_words(tmp_path, capsys, words, status, text):
    bootstrap = tarfs(tmp_path, layer(["small"]))
    words = [word.replace("BOOT", str(bootstrap)).replace("DIR", str(tmp_path)) for word in words]
    before = sorted(os.listdir(tmp_path))
    try:
        got = run(*words)
    except SystemExit as error:
        got = error.code
    output = capsys.readouterr()
    assert (got, output.out) == (status, "")
    assert text in output.err
    assert "Traceback" not in output.err
    assert sorted(os.listdir(tmp_path)) == before


def test_block_is_demanded(capsys):
    with pytest.raises(SystemExit) as error:
        main(["export", "-B", "boot", "-D", "."])
    assert error.value.code == 2
    assert "--block" in capsys.readouterr().err
