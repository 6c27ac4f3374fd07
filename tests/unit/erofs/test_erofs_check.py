import stat

import pytest
import tiny

from erofs import check_blob, check_image, layout, open_bootstrap, open_image
from erofs.check import ERROR, WARNING, Finding
from erofs.rafs import Compressor
from erofs.view import View


def _found(data):
    return list(check_image(open_bootstrap(bytes(data))))


def _image(**options):
    image = tiny.everything(**options)
    return bytearray(image.finish([image.root]))


@pytest.mark.parametrize("toc", [False, True])
@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD])
def test_our_images_have_no_findings(toc, compressor):
    image = tiny.everything(compressor=compressor, toc=toc)
    bootstrap = open_bootstrap(image.finish([image.root]))
    assert list(check_image(bootstrap)) == []
    blob = View(bytes(image.blob))
    assert list(check_blob(image.entry, blob, bootstrap, data=True)) == []
    without = list(check_blob(image.entry, blob, data=True))
    assert [finding.severity for finding in without] == ([] if toc else [WARNING])


def test_an_image_without_data():
    assert _found(tiny.TinyImage().finish()) == []


def test_an_image_that_is_read_as_plain_erofs():
    assert list(check_image(open_image(bytes(_image())))) == []


def _inode(data, path):
    return open_bootstrap(bytes(data)).lookup(path)


@pytest.mark.parametrize(
    ("path", "field", "value", "what"),
    [
        (b"/small", 44, b"\3", "link count: expected 2, got 3"),
        (b"/dir", 44, b"\3", "link count: expected 2, got 3"),
        (b"/dir", 45, b"\1", "link count: expected 2, got 258"),
        (b"/small", 43, b"\xff", "impossible nanoseconds"),
        (b"/small", 4, b"\x80\x21", "file type of the entry: expected 3, got 1"),
        (b"/marked", 2, b"\1", "xattr area without an entry"),
        (b"/small", 66, b"\2", "no device 2"),
        (b"/small", 68, b"\xff\xff\xff\xff", "hole"),
        (b"/small", 68, b"\3", "chunk index without an entry"),
        (b"/small", 64, b"\2", "chunk index without an entry"),
        (b"/small", 8, b"\x0f", "chunk of the wrong size"),
        (b"/small", 16, b"\x60", "unknown chunk format"),
        (b"/small", 0, b"\1", "not in chunks"),
        (b"/dir/nested", 64, b"\0", "symlink target"),
        (b"/link", 8, b"\0", "length of a symlink"),
        (b"/long link", 8, b"\0\x10", "symlink target"),
        (b"/long link", 16, b"\xff\xff", "flat data outside"),
        (b"/dir", 8, b"\0\0\1", "flat data outside"),
    ],
)
def test_inodes(path, field, value, what):
    data = _image()
    start = _inode(data, path).offset + field
    data[start : start + len(value)] = value
    found = _found(data)
    assert any(what in finding.what for finding in found), found
    assert all(finding.path for finding in found if finding.severity == ERROR)


def test_the_kernel_must_see_the_same_chunks():
    data = _image()
    image = open_bootstrap(bytes(data))
    inode = image.lookup(b"/two chunks")
    assert inode.chunk_size == 8192
    # With the chunk size of RAFS all is well, with a larger one the chunks have to be adjacent.
    data[inode.offset + 16] = 0x20
    assert _found(data) == []
    data[inode.offset + 16] = 0x21
    start, _ = inode.index_area()
    data[start : start + 16] = data[start + 8 : start + 16] + data[start : start + 8]
    assert any("chunk of the wrong size" in finding.what for finding in _found(data))
    larger = tiny.TinyImage()
    larger.root.entries[b"f"] = node = larger.file(bytes(8192) + b"x" * 4096)
    node.chunks[1] = node.chunks[0]
    data = bytearray(larger.finish())
    data[_inode(data, b"/f").offset + 16] = 0x22
    assert [finding.what for finding in _found(data)] == ["Linux takes the chunks for 16384 bytes"]


