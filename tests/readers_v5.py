"""Calls every reader of RAFS v5 on bytes, for property tests and the fuzzer.

The invariant: whatever the bytes are, reading and translating succeeds or raises
`FormatError`, check never raises, and what was translated opens as v6.
"""

from contextlib import suppress

from erofs import FormatError, check_image, load_tree, open_bootstrap, translate
from erofs.v5.image import BootstrapV5
from erofs.v5.inode import InodeV5, digest_input
from erofs.v5.layout import parse_blob_table
from erofs.view import View


def _inode(inode):
    for read in (
        inode.xattrs,
        inode.readlink,
        inode.entry,
        lambda: list(inode.file_chunks()),
        lambda: list(inode.entries()),
        lambda: inode.lookup(b"name"),
        lambda: digest_input(inode),
    ):
        with suppress(FormatError):
            read()


def read_v5(data):
    """Read everything of a bootstrap; return the image, or None if it does not open."""
    parse_blob_table(memoryview(bytes(data[:300])))
    try:
        image = BootstrapV5(View(data))
    except FormatError:
        return None
    assert len(image.blob_hints) == len(image.blobs)
    assert image.tables.chunk_size == 0
    with suppress(FormatError):
        assert 0 not in image.prefetch_nids
    for index in range(min(image.name_count + 2, 200)):
        with suppress(FormatError):
            _inode(InodeV5(image, index))
    paths = []
    with suppress(FormatError):
        for path, _ in image.walk():
            paths.append(path)
            image.lookup(path)
    list(check_image(image))
    tree = translation = None
    with suppress(FormatError):
        tree = load_tree(image)
        translation = translate(image)
    if translation is not None:
        assert tree is not None
        bootstrap = open_bootstrap(translation.bootstrap)
        assert sorted(path for path, _ in bootstrap.walk()) == sorted(paths)
        for blob in translation.blobs:
            places = [(c.uncompressed_offset, c.uncompressed_size) for c in blob.chunks]
            ends = [0, *(-(-(start + size) // 4096) * 4096 for start, size in places)]
            assert all(end <= start for end, (start, _) in zip(ends, places, strict=False))
            assert ends[-1] <= blob.entry.uncompressed_size
    return image
