"""Images over a tar that stays as it is (spec rafs-v6 6.1)."""

import gzip
import hashlib
import io
import os
import tarfile
import threading

import pytest

from builder import BuildError, BuildOptions, SourceType, build, merge, unpack
from builder.backends import blob_directory
from builder.datacheck import check_data
from builder.merge import InconsistentLayers, MergeOptions
from builder.prefetch import PrefetchPolicy
from builder.source.options import SourceOptions
from erofs import check_image, open_bootstrap
from erofs.errors import CorruptStructure
from erofs.rafs import BlobFeatures, Compressor, Digester, iter_chunk_infos
from tests.fakes.built import member, tar_of

CHUNK = 0x1000
ID = "a" * 64


def index(folder, tar, *, name="boot", **options):
    """Build tarfs metadata from tar bytes; the tar lies beside it under its id."""
    options.setdefault("chunk_size", CHUNK)
    source = tar if hasattr(tar, "read") else io.BytesIO(tar)
    result = build(
        source,
        BuildOptions(
            source_type=SourceType.TARFS, bootstrap=folder / name, blob_dir=folder, **options
        ),
    )
    if isinstance(tar, bytes) and result.blobs:
        (folder / result.blobs[0]).write_bytes(tar)
    return result


def sound(path):
    """Open an image that has to pass the check."""
    image = open_bootstrap(path)
    assert list(check_image(image)) == []
    return image


def some_tar():
    return tar_of(
        member("small", data=b"content"),
        member("dir", "dir"),
        member("dir/large", data=bytes(range(256)) * 50),
        member("again", data=b"content"),
        member("linked", "link", linkname="dir/large"),
        member("empty"),
        member("marked", data=b"x", xattrs={"user.name": "value"}),
    )


def test_files_are_pieces_of_the_tar(tmp_path):
    tar = some_tar()
    result = index(tmp_path, tar)
    assert result.blobs == [hashlib.sha256(tar).hexdigest()]
    assert (result.blob_size, result.blob_path) == (len(tar), None)
    assert result.compressor is Compressor.NONE
    with sound(tmp_path / "boot") as image, tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        assert (image.block_size, image.is_tarfs) == (512, True)
        for entry in archive:
            if not entry.isreg():
                continue
            inode = image.lookup(b"/" + entry.name.encode())
            pieces = list(inode.file_chunks())
            content = b"".join(
                tar[piece.uncompressed_offset :][: piece.uncompressed_size] for piece in pieces
            )
            assert content == archive.extractfile(entry).read()
            assert [piece.file_offset for piece in pieces] == list(range(0, inode.size, CHUNK))
        assert image.lookup(b"/linked").nid == image.lookup(b"/dir/large").nid


def test_piece_of_the_name_that_is_visited_last_is_in_the_chunk_table(tmp_path):
    """As in real tables, where a hard link is a name as any other."""
    tar = tar_of(member("a", data=b"a"), member("b", data=b"b"), member("z", "link", linkname="a"))
    index(tmp_path, tar)
    with sound(tmp_path / "boot") as image:
        piece = next(iter(image.lookup(b"/a").file_chunks()))
        table = image.tables
        entry = image.view.slice(table.chunk_offset, table.chunk_size, "table")
        assert [chunk.uncompressed_offset for chunk in iter_chunk_infos(entry)] == [
            piece.uncompressed_offset
        ]


