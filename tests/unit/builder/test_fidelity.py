"""What an image keeps of its input, point by point; tests/integration compares whole trees."""

import io
import os
import socket
import stat
import struct

import pytest

from builder import BuildOptions, SourceType, build
from builder.merge import MergeOptions, merge
from builder.source.options import SourceOptions, WhiteoutSpec
from erofs import NydusError, open_bootstrap
from erofs.layout import encode_device_number
from erofs.rafs import Compressor
from tests.unit.builder.test_taracl import BSD_ACCESS, BSD_DEFAULT
from tests.unit.builder.test_tarsparse import SIZE as SPARSE_SIZE
from tests.unit.builder.test_tarsparse import expected as sparse_content
from tests.unit.builder.test_tarsparse import form_0_0, form_0_1, form_1_0, old_form
from tests.unit.builder.test_tarstream import END, gnu_long, header, padded, pax, stream_of

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
ZERO_DEVICE = {"major": b"0000000\0", "minor": b"0000000\0"}


def file(name=b"file", data=b"", **fields):
    return header(name, size=len(data), **fields) + padded(data)


class Built:
    """The image of a tar or a directory, whose chunks are stored as they are."""

    def __init__(self, folder, content, **options):
        kind = SourceType.DIRECTORY
        if isinstance(content, bytes):
            kind, content = SourceType.TAR, io.BytesIO(content + END)
        result = build(
            content,
            BuildOptions(
                source_type=kind, bootstrap=folder / "boot", blob_dir=folder, workers=1,
                compressor=Compressor.NONE, chunk_size=0x1000, **options,
            ),
        )  # fmt: skip
        self.blob = b"" if result.blob_path is None else result.blob_path.read_bytes()
        self.image = open_bootstrap((folder / "boot").read_bytes())
        self.names = {path for path, _ in self.image.walk()} - {b"/"}

    def __getitem__(self, name):
        inode = self.image.lookup(b"/" + name)
        assert inode is not None, name
        return inode

    def content(self, name):
        chunks = self.image.file_chunks(self[name])
        return b"".join(
            self.blob[chunk.compressed_offset : chunk.compressed_offset + chunk.compressed_size]
            for chunk in chunks
        )


@pytest.fixture
def image(tmp_path):
    return lambda *parts, **options: Built(tmp_path, b"".join(parts), **options)


def test_pax_records(image):
    records = pax(
        (b"path", b"long/" + b"n" * 200), (b"uid", b"4000000000"), (b"gid", b"3000000000"),
        (b"size", b"3"), (b"mtime", b"1700000000.123456789"),
    )  # fmt: skip
    link = pax((b"linkpath", b"t" * 300)) + header(b"link", b"2", mode=b"0000777\0")
    made = image(records, header() + padded(b"abc"), link, source=SourceOptions(pax_mtime=True))
    found = made[b"long/" + b"n" * 200]
    assert (found.uid, found.gid, found.size) == (4_000_000_000, 3_000_000_000, 3)
    assert (found.mtime, found.mtime_nsec) == (1_700_000_000, 123_456_789)
    assert made[b"link"].readlink() == b"t" * 300


def test_global_pax_headers(image):
    made = image(pax((b"uid", b"77"), kind=b"g"), file(b"a"), pax((b"uid", b"5")), file(b"b"))
    assert (made[b"a"].uid, made[b"b"].uid) == (77, 5)


def test_gnu_long_names(image):
    name, target = b"d/" * 80 + b"n" * 200, b"t" * 500
    made = image(gnu_long(b"L", name), file(data=b"x"), gnu_long(b"K", target), header(b"l", b"2"))
    assert made.content(name) == b"x"
    assert made[b"l"].readlink() == target


@pytest.mark.parametrize("form", [old_form, form_0_0, form_0_1, form_1_0])
def test_sparse_forms(image, form):
    made = image(form(), file(b"behind", b"y"))
    assert made[b"sparse"].size == SPARSE_SIZE
    assert made.content(b"sparse") == sparse_content()
    assert made.content(b"behind") == b"y"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_hard_links_in_any_order(image, order):
    parts = [
        file(b"target", b"content"),
        header(b"one", b"1", link=b"target"),
        header(b"dir/two", b"1", link=b"./one"),
    ]
    made = image(*(parts[number] for number in order))
    names = (b"target", b"one", b"dir/two")
    assert {made[name].nid for name in names} == {made[b"target"].nid}
    assert made[b"target"].nlink == 3
    assert made.content(b"dir/two") == b"content"


def test_sockets(tmp_path):
    top = tmp_path / "top"
    top.mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(top / "socket"))
    assert stat.S_ISSOCK(Built(tmp_path, top)[b"socket"].mode)


@pytest.mark.parametrize("device", [{}, ZERO_DEVICE])
def test_fifos(image, device):
    assert stat.S_ISFIFO(image(header(b"fifo", b"6", **device))[b"fifo"].mode)


@pytest.mark.parametrize(("kind", "test"), [(b"3", stat.S_ISCHR), (b"4", stat.S_ISBLK)])
def test_devices(image, kind, test):
    made = image(header(b"device", kind, major=b"0007777\0", minor=b"3777777\0"))
    assert test(made[b"device"].mode)
    assert made[b"device"].rdev == encode_device_number(0o7777, 0o3777777)


def test_acls(image):
    records = pax((b"SCHILY.acl.access", BSD_ACCESS), (b"SCHILY.acl.default", BSD_DEFAULT))
    xattrs = image(records, header(b"dir/", b"5", mode=b"0000750\0"))[b"dir"].xattrs()
    assert set(xattrs) == {b"system.posix_acl_access", b"system.posix_acl_default"}


