import stat
import struct

import pytest
import tiny

from erofs import (
    BadMagic,
    CorruptStructure,
    FormatError,
    Node,
    OutOfBounds,
    UnsupportedFeature,
    check_image,
    dump_image,
    layout,
    open_bootstrap,
    open_image,
)
from erofs.layout import InodeCompact, InodeExtended, Superblock, XattrEntry, XattrHeader


def _image(inode, body=b"", **superblock):
    """Return an EROFS image of two blocks whose root is `inode`, with `body` right behind it."""
    data = bytearray(2 * 4096)
    fields = {"feature_compat": 0, "feature_incompat": 0, "root_nid": 128, "devt_slotoff": 0}
    data[1024:1152] = Superblock(**(fields | superblock)).pack()
    packed = inode.pack() + body
    data[4096 : 4096 + len(packed)] = packed
    return bytes(data)


def _extended(mode, size, data_layout, union=0, icount=0):
    return InodeExtended(1 | data_layout << 1, icount, mode, 0, size, union, 7, 1, 2, 3, 4, 1)


def _dirents(*names, nid=128):
    offset = 12 * len(names)
    heads = b""
    for name in names:
        heads += layout.Dirent(nid, offset, layout.FT_DIRECTORY).pack()
        offset += len(name)
    return heads + b"".join(names)


_ROOT = _dirents(b".", b"..")


def _root(size=39):
    return _extended(stat.S_IFDIR | 0o755, size, layout.LAYOUT_FLAT_INLINE)


def test_compact_inode():
    inode = InodeCompact(2 << 1, 0, stat.S_IFDIR | 0o755, 2, len(_ROOT), 0, 0, 9, 5, 6, 0)
    image = open_image(_image(inode, _ROOT, build_time=77, build_time_nsec=8))
    root = image.root
    assert (root.uid, root.gid, root.nlink, root.ino) == (5, 6, 2, 9)
    assert (root.mtime, root.mtime_nsec) == (77, 8)
    assert [entry.name for entry in root.entries()] == [b".", b".."]


def test_extended_inode_and_signed_time():
    inode = _root()._replace(i_mtime=2**64 - 5)
    root = open_image(_image(inode, _ROOT)).root
    assert (root.mtime, root.uid, root.gid, root.rdev) == (-5, 1, 2, 0)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("magic", 1, BadMagic),
        ("blkszbits", 8, UnsupportedFeature),
        ("blkszbits", 17, UnsupportedFeature),
        ("feature_incompat", 1, UnsupportedFeature),
        ("dirblkbits", 1, UnsupportedFeature),
    ],
)
def test_superblocks_that_are_refused(field, value, kind):
    with pytest.raises(kind):
        open_image(_image(_root(), _ROOT, **{field: value}))


@pytest.mark.parametrize("length", [0, 1, 1024, 1151])
def test_files_that_are_too_short(length):
    with pytest.raises(BadMagic):
        open_image(_image(_root(), _ROOT)[:length])


@pytest.mark.parametrize(
    ("inode", "kind"),
    [
        (_root()._replace(i_format=0x15), UnsupportedFeature),
        (_root()._replace(i_format=1 | 1 << 1), UnsupportedFeature),
        (_root()._replace(i_format=1 | 4 << 1), CorruptStructure),
        (_root()._replace(i_mode=0o755), CorruptStructure),
        (_root()._replace(i_mode=stat.S_IFREG), CorruptStructure),
        (_root()._replace(i_size=1 << 63), CorruptStructure),
        (_root()._replace(i_xattr_icount=0xFFFF), OutOfBounds),
    ],
)
def test_roots_that_are_refused(inode, kind):
    with pytest.raises(kind) as caught:
        _ = open_image(_image(inode, _ROOT)).root
    assert caught.value.where["offset"] >= 4096


@pytest.mark.parametrize(
    "body",
    [
        _dirents(b".", b"a/b"),
        _dirents(b".", b""),
        _dirents(b".", b"a" * 256),
        struct.pack("<QHBB", 128, 0, 2, 0),
        struct.pack("<QHBB", 128, 13, 2, 0) + b"xx",
        struct.pack("<QHBB", 128, 4095, 2, 0),
        struct.pack("<QHBBQHBB", 128, 24, 2, 0, 128, 23, 2, 0) + b"ab",
        b"short",
    ],
)
def test_broken_directories(body):
    image = open_image(_image(_root(len(body)), body))
    with pytest.raises(FormatError):
        list(image.root.entries())


def test_last_name_ends_at_nul():
    body = _dirents(b".", b"..") + bytes(6)
    names = [entry.name for entry in open_image(_image(_root(len(body)), body)).root.entries()]
    assert names == [b".", b".."]


def test_inline_tail_that_crosses_a_block():
    with pytest.raises(CorruptStructure, match="crosses"):
        open_image(_image(_root(4095), _ROOT)).root.flat_parts()


def test_directory_that_contains_itself():
    body = _dirents(b".", b"..", b"x")
    with pytest.raises(CorruptStructure, match="twice"):
        list(open_image(_image(_root(len(body)), body)).walk())