def test_blob_table_says_what_the_tar_is(tmp_path):
    tar = some_tar()
    index(tmp_path, tar, compressor=Compressor.ZSTD, digester=Digester.BLAKE3)
    with sound(tmp_path / "boot") as image:
        (blob,) = image.blobs
        (slot,) = image.devices
    assert blob.features == BlobFeatures.TARFS | BlobFeatures.CAP_TAR_TOC
    assert (blob.compressor, blob.digester) == (Compressor.NONE, Digester.SHA256)
    assert blob.compressed_size == blob.uncompressed_size == len(tar)
    # Equal content is not joined: 1 + 4 + 1 + 1 pieces.
    assert blob.chunk_count == 7
    assert (slot.blocks, slot.mapped_blkaddr) == (len(tar) // 512, 0x80000 // 512)


@pytest.mark.parametrize("behind", [b"", bytes(512), b"anything behind the end" * 100])
def test_all_of_the_tar_counts_also_what_is_behind_its_end(tmp_path, behind):
    tar = some_tar() + behind
    assert index(tmp_path, tar).blob_size == len(tar)
    with sound(tmp_path / "boot") as image:
        assert image.blobs[0].uncompressed_size == len(tar)
        assert image.devices[0].blocks == len(tar) // 512


def test_writer_into_a_fifo_is_read_to_the_end(tmp_path):
    """The snapshotter copies the layer while it feeds it (spec vm-runtimes 3.4)."""
    tar = some_tar() + bytes(1 << 20)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    failures = []

    def write():
        try:
            fifo.write_bytes(tar)
        except OSError as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    result = build(
        fifo,
        BuildOptions(
            source_type=SourceType.TARFS, bootstrap=tmp_path / "boot", blob_dir=tmp_path, blob_id=ID
        ),
    )
    writer.join()
    assert not failures
    assert (result.blobs, result.blob_size) == ([ID], len(tar))
    assert sorted(os.listdir(tmp_path)) == ["boot", "fifo"]


@pytest.mark.parametrize("length", [1, 430, 448, 449, 511, 512, 513, 600, 1024, 3000, 4094, 4095])
def test_symlinks_longer_than_a_block(tmp_path, length):
    """The real tool writes them over what lies behind them."""
    target = ("t" * 200 + "/") * 21
    index(
        tmp_path,
        tar_of(
            member("a", "dir"),
            member("link", "symlink", linkname=target[:length]),
            member("z", "dir"),
            member("z/file", data=b"data"),
        ),
    )
    with sound(tmp_path / "boot") as image:
        assert image.lookup(b"/link").readlink() == target[:length].encode()
        assert image.lookup(b"/z/file").size == 4


def test_directory_of_many_blocks_and_long_names(tmp_path):
    names = [f"{number:03}" + "n" * (number % 253) for number in range(400)]
    index(tmp_path, tar_of(*(member(name, data=b"x") for name in names)))
    with sound(tmp_path / "boot") as image:
        found = {entry.name.decode() for entry in image.root.entries()}
        assert found == {*names, ".", ".."}
        assert image.root.size > 400 * 12 + sum(map(len, names))


def test_tar_without_data_has_no_blob(tmp_path):
    result = index(tmp_path, tar_of(member("dir", "dir"), member("empty")))
    assert result.blobs == []
    with sound(tmp_path / "boot") as image:
        assert (image.blobs, image.block_size) == ((), 512)


def test_owners_are_left_out_when_asked(tmp_path):
    index(
        tmp_path, tar_of(member("file", data=b"x", uid=5)), source=SourceOptions(keep_owners=False)
    )
    with sound(tmp_path / "boot") as image:
        assert image.lookup(b"/file").uid == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"blob": "b"}, "--blob"),
        ({"toc": True}, "blob-toc"),
        ({"inline_bootstrap": True}, "--blob-inline-meta"),
        ({"prefetch_policy": PrefetchPolicy.BLOB}, "prefetch-policy"),
        ({"chunk_size": 3000}, "chunk size"),
    ],
)
def test_what_does_not_go_together(tmp_path, options, word):
    with pytest.raises(BuildError, match=word):
        index(tmp_path, some_tar(), **options)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("tar", "word"),
    [
        (gzip.compress(some_tar()), "plain tar"),
        (b"", "empty"),
        (some_tar()[:700], "ends inside"),
        (tar_of(member("../up", data=b"x")), r"'\.\.'"),
        (tar_of(member("link", "link", linkname="nowhere")), "not there"),
    ],
)
def test_broken_sources_leave_nothing(tmp_path, tar, word):
    with pytest.raises(BuildError, match=word):
        index(tmp_path, tar)
    assert not os.listdir(tmp_path)


def test_tar_is_read_up_to_its_limit_only(tmp_path, monkeypatch):
    monkeypatch.setattr("builder.tarfs.MAX_COMPRESSED_SIZE", 5000)
    with pytest.raises(BuildError, match="too large"):
        index(tmp_path, some_tar())
    monkeypatch.setattr("builder.tarfs.MAX_CHUNKS_PER_BLOB", 3)
    with pytest.raises(BuildError, match="too many chunks"):
        index(tmp_path, some_tar())