def _directory(data, path=b"/dir"):
    """Return the offset of the dirents of an inline directory, and the names behind them."""
    inode = _inode(data, path)
    start = inode.body_offset
    count = layout.Dirent.parse(View(data), start).nameoff // 12
    return start, start + 12 * count


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data, dirents, names: data.__setitem__(names, ord("-")), "directory without b'.'"),
        (lambda data, dirents, names: data.__setitem__(names + 3, 0x20), "behind"),
        (lambda data, dirents, names: data.__setitem__(dirents, 0x80), "entry b'.' is wrong"),
        (lambda data, dirents, names: data.__setitem__(dirents + 12, 0x90), "b'..' is wrong"),
        (lambda data, dirents, names: data.__setitem__(dirents + 10, 1), "entry b'.' is wrong"),
        (lambda data, dirents, names: data.__setitem__(dirents + 34, 5), "file type of the entry"),
        (lambda data, dirents, names: data.__setitem__(dirents + 8, 13), "start of the names"),
        (lambda data, dirents, names: data.__setitem__(names + 4, ord("/")), "file name"),
        (lambda data, dirents, names: data.__setitem__(dirents + 31, 1), "outside"),
    ],
)
def test_directories(change, what):
    data = _image()
    change(data, *_directory(data))
    found = _found(data)
    assert any(what in finding.what for finding in found), found


def test_names_that_occur_twice():
    image = tiny.TinyImage()
    for name in (b"aa", b"ab"):
        image.root.entries[name] = tiny.device(stat.S_IFIFO)
    data = bytearray(image.finish())
    data[data.index(b"...aaab") + 6] = ord("a")
    assert [finding.what for finding in _found(data)] == ["name b'aa' twice in the directory"]


def test_a_directory_with_two_parents():
    data = _image()
    dirents, _ = _directory(data, b"/")
    many = _inode(data, b"/many").nid
    for position in range(dirents, dirents + 12 * 14, 12):
        if layout.Dirent.parse(View(data), position).nid == _inode(data, b"/dir").nid:
            data[position : position + 2] = many.to_bytes(2, "little")
            break
    assert any("directory met twice" in finding.what for finding in _found(data))


_TABLES = [
    ("tag", 1408, b"z", "is not the blob id"),
    ("blocks", 1408 + 64, b"\4", "blocks of the device: expected 5, got 4"),
    ("mapped", 1408 + 68, b"\1", "mapped into the bootstrap"),
    ("sum", 1024 + 36, b"\4", "blocks of the superblock"),
    ("inos", 1024 + 16, b"\1", "number of inodes"),
    ("checksum feature", 1024 + 8, b"\1", "checksum feature"),
    ("xattr flag", 1152, b"\x19", "no flag that says so"),
    ("prefetch", 4096 + 256, b"\1", "prefetch table names nid"),
]


@pytest.mark.parametrize(("name", "offset", "value", "what"), _TABLES, ids=[t[0] for t in _TABLES])
def test_tables(name, offset, value, what):
    data = _image()
    data[offset : offset + len(value)] = value
    found = _found(data)
    assert any(what in finding.what for finding in found), found


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        (0, b"\xff", "not sorted"),
        (32, b"\1", "not in the table"),
        (44, b"\0\0", "impossible chunk size"),
        (40, b"\xff\xff\xff", "chunk data ends behind"),
        (36, b"\x10\0\0\0\1\0\0\0", "of two sizes"),
        (57, b"\xff", "ends behind its blob"),
        (72, b"\x09", "of a blob with 5 chunks"),
    ],
)
def test_chunk_table(field, value, what):
    data = _image()
    start = open_bootstrap(bytes(data)).extended.chunk_table_offset + field
    data[start : start + len(value)] = value
    found = _found(data)
    assert any(what in finding.what for finding in found), found


