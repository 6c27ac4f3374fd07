import io

import pytest

from builder import BuildOptions, SourceType, build
from builder.listing import blob_lines, flag_names, inode_lines, quoted, readable, unsigned
from erofs import open_bootstrap
from erofs.rafs import BlobFeatures, SuperFlags
from tests.fakes.built import built, member, tar_of


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"plain", '"plain"'),
        (b"", '""'),
        (b'q"\\', '"q\\"\\\\"'),
        (b"it's", '"it\'s"'),
        (b"\t\n\r\0", '"\\t\\n\\r\\0"'),
        (b"\x1b[0m", '"\\u{1b}[0m"'),
        ("été".encode(), '"été"'),
        (b"\xff\xfe\x80bin", '"\\xFF\\xFE\\x80bin"'),
        (b"\xe2\x82", '"\\xE2\\x82"'),
        ("e\u0301".encode(), '"e\\u{301}"'),
        ("\u200b\u2028\u00a0".encode(), '"\\u{200b}\\u{2028}\\u{a0}"'),
        ("\U000e0001".encode(), '"\\u{e0001}"'),
        ("\U0001f600".encode(), '"\U0001f600"'),
    ],
)
def test_quoted_as_rust_does(name, text):
    assert quoted(name) == text


def test_readable_never_fails():
    assert readable(b"a\xffb") == "a\ufffdb"


def test_times_wrap_at_64_bits():
    assert unsigned(-77) == 2**64 - 77
    assert unsigned(5) == 5


def test_flag_names_in_the_order_of_their_bits():
    assert flag_names(SuperFlags.HAS_XATTR | SuperFlags.COMPRESSION_NONE) == (
        "COMPRESSION_NONE | HAS_XATTR"
    )
    assert flag_names(BlobFeatures(0x40000001 | 1 << 20)) == "ALIGNED | CAP_TAR_TOC"
    assert flag_names(BlobFeatures(0)) == "(empty)"


def test_inode_lines(tmp_path):
    path = built(
        tmp_path,
        tar_of(
            member("d", "dir", mtime=3),
            member("d/f", data=b"x" * 5000, mtime=4),
            member("d/l", "link", linkname="d/f", mtime=4),
            member("d/n", "symlink", linkname='a"b', xattrs={"user.k": "v"}),
            member("p", "fifo", mtime=-1),
        ),
    )
    with open_bootstrap(path) as image:
        lines = list(inode_lines(image))
    kinds = [line.split()[:3] for line in lines if line.startswith("inode: ")]
    assert [" ".join(words) for words in kinds] == [
        'inode: dir "/":',
        'inode: dir "/d":',
        'inode: hardlink "/d/f":',
        'inode: hardlink "/d/l":',
        'inode: symlink "/d/n":',
        'inode: "/p": index',
    ]
    assert "child_count 3 i_nlink 2" in lines[1]
    # The hard link has the same two chunks.
    assert sum(line.startswith("\t chunk: id ") for line in lines) == 4
    assert "file_offset 4096" in lines[4]
    assert all(", crc32 0x" in line for line in lines[3:5])
    assert 'has_xattr true link Some("a\\"b") i_mtime 0' in lines[-2]
    assert lines[-1].startswith('inode:  "/p": index 0 ')
    assert lines[-1].endswith(f"link None i_mtime {2**64 - 1} i_mtime_nsec 0")


def test_chunk_without_a_crc_has_none(tmp_path):
    path = tmp_path / "boot"
    build(
        io.BytesIO(tar_of(member("f", data=b"x"))),
        BuildOptions(source_type=SourceType.TARFS, bootstrap=path, blob_dir=tmp_path),
    )
    with open_bootstrap(path) as image:
        assert list(inode_lines(image))[-1].endswith("uncompressed 512/1")


def test_blob_lines(tmp_path):
    path = built(tmp_path, tar_of(member("f", data=b"x")), toc=True)
    with open_bootstrap(path) as image:
        (line,) = blob_lines(image, ["name"])
        size = image.blobs[0].compressed_size
    assert line == (
        f"\t 0: name, compressed size {size}, uncompressed size 4096, chunk size: 4096,"
        " chunk count: 1, features: aligned cap_toc chunk-digest tar-header toc"
    )