def test_directories_that_share_their_data_do_not_make_a_long_walk():
    # Thirty directories show the same block of files: three blocks, but thirty to walk.
    count = 30
    inode = _extended(stat.S_IFDIR, 4096, layout.LAYOUT_FLAT_PLAIN, union=3)
    heads = [
        layout.Dirent(128 + 2 * number, 12 * count + 2 * number - 2, 2).pack()
        for number in range(1, count + 1)
    ]
    names = [b"%02d" % number for number in range(count)]
    listing = b"".join(heads + names)
    files = layout.Dirent(254, 12, 1).pack() + b"file"
    data = bytearray(_image(inode._replace(i_u=2, i_size=len(listing)), inode.pack() * count))
    data[4096 + 32 * 126 :] = inode._replace(i_mode=stat.S_IFREG | 0o644, i_size=0).pack()
    image = open_image(bytes(data) + listing.ljust(4096, b"\0") + files.ljust(4096, b"\0"))
    with pytest.raises(CorruptStructure, match="share"):
        list(image.walk())
    assert any("more bytes than the image" in finding.what for finding in check_image(image))
    assert any("inodes overlap" in line for line in dump_image(image))


@pytest.mark.parametrize("size", [0, 4097])
def test_symlinks_of_an_impossible_length(size):
    inode = _extended(stat.S_IFLNK, size, layout.LAYOUT_FLAT_INLINE)
    link = open_image(_image(inode)).inode(128)
    with pytest.raises(CorruptStructure):
        link.readlink()
    with pytest.raises(CorruptStructure, match="not a symbolic link"):
        open_image(_image(_root(), _ROOT)).root.readlink()


def _xattrs(*entries, header=None, tail=b""):
    data = (header or XattrHeader()).pack()
    for name, index, value in entries:
        body = XattrEntry(len(name), index, len(value)).pack() + name + value
        data += body + bytes(-len(body) % 4)
    data += tail
    icount = (len(data) - 12) // 4 + 1
    return open_image(_image(_root()._replace(i_xattr_icount=icount), data)).root


def test_xattrs():
    root = _xattrs((b"a", 1, b"1"), (b"", 2, b"acl"), (b"sel", 6, b""))
    assert root.xattrs() == {
        b"user.a": b"1",
        b"system.posix_acl_access": b"acl",
        b"security.sel": b"",
    }


@pytest.mark.parametrize(
    ("entries", "options", "kind"),
    [
        ([], {}, CorruptStructure),
        ([(b"a", 5, b"")], {}, CorruptStructure),
        ([(b"a", 0x81, b"")], {}, CorruptStructure),
        ([(b"a", 1, b"")], {"header": XattrHeader(shared_count=1)}, UnsupportedFeature),
        ([(b"a", 1, b"")], {"tail": XattrEntry(1, 1, 9).pack()}, OutOfBounds),
    ],
)
def test_broken_xattrs(entries, options, kind):
    root = _xattrs(*entries, **options)
    with pytest.raises(kind):
        root.xattrs()


def test_chunk_formats_that_are_refused():
    for union, kind in ((0, UnsupportedFeature), (0x60, UnsupportedFeature)):
        inode = _extended(stat.S_IFREG, 5, layout.LAYOUT_CHUNK_BASED, union)
        with pytest.raises(kind):
            list(open_image(_image(inode)).inode(128).chunk_indexes())
    inode = _extended(stat.S_IFREG, 1 << 40, layout.LAYOUT_CHUNK_BASED, 0x20)
    with pytest.raises(OutOfBounds):
        list(open_image(_image(inode)).inode(128).chunk_indexes())


def test_lookup_and_walk_of_a_tree():
    image = tiny.everything()
    bootstrap = open_bootstrap(image.finish())
    paths = [path for path, _ in bootstrap.walk()]
    assert len(paths) == bootstrap.superblock.inos
    for path, inode in bootstrap.walk():
        assert bootstrap.lookup(path).nid == inode.nid
    assert bootstrap.lookup(b"/dir/absent") is None
    assert bootstrap.lookup(b"/small/below") is None
    assert bootstrap.lookup(b"//dir/./nested").readlink() == b".."
    assert bootstrap.lookup(b"/many/029" + b"n" * 250).nlink == 31
    assert bootstrap.lookup(b"/null").rdev == 0x103


def test_mapped_file_is_released(tmp_path):
    path = tmp_path / "boot"
    path.write_bytes(tiny.everything().finish())
    with open_bootstrap(path) as image:
        assert image.root.is_dir
    image.close()
    path.write_bytes(b"")
    with pytest.raises(BadMagic) as caught:
        open_bootstrap(path)
    assert caught.value.where["path"] == path


def test_error_inside_of_a_mapped_file_is_what_arrives(tmp_path):
    """Its frames hold parts of the mapping, which cannot be closed then."""
    body = struct.pack("<QHBBQHBB", 128, 24, 2, 0, 128, 23, 2, 0) + b"ab"
    path = tmp_path / "image"
    path.write_bytes(_image(_root(len(body)), body))
    with pytest.raises(CorruptStructure, match="out of order"), open_image(path) as image:
        list(image.root.entries())