def test_chunk_table_with_gaps_and_twins():
    data = _image()
    image = open_bootstrap(bytes(data))
    table = image.extended.chunk_table_offset
    places = {info.chunk_index: table + 80 * n for n, info in enumerate(image.chunk_infos)}
    data[places[4] + 57] = 0x20
    assert any("does not follow" in finding.what for finding in _found(data))
    data[places[4] + 72] = 3
    assert any("two entries for chunk 3" in finding.what for finding in _found(data))


def test_root_nid_zero():
    data = bytearray(tiny.TinyImage().finish())
    data[1024 + 14 : 1024 + 16] = bytes(2)
    found = _found(data)
    assert "the root has nid 0, which Linux refuses" in [finding.what for finding in found]


def _sealed(**options):
    image = tiny.everything(compressor=Compressor.ZSTD, toc=True, **options)
    bootstrap = open_bootstrap(image.finish())
    return image, bootstrap


@pytest.mark.parametrize(
    ("place", "what"),
    [
        (lambda image: 20, ["image.blob does not have its digest", "blob id", "chunk 1: "]),
        (lambda image: image.entry.ci_offset + 1, ["broken zstd frame", "blob id"]),
        (
            lambda image: image.entry.ci_offset + image.entry.ci_compressed_size + 12,
            ["entries in the", "blob.meta.header does not have"],
        ),
        (
            lambda image: image.entry.ci_offset + image.entry.ci_compressed_size,
            ["not a compression table header"],
        ),
        (
            lambda image: image.blob.index(b"blob.digest") - 3,
            ["chunk 4 has two digests", "blob.digest does not have"],
        ),
        (lambda image: len(image.blob) - 600, ["ToC does not have its digest"]),
        (lambda image: len(image.blob) - 200, ["wrong checksum"]),
    ],
)
def test_blobs_with_a_wrong_byte(place, what):
    image, bootstrap = _sealed()
    data = bytearray(image.blob)
    data[place(image)] ^= 0x55
    texts = [str(f) for f in check_blob(image.entry, View(bytes(data)), bootstrap, data=True)]
    for text in what:
        assert any(text in line for line in texts), texts


def test_wrong_data_is_found_by_digest():
    image = tiny.everything()
    bootstrap = open_bootstrap(image.finish())
    image.blob[0] ^= 1
    found = list(check_blob(image.entry, View(bytes(image.blob)), bootstrap, data=True))
    assert [str(finding) for finding in found if finding.severity == ERROR] == [
        "error: chunk 0: wrong digest"
    ]
    assert "blob id" in found[0].what


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"compressed_size": 5}, "size of the blob"),
        ({"uncompressed_size": 0x9000}, "the chunks end at"),
        ({"uncompressed_size": 0x1000}, "ends behind the data"),
        ({"chunk_count": 6}, "expected 6, got 5"),
        ({"ci_offset": 1 << 40}, "outside of the blob"),
        ({"ci_compressor": 1}, "compressor in the"),
        ({"ci_uncompressed_size": 1 << 39}, "uncompressed size in the"),
        ({"blob_toc_size": 5}, "ToC size"),
        ({"features": 0x70000025}, "features in the"),
        ({"features": 0x40000040}, "plain tar"),
        ({"features": 0x40000010}, "original layer"),
        ({"features": 0x40000800}, "external"),
        ({"features": 0x40000104}, "encrypted"),
    ],
)
def test_entries_that_do_not_fit_the_blob(changes, what):
    image, bootstrap = _sealed()
    entry = image.entry._replace(**changes)
    texts = [str(f) for f in check_blob(entry, View(bytes(image.blob)), bootstrap, data=True)]
    assert any(what in line for line in texts), texts


@pytest.mark.parametrize("length", [0, 1, 511, 600])
def test_blobs_that_are_cut_off(length):
    image, bootstrap = _sealed()
    blob = View(bytes(image.blob[:length]))
    assert any(f.severity == ERROR for f in check_blob(image.entry, blob, bootstrap, data=True))


def test_finding_as_text():
    assert str(Finding(ERROR, "bad", b"/a\n", 16)) == "error: /a\\n, offset 0x10: bad"
    assert str(Finding(WARNING, "odd")) == "warning: odd"
