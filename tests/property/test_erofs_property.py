import stat
import tracemalloc
from pathlib import Path

import pytest
from fakes.blob_image import BatchBlob
from fixtures_path import FIXTURES
from hypothesis import given
from hypothesis import strategies as st
from readers import entry_at, read_blob, read_bootstrap, read_image, read_table
from tiny import TinyImage

from builder.bootstrap import load_tree
from erofs import Node, check_blob, check_image, open_bootstrap, write_bootstrap
from erofs.blobmeta import CompressionInfoV2, parse_entries_v2
from erofs.citable import parse_cached
from erofs.contexts import MAX_CONTEXT_SIZE, BatchContext, ZranContext, parse_batches, parse_zran
from erofs.rafs import Compressor, Digester
from erofs.view import View

_GOLDEN = Path(__file__).resolve().parents[1] / "golden"
_PUBLISHED = FIXTURES / "nydus" / "v6"
_U32 = st.integers(0, 0xFFFFFFFF)
_LETTERS = st.sampled_from([bytes([n]) for n in b" !#+-.0Aaz~\x01\x7f\x80\xff"])


@st.composite
def _names(draw):
    """Names whose entries end around the end of a block, beside short and odd ones."""
    start = b"".join(draw(st.lists(_LETTERS, min_size=1, max_size=6)))
    length = draw(st.sampled_from([0, 0, 0, 240, 252, 253, 254, 255]))
    name = start + b"n" * (length - len(start))
    return name + b"_" if name in (b".", b"..") else name


_XATTR_NAMES = st.sampled_from(
    [b"user.a", b"user.b", b"trusted.overlay.opaque", b"security.capability",
     b"system.posix_acl_access", b"system.posix_acl_default", b"user." + b"n" * 250]
)  # fmt: skip
_XATTRS = st.dictionaries(
    _XATTR_NAMES, st.one_of(st.binary(max_size=9), st.just(bytes(4100))), max_size=4
)
_SIZES = st.sampled_from([0, 1, 4095, 4096, 4097, 8192, 3 * 4096, 5 * 4096 + 1])
_TARGETS = st.sampled_from([1, 2, 600, 3967, 3968, 3969, 4032, 4033, 4094, 4095])
_SPECIALS = st.sampled_from([stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])


class Growth:
    """Grows a tree from drawn values; files are made by the image, to have chunks."""

    def __init__(self, draw, image):
        self.draw = draw
        self.image = image
        self.files = []

    def attributes(self, node):
        node.mode |= self.draw(st.integers(0, 0o7777))
        node.uid, node.gid = self.draw(_U32), self.draw(_U32)
        node.mtime = self.draw(st.integers(-(1 << 63), (1 << 63) - 1))
        node.mtime_nsec = self.draw(st.integers(0, 999_999_999))
        node.xattrs = self.draw(_XATTRS)
        return node

    def file(self):
        size = self.draw(_SIZES)
        fill = bytes([self.draw(st.integers(0, 3)), len(self.files)])
        node = self.image.file((fill * (size // 2 + 1))[:size])
        if self.files and self.files[-1].size == size and self.draw(st.booleans()):
            node.chunks = list(self.files[-1].chunks)
        self.files.append(node)
        return node

    def leaf(self):
        kind = self.draw(st.sampled_from(["file", "file", "link", "special", "hard"]))
        if kind == "hard" and self.files:
            return self.draw(st.sampled_from(self.files))
        if kind == "link":
            node = Node(stat.S_IFLNK, target=b"t" * self.draw(_TARGETS))
        elif kind == "special":
            mode = self.draw(_SPECIALS)
            node = Node(mode, rdev=self.draw(_U32) if mode in (stat.S_IFCHR, stat.S_IFBLK) else 0)
        else:
            node = self.file()
        return self.attributes(node)

    def fill(self, directory, depth):
        for name in self.draw(st.lists(_names(), unique=True, max_size=5)):
            if depth and self.draw(st.booleans()):
                child = self.attributes(Node.directory(0))
                self.fill(child, depth - 1)
            else:
                child = self.leaf()
            directory.entries[name] = child
        if self.draw(st.integers(0, 4)) == 0:
            leaf = self.leaf() if not self.files else self.files[0]
            length = self.draw(st.integers(250, 255))
            count = self.draw(st.integers(10, 40))
            names = [(b"%05d" % number).ljust(length, b"m") for number in range(count)]
            if stat.S_ISREG(leaf.mode):
                directory.entries.update(dict.fromkeys(names, leaf))
            else:
                directory.entries[names[0]] = leaf


@st.composite
def _images(draw):
    image = TinyImage(
        compressor=draw(st.sampled_from([Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD])),
        digester=draw(st.sampled_from(Digester)),
        toc=draw(st.booleans()),
    )
    growth = Growth(draw, image)
    growth.attributes(image.root)
    growth.fill(image.root, 3)
    return image


def same_trees(left, right, twins):
    """Compare two trees with their attributes, chunks and hard links."""
    if id(left) in twins:
        assert twins[id(left)] is right
        return
    twins[id(left)] = right
    for field in ("mode", "uid", "gid", "mtime", "mtime_nsec", "rdev", "size", "target", "xattrs"):
        assert getattr(left, field) == getattr(right, field), field
    assert [chunk.info() for chunk in left.chunks] == [chunk.info() for chunk in right.chunks]
    assert left.is_dir == right.is_dir
    if left.is_dir:
        assert sorted(left.entries) == list(right.entries)
        for name, child in left.entries.items():
            same_trees(child, right.entries[name], twins)


@given(_images())
def test_what_is_written_is_what_is_read(image):
    data = image.finish()
    assert write_bootstrap(image.spec) == data
    bootstrap = open_bootstrap(data)
    same_trees(image.root, load_tree(bootstrap), {})
    assert list(check_image(bootstrap)) == []
    if image.entry is not None:
        errors = [
            finding
            for finding in check_blob(image.entry, View(bytes(image.blob)), data=True)
            if finding.severity == "error"
        ]
        assert errors == []
    read_bootstrap(data)


@given(st.binary(max_size=3000))
def test_arbitrary_bytes(data):
    read_image(data)
    read_image(bytes(1024) + data)
    read_bootstrap(data)
    read_blob(data)
    read_blob(data, entry_at(data))
    read_table(data)


def _originals(*patterns):
    return [path for folder, glob in patterns for path in sorted(folder.glob(glob))]


_BOOTSTRAPS = _originals((_GOLDEN, "*.boot"), (_PUBLISHED, "*.boot"))
_BLOBS = _originals((_GOLDEN, "*.blob"), (_PUBLISHED, "be7d*"), (_PUBLISHED, "*4dca"))


@st.composite
def mutations(draw, data):
    """Change a few bytes, mostly where there is something; sometimes cut the end off."""
    data = bytearray(data)
    places = [position for position, byte in enumerate(data) if byte]
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.sampled_from(places)) + draw(st.integers(-4, 4))
        value = draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF])))
        data[position % len(data)] = value
    if draw(st.integers(0, 9)) == 0:
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