_MUTATIONS = [
    ("checksum", 1024 + 4, b"\1"),
    ("blocks of 1024", 1024 + 12, b"\x0a"),
    ("slots", 1024 + 13, b"\1"),
    ("no inodes", 1024 + 16, bytes(8)),
    ("metadata behind the file", 1024 + 40, b"\xff\xff"),
    ("shared xattrs", 1024 + 44, b"\1"),
    ("no marker", 1024 + 8, bytes(4)),
    ("no device table", 1024 + 80, b"\4"),
    ("u1", 1024 + 84, b"\1"),
    ("two devices", 1024 + 86, b"\2"),
    ("slot offset", 1024 + 88, b"\x0c"),
    ("two compressors", 1152, b"\x1b"),
    ("no digest", 1152, b"\x11"),
    ("unknown flag", 1152 + 1, b"\x80"),
    ("blob table unaligned", 1152 + 8, b"\1"),
    ("blob table outside", 1152 + 8, b"\0\0\1\0"),
    ("blob table of 255", 1152 + 16, b"\xff\0"),
    ("chunk size 3", 1152 + 20, b"\3\0\0\0"),
    ("chunk size 2 KiB", 1152 + 20, b"\0\x08\0\0"),
    ("chunk size 32 MiB", 1152 + 20, b"\0\0\0\2"),
    ("chunk table over blob table", 1152 + 24, b"\0\x10\0\0"),
    ("chunk table of 81", 1152 + 32, b"\x51\0"),
    ("prefetch table unaligned", 1152 + 40, b"\4\x11\0\0\0\0\0\0\4\0\0\0"),
    ("blob index", 4096 + 64, b"\1"),
    ("blob chunk size", 4096 + 68, b"\1"),
    ("too many chunks", 4096 + 72, b"\xff\xff\xff\xff"),
    ("blob compressor", 4096 + 76, b"\4"),
    ("blob digest", 4096 + 80, b"\2"),
    ("not aligned", 4096 + 84, b"\0"),
    ("unknown feature", 4096 + 85, b"\x10"),
    ("batch without v2", 4096 + 84, b"\x81"),
    ("uncompressed size", 4096 + 103, b"\1"),
    ("compressed size", 4096 + 95, b"\1"),
    ("table grows", 4096 + 120, b"\xff\xff"),
    ("table size", 4096 + 128, b"\xff\xff"),
    ("cipher", 4096 + 216, b"\2"),
    ("cipher without a key", 4096 + 216, b"\1"),
]


@pytest.mark.parametrize(("name", "offset", "value"), _MUTATIONS, ids=[m[0] for m in _MUTATIONS])
def test_bootstraps_that_strict_readers_refuse(name, offset, value):
    data = bytearray(tiny.everything().finish())
    open_bootstrap(bytes(data))
    data[offset : offset + len(value)] = value
    with pytest.raises(FormatError):
        open_bootstrap(bytes(data))


@pytest.mark.parametrize("length", [4095, 4097, 0x8000])
def test_bootstraps_that_are_cut_off(length):
    data = tiny.everything().finish()
    with pytest.raises(FormatError):
        open_bootstrap(data[:length])


def test_chunks_of_a_file():
    image = tiny.everything()
    bootstrap = open_bootstrap(image.finish())
    inode = bootstrap.lookup(b"/two chunks")
    first, second = bootstrap.file_chunks(inode)
    assert (first.uncompressed_size, second.uncompressed_size) == (4096, 4)
    assert inode.chunk_size == 8192
    with pytest.raises(UnsupportedFeature):
        list(bootstrap.file_chunks(bootstrap.root))


@pytest.mark.parametrize(("field", "change"), [(32, 9), (44, 1), (56, 0x10)])
def test_chunks_that_do_not_fit_the_table(field, change):
    data = bytearray(tiny.everything().finish())
    table = open_bootstrap(bytes(data)).extended.chunk_table_offset
    for entry in range(5):
        data[table + 80 * entry + field] ^= change
    image = open_bootstrap(bytes(data))
    with pytest.raises(CorruptStructure):
        list(image.file_chunks(image.lookup(b"/small")))


def test_prefetch_table():
    image = tiny.everything()
    directory = image.root.entries[b"dir"]
    bootstrap = open_bootstrap(image.finish([directory, image.root]))
    assert bootstrap.prefetch_nids == (bootstrap.lookup(b"/dir").nid, 128)
    assert open_bootstrap(tiny.everything().finish()).prefetch_nids == ()


def test_empty_tree_without_a_blob():
    bootstrap = open_bootstrap(tiny.TinyImage().finish())
    assert (bootstrap.blobs, bootstrap.devices, bootstrap.chunk_infos) == ((), (), ())
    assert [path for path, _ in bootstrap.walk()] == [b"/"]
    assert isinstance(Node.directory().entries, dict)
