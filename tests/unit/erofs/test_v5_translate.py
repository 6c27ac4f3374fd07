"""From RAFS v5 to v6: the same tree over the same chunks, at places that the kernel can map."""

import stat

import pytest
import tinyv5
from test_v5_reader import EVERY

from erofs import (
    CorruptStructure,
    Node,
    UnsupportedFeature,
    check_image,
    codec,
    load_tree,
    open_bootstrap,
    open_rafs,
    translate,
)
from erofs.digest import digest
from erofs.rafs import BlobFeatures, Compressor, SuperFlags


def translated(image, **options):
    return translate(open_rafs(image.finish(**options)))


def content(image, translation):
    """Fill the data files chunk by chunk and return the content of all files by path."""
    disks = []
    for blob in translation.blobs:
        disk = bytearray(blob.entry.uncompressed_size)
        for chunk in blob.chunks:
            end = chunk.compressed_offset + chunk.compressed_size
            data = bytes(image.blob[chunk.compressed_offset : end])
            if chunk.is_compressed:
                data = codec.decompress(
                    Compressor(blob.entry.compressor), data, chunk.uncompressed_size
                )
            assert digest(image.digester, data) == chunk.digest
            start = chunk.uncompressed_offset
            assert not any(disk[start : start + len(data)])
            disk[start : start + len(data)] = data
        disks.append(disk)
    found = {}
    bootstrap = open_bootstrap(translation.bootstrap)
    for path, inode in bootstrap.walk():
        if inode.is_regular:
            pieces = []
            for number, index in enumerate(inode.chunk_indexes()):
                size = min(bootstrap.chunk_size, inode.size - number * bootstrap.chunk_size)
                start = index.blkaddr * 4096
                pieces.append(bytes(disks[index.blob_index][start : start + size]))
            found[path] = b"".join(pieces)
    return found


@pytest.mark.parametrize("options", EVERY)
def test_same_tree_and_content(options):
    image = tinyv5.everything(**options)
    data = image.finish()
    translation = translate(open_rafs(data))
    assert translate(open_rafs(data)) == translation
    found = content(image, translation)
    assert found[b"/small"] == found[b"/linked"] == b"small content\n"
    assert found[b"/two chunks"] == bytes(range(256)) * 16 + b"tail"
    assert found[b"/same chunk"] == bytes(range(256)) * 16
    v5, v6 = open_rafs(data), open_bootstrap(translation.bootstrap)
    assert [path for path, _ in v5.walk()] == [path for path, _ in v6.walk()]
    for path, old in v5.walk():
        new = v6.lookup(path)
        for field in ("mode", "uid", "gid", "mtime", "mtime_nsec", "nlink", "rdev"):
            assert getattr(old, field) == getattr(new, field), (path, field)
        assert old.xattrs() == new.xattrs()
        if old.is_symlink:
            assert old.readlink() == new.readlink()
    assert len({id(node) for node in load_tree(v6).entries.values()}) == 10


@pytest.mark.parametrize("options", EVERY)
def test_chunks_keep_what_is_stored(options):
    image = tinyv5.everything(**options)
    (blob,) = translated(image).blobs
    stored = {chunk.compressed_offset: chunk for chunk in image.chunks.values()}
    assert len(stored) == len(blob.chunks)
    for chunk in blob.chunks:
        old = stored[chunk.compressed_offset]
        assert (old.digest, old.compressed_size, old.uncompressed_size, old.flags) == (
            chunk.digest, chunk.compressed_size, chunk.uncompressed_size, chunk.flags,
        )  # fmt: skip
    places = [(c.chunk_index, c.uncompressed_offset) for c in blob.chunks]
    assert places == sorted(places)
    assert all(offset % 4096 == 0 for _, offset in places)


def test_what_the_new_tables_say():
    image = tinyv5.everything(compressor=Compressor.ZSTD)
    listed = [image.root.entries[b"dir"], image.root.entries[b"small"]]
    translation = translated(image, prefetch=listed)
    bootstrap = open_bootstrap(translation.bootstrap)
    assert bootstrap.blobs == tuple(blob.entry for blob in translation.blobs)
    assert sorted(bootstrap.chunk_infos) == sorted(translation.blobs[0].chunks)
    assert bootstrap.chunk_size == image.chunk_size
    assert bootstrap.compressor is Compressor.ZSTD
    assert SuperFlags.EXPLICIT_UID_GID in bootstrap.flags
    nids = [bootstrap.lookup(path).nid for path in (b"/dir", b"/small")]
    assert list(bootstrap.prefetch_nids) == nids
    (device,) = bootstrap.devices
    assert device.tag.rstrip(b"\0") == image.blob_id
    assert device.blocks * 4096 == translation.blobs[0].entry.uncompressed_size