# Merging


def two_layers(folder):
    lower = tar_of(member("a", data=b"lower a"), member("b", data=b"b" * 9000))
    upper = tar_of(member(".wh.a", data=b""), member("c", data=b"upper c"))
    index(folder, lower, name="lower")
    index(folder, upper, name="upper")
    return folder / "lower", folder / "upper"


def test_merged_layers_keep_the_names_of_their_tars(tmp_path):
    sources = two_layers(tmp_path)
    result = merge(sources, MergeOptions(bootstrap=tmp_path / "merged"))
    names = []
    for source in sources:
        with open_bootstrap(source) as image:
            names += [blob.id for blob in image.blobs]
    assert sorted(result.blobs) == sorted(names)
    with sound(tmp_path / "merged") as image:
        assert image.is_tarfs
        assert {entry.name for entry in image.root.entries()} == {b".", b"..", b"b", b"c"}
        assert list(check_data(image, result.blobs, blob_directory(tmp_path))) == []
    unpack(tmp_path / "merged", tmp_path / "out.tar", blob_directory(tmp_path))
    with tarfile.open(tmp_path / "out.tar") as archive:
        content = {entry.name: archive.extractfile(entry).read() for entry in archive}
    assert content == {"b": b"b" * 9000, "c": b"upper c"}


def test_ids_of_tars_go_before_listed_ones_but_not_before_digests(tmp_path):
    """As in real merges: the one is another name of a layer, the other what its blob is."""
    sources = two_layers(tmp_path)
    options = MergeOptions(bootstrap=tmp_path / "merged", original_blob_ids=["1" * 64, "2" * 64])
    plain = MergeOptions(bootstrap=tmp_path / "merged")
    assert merge(sources, options).blobs == merge(sources, plain).blobs
    digests = MergeOptions(bootstrap=tmp_path / "merged", blob_digests=[b"\1" * 32, b"\2" * 32])
    assert sorted(merge(sources, digests).blobs) == ["01" * 32, "02" * 32]


def test_tarfs_has_no_parent_and_no_other_neighbours(tmp_path):
    lower, upper = two_layers(tmp_path)
    with pytest.raises(BuildError, match="parent"):
        merge([upper], MergeOptions(bootstrap=tmp_path / "merged", parent_bootstrap=lower))
    native = tmp_path / "native"
    build(
        io.BytesIO(some_tar()),
        BuildOptions(
            source_type=SourceType.TAR, bootstrap=native, blob_dir=tmp_path, chunk_size=CHUNK
        ),
    )
    with pytest.raises(InconsistentLayers, match="tarfs"):
        merge([lower, native], MergeOptions(bootstrap=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


# Damage


def test_tar_of_another_length_or_content_is_told(tmp_path):
    tar = some_tar()
    result = index(tmp_path, tar)
    stored = tmp_path / result.blobs[0]
    for content, severity in ((tar[:-1], "error"), (tar[:-1] + b"x", "warning")):
        stored.write_bytes(content)
        with open_bootstrap(tmp_path / "boot") as image:
            ((_, finding),) = check_data(image, result.blobs, blob_directory(tmp_path))
        assert finding.severity == severity


def hostile(path, place, value):
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    return bytes(data)


def test_pieces_outside_of_the_tar_are_refused(tmp_path):
    index(tmp_path, some_tar())
    with open_bootstrap(tmp_path / "boot") as image:
        start, _ = image.lookup(b"/small").index_area()
    for place, value in ((start + 4, b"\0\0\0\1"), (start + 2, b"\2"), (start + 2, b"\0")):
        image = open_bootstrap(hostile(tmp_path / "boot", place, value))
        with pytest.raises(CorruptStructure):
            list(image.lookup(b"/small").file_chunks())
        assert any(finding.severity == "error" for finding in check_image(image))


def test_mark_of_image_and_blob_must_agree(tmp_path):
    index(tmp_path, some_tar())
    # The second byte of the flags has the mark.
    with pytest.raises(CorruptStructure):
        open_bootstrap(hostile(tmp_path / "boot", 1152 + 1, b"\0"))