def _bounded(read, *arguments):
    """Run a reader and check the memory it took."""
    tracemalloc.start()
    try:
        read(*arguments)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", _BOOTSTRAPS, ids=lambda path: path.name[:16])
@given(data=st.data())
def test_mutated_bootstraps(path, data):
    mutated = data.draw(mutations(path.read_bytes()))
    _bounded(read_bootstrap, mutated)
    read_image(mutated)


@pytest.mark.parametrize("path", _BLOBS, ids=lambda path: path.name[:16])
@given(data=st.data())
def test_mutated_blobs(path, data):
    mutated = data.draw(mutations(path.read_bytes()))
    _bounded(read_blob, mutated)
    _bounded(read_blob, mutated, entry_at(data.draw(st.binary(max_size=256))))


@given(
    st.lists(
        st.builds(
            CompressionInfoV2,
            st.integers(0, 0xFFFFFFFF).map(lambda page: page * 4096),
            st.integers(1, 1 << 24),
            st.integers(0, (1 << 40) - 1),
            st.integers(0, (1 << 24) - 1),
            st.integers(0, 0xFF),
            _U32,
            _U32,
        )
    )
)
def test_entries_of_version_2_are_what_was_packed(entries):
    packed = b"".join(entry.pack() for entry in entries)
    assert parse_entries_v2(memoryview(packed)) == entries


_SIZE = st.integers(1, 1 << 24)


_RESERVED = st.binary(min_size=32, max_size=32)


@given(st.lists(st.builds(BatchContext, _SIZE, _SIZE, _RESERVED).filter(lambda b: b[0] <= b[1])))
def test_batches_are_what_was_packed(batches):
    packed = b"".join(batch.pack() for batch in batches)
    assert list(parse_batches(memoryview(packed), len(batches))) == batches


@given(
    st.lists(
        st.builds(
            ZranContext,
            st.integers(0, 1 << 39),
            st.integers(0, 1 << 63),
            st.integers(0, 1000),
            st.integers(1, MAX_CONTEXT_SIZE),
            st.integers(1, MAX_CONTEXT_SIZE),
            st.integers(0, 100),
            st.integers(0, 255),
            st.integers(0, 7),
            st.integers(0, 0xFFFF),
        )
    )
)
def test_zran_contexts_are_what_was_packed(contexts):
    packed = b"".join(context.pack() for context in contexts)
    found, dictionaries = parse_zran(memoryview(packed + bytes(1100)), len(contexts))
    assert list(found) == contexts
    assert len(dictionaries) == 1100


_BATCHED = BatchBlob([[100, 431, 762], 5000, [3], 4096, [10, 20]], toc=True)
_TABLES = [_BATCHED.cached, BatchBlob([[1, 2]], compressor=Compressor.NONE).cached]


@given(data=st.data())
def test_mutated_blobs_of_batches(data):
    mutated = data.draw(mutations(_BATCHED.stored))
    _bounded(read_blob, mutated)
    _bounded(read_blob, mutated, _BATCHED.entry)


@pytest.mark.parametrize("content", _TABLES)
@given(data=st.data())
def test_mutated_tables(content, data):
    assert parse_cached(content)
    _bounded(read_table, data.draw(mutations(content)))
    _bounded(read_table, data.draw(mutations(_table_input(content))))


def _table_input(content):
    """Return a cached table as `read_table` takes it: the header first."""
    return content[-4096:-4036] + content[:-4096]