def test_capabilities(image):
    records = pax((b"SCHILY.xattr.security.capability", CAPABILITY))
    assert image(records, file())[b"file"].xattrs() == {b"security.capability": CAPABILITY}


def test_xattrs_in_both_pax_spellings(image):
    made = image(
        pax((b"SCHILY.xattr.user.a", b"\0\xff=\n")), file(b"one"),
        pax((b"LIBARCHIVE.xattr.user.%61", b"AP89Cg")), file(b"two"),
    )  # fmt: skip
    assert made[b"one"].xattrs() == made[b"two"].xattrs() == {b"user.a": b"\0\xff=\n"}


def test_names_that_are_not_utf8(image):
    made = image(file(b"\xff\xfe/\x80\n", b"x"), pax((b"path", b"pax\xe9")), file())
    assert made.content(b"\xff\xfe/\x80\n") == b"x"
    assert b"/pax\xe9" in made.names


def test_names_of_255_bytes(image):
    name = b"n" * 255
    made = image(gnu_long(b"L", name + b"/" + name), file(data=b"x"))
    assert made.content(name + b"/" + name) == b"x"


def test_files_of_no_bytes(image):
    made = image(file(b"empty"), file(b"other"))
    assert (made[b"empty"].size, made.content(b"empty"), made.blob) == (0, b"", b"")


@pytest.mark.parametrize("size", [(4 << 30) + 1, (8 << 30) + 1])
def test_files_of_more_than_4_gib(size):
    """Their sizes in all spellings; `test_more_than_4_gib` reads such a file."""
    spellings = [
        header(size=(size | 1 << 95).to_bytes(12, "big")),
        pax((b"size", b"%d" % size)) + header(),
        pax(
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", b"sparse"),
            (b"GNU.sparse.realsize", b"%d" % size),
        )
        + header(size=513)
        + padded(b"1\n%d\n1\n" % (size - 1))
        + padded(b"z"),
    ]
    for data in spellings:
        assert next(iter(stream_of(data))).size == size


def test_dot_and_absolute_members(image):
    made = image(
        file(b"./a", b"1"), file(b"/b", b"2"), file(b".//c/./d", b"3"), header(b"./", b"5")
    )
    assert made.names == {b"/a", b"/b", b"/c", b"/c/d"}


def test_last_of_duplicates_wins(image):
    made = image(file(b"a", b"old", mode=b"0000600\0"), file(b"a", b"new"))
    assert made.content(b"a") == b"new"
    assert made[b"a"].mode & 0o777 == 0o644


def merged(folder, *layers):
    paths = []
    for number, layer in enumerate(layers):
        place = folder / str(number)
        place.mkdir()
        Built(place, layer, source=SourceOptions(whiteout_spec=WhiteoutSpec.NONE))
        paths.append((place / "boot").rename(folder / f"layer{number}.boot"))
    merge(paths, MergeOptions(bootstrap=folder / "merged"))
    with open_bootstrap(folder / "merged") as image:
        return {path: stat.S_IFMT(inode.mode) for path, inode in image.walk() if path != b"/"}


def test_whiteouts(tmp_path):
    lower = file(b"gone", b"1") + file(b"dir/gone", b"2") + file(b"tree/a/b", b"3") + file(b"stays")
    upper = file(b".wh.gone") + file(b"dir/.wh.gone") + file(b".wh.tree") + file(b".wh.never")
    assert set(merged(tmp_path, lower, upper)) == {b"/dir", b"/stays"}


def test_opaque_directories(tmp_path):
    lower = file(b"dir/below", b"1") + file(b"dir/sub/deep", b"2")
    upper = header(b"dir/", b"5") + file(b"dir/.wh..wh..opq") + file(b"dir/new", b"3")
    assert set(merged(tmp_path, lower, upper)) == {b"/dir", b"/dir/new"}


def test_replaced_types(tmp_path):
    lower = file(b"file") + file(b"dir/below", b"1") + header(b"link", b"2", link=b"file")
    upper = file(b"file/now/a/dir", b"2") + header(b"dir", b"2", link=b"x") + file(b"link", b"3")
    found = merged(tmp_path, lower, upper)
    assert found[b"/file"] == found[b"/file/now/a"] == stat.S_IFDIR
    assert found[b"/dir"] == stat.S_IFLNK
    assert found[b"/link"] == stat.S_IFREG
    assert b"/dir/below" not in found


HOSTILE = {
    "up": (file(b"../etc/passwd", b"x"), "'..' component"),
    "up inside": (file(b"a/b/../../../x", b"x"), "'..' component"),
    "name too long": (pax((b"path", b"n" * 256)) + file(), "impossible component"),
    "zero byte": (pax((b"path", b"a\0b")) + file(), "component|zero"),
    "loop": (
        header(b"a", b"2", link=b"b") + header(b"b", b"2", link=b"a") + file(b"a/f"),
        "loop of symlinks",
    ),
    "loop of links": (header(b"a", b"1", link=b"b") + header(b"b", b"1", link=b"a"), "not there"),
    "link to nowhere": (header(b"a", b"1", link=b"nowhere"), "not there"),
    "below nowhere": (header(b"a", b"2", link=b"nowhere") + file(b"a/f"), "symlink to nowhere"),
    "target too long": (gnu_long(b"K", b"t" * 4096) + header(b"a", b"2"), "length of a symlink"),
    "strange xattr": (pax((b"SCHILY.xattr.other.x", b"1")) + file(b"a"), "xattr"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members_get_an_error_with_their_name(tmp_path, case):
    data, text = HOSTILE[case]
    with pytest.raises(NydusError, match=text) as caught:
        Built(tmp_path, data)
    assert caught.value.where["entry"]
    assert not os.listdir(tmp_path)