def test_places_follow_from_the_blob():
    """Two images that know different chunks of one blob put them at the same places."""
    whole = tinyv5.TinyV5()
    for number in range(20):
        whole.root.entries[b"%02d" % number] = whole.file(bytes([number + 1]) * (number * 397 + 1))
    part = tinyv5.TinyV5()
    part.blob, part.chunks = whole.blob, whole.chunks
    part.uncompressed_size = whole.uncompressed_size
    for number in (3, 4, 11, 18):
        part.root.entries[b"%02d" % number] = whole.root.entries[b"%02d" % number]
    places = []
    for image in (whole, part):
        (blob,) = translated(image).blobs
        assert blob.is_stable
        places.append({chunk.digest: chunk._replace(file_offset=0) for chunk in blob.chunks})
        assert content(image, translated(image))[b"/18"] == bytes([19]) * (18 * 397 + 1)
        sizes = (blob.entry.chunk_count, blob.entry.uncompressed_size)
        assert sizes == (len(whole.chunks), blob.entry.uncompressed_size)
        assert blob.chunks[-1].uncompressed_offset + 8192 <= blob.entry.uncompressed_size
    assert len(places[0]) > len(places[1]) >= 4
    assert places[1].items() <= places[0].items()


def test_places_without_the_help_of_the_blob():
    """Nothing is known of the blob: chunks lie one behind the other, without gaps."""
    for options in ({"extended": False}, {"early": True}):
        image = tinyv5.everything(**options)
        translation = translated(image)
        (blob,) = translation.blobs
        assert not blob.is_stable
        assert [chunk.chunk_index for chunk in blob.chunks] == list(range(len(blob.chunks)))
        offsets = [chunk.compressed_offset for chunk in blob.chunks]
        assert offsets == sorted(offsets)
        assert blob.entry.uncompressed_size == 4096 * len(blob.chunks)
        assert list(check_image(open_bootstrap(translation.bootstrap))) == []


def test_indexes_that_do_not_number_the_chunks():
    image = tinyv5.everything()
    first, second = list(image.chunks.values())[:2]
    first.chunk_index, second.chunk_index = 1, 0
    (blob,) = translated(image).blobs
    assert not blob.is_stable
    second.chunk_index = 1
    (blob,) = translated(image).blobs
    assert not blob.is_stable


def test_only_strictness_about_gaps_is_in_the_way_of_a_check():
    findings = check_image(open_bootstrap(translated(tinyv5.everything()).bootstrap))
    assert all("does not follow chunk" in finding.what for finding in findings)


def test_no_data_no_blob():
    image = tinyv5.TinyV5()
    image.root.entries[b"link"] = Node(stat.S_IFLNK | 0o777, target=b"nowhere")
    data = bytearray(image.finish(prefetch=[image.root]))
    translation = translate(open_rafs(bytes(data)))
    assert translation.blobs == ()
    assert open_bootstrap(translation.bootstrap).lookup(b"/link").readlink() == b"nowhere"


def test_owners_that_are_not_told():
    data = bytearray(tinyv5.everything().finish())
    data[16] &= ~0x10
    bootstrap = open_bootstrap(translate(open_rafs(bytes(data))).bootstrap)
    assert SuperFlags.EXPLICIT_UID_GID not in bootstrap.flags


def test_prefetch_of_what_is_not_there_is_left_out():
    image = tinyv5.everything()
    data = bytearray(image.finish(prefetch=[image.root, image.root.entries[b"dir"]]))
    start = open_rafs(bytes(data)).tables.prefetch_offset
    data[start : start + 4] = b"\xff\xff\0\0"
    bootstrap = open_bootstrap(translate(open_rafs(bytes(data))).bootstrap)
    assert bootstrap.prefetch_nids == (bootstrap.lookup(b"/dir").nid,)


def test_blob_id_that_v6_cannot_hold():
    image = tinyv5.everything()
    image.blob_id = b"5" * 65
    with pytest.raises(UnsupportedFeature, match="blob id"):
        translated(image)


@pytest.mark.parametrize("feature", [BlobFeatures.ZRAN, BlobFeatures.ENCRYPTED])
def test_blobs_that_hold_no_plain_chunks(feature):
    data = bytearray(tinyv5.everything().finish())
    start = open_rafs(bytes(data)).superblock.extended_blob_table_offset
    data[start + 4 : start + 8] = feature.to_bytes(4, "little")
    with pytest.raises(UnsupportedFeature, match="blob features"):
        translate(open_rafs(bytes(data)))


def test_one_digest_for_two_sizes():
    image = tinyv5.everything()
    first, second = list(image.chunks.values())[:2]
    second.digest = first.digest
    with pytest.raises(CorruptStructure, match="one digest for chunks of two sizes"):
        translated(image)


def test_one_digest_at_two_places():
    """Builders that know little store a chunk twice: both files get the first one."""
    image = tinyv5.TinyV5()
    image.root.entries[b"b"] = image.file(b"twice")
    image.chunks.clear()
    image.root.entries[b"a"] = image.file(b"twice")
    (other,) = image.chunks.values()
    other.chunk_index = 1
    image.chunks[b"first"] = image.root.entries[b"b"].chunks[0]
    (blob,) = translated(image).blobs
    (chunk,) = blob.chunks
    assert chunk.compressed_offset == 0
    found = content(image, translated(image))
    assert found[b"/a"] == found[b"/b"] == b"twice"


def test_xattrs_that_erofs_cannot_hold():
    image = tinyv5.TinyV5()
    image.root.entries[b"f"] = image.file(b"", xattrs={b"strange.name": b""})
    with pytest.raises(CorruptStructure, match="xattr name") as raised:
        translated(image)
    assert raised.value.where["entry"] == b"/f"
