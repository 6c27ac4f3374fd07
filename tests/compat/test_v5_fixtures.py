"""RAFS v5 made by the real tool, of three generations: decoded, checked, unpacked, translated.

What is expected are the inputs, recorded outputs of the real tool, and listings with MD5
sums that its own tests compare with.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections import Counter

import pytest
from fixtures_path import FIXTURES, needs_fixtures

from builder import build, unpack
from builder.backends import blob_directory
from builder.build import BuildOptions, SourceType
from builder.cli import main
from erofs import check_image, load_tree, open_bootstrap, open_rafs, translate
from erofs.digest import crc32c, digest
from erofs.rafs import ChunkFlags, Compressor, Digester, SuperFlags
from erofs.v5.inode import digest_input

pytestmark = needs_fixtures

MADE = FIXTURES / "made-by-nydus-image"
PUBLISHED = FIXTURES / "nydus" / "v5"
EARLY = PUBLISHED / "nydusd_daemon_test_bootstrap"
REPEATABLE = ["blake3-lz4_block-non_repeatable", "sha256-nocompress-repeatable"]
# Bootstrap, directory of its blobs.
WITH_DATA = {
    "tar-v5": (MADE / "cases/tar-v5/boot", MADE / "cases/tar-v5"),
    "tar-v5-none-sha256-aligned": (
        MADE / "cases/tar-v5-none-sha256-aligned/boot",
        MADE / "cases/tar-v5-none-sha256-aligned",
    ),
    **{name: (PUBLISHED / name, PUBLISHED / "blobs") for name in REPEATABLE},
}
# Of the same input: what the real tool unpacked a v6 image to.
UNPACKED = {
    "tar-v5": ("l2", MADE / "cases/unpack/out.tar.gz"),
    "tar-v5-none-sha256-aligned": ("l3", MADE / "cases/unpack-inline/out2.tar.gz"),
}


def members(data):
    """Return all that a tar says of each path."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as archive:
        for member in archive:
            xattrs = {k: v for k, v in member.pax_headers.items() if k.startswith("SCHILY.xattr.")}
            content = archive.extractfile(member).read() if member.isreg() else None
            target = member.linkname.lstrip("/") if member.islnk() else member.linkname
            found[member.name] = (
                member.type, member.mode, member.uid, member.gid, member.size, member.mtime,
                target, member.devmajor, member.devminor, xattrs, content,
            )  # fmt: skip
    return found


def unpacked(name):
    bootstrap, blobs = WITH_DATA[name]
    output = io.BytesIO()
    unpack(bootstrap, output, blob_directory(blobs))
    return output.getvalue()


@pytest.mark.parametrize("name", WITH_DATA)
def test_checked_with_data(name, capsys):
    bootstrap, blobs = WITH_DATA[name]
    assert main(["check", str(bootstrap), "-D", str(blobs), "--data"]) == 0
    assert "Error" not in capsys.readouterr().err
    with open_rafs(bootstrap) as image:
        assert list(check_image(image)) == []


@pytest.mark.parametrize("name", UNPACKED)
def test_unpacked_as_the_real_tool_unpacks_the_same_layer(name):
    _, theirs = UNPACKED[name]
    ours, expected = members(unpacked(name)), members(gzip.decompress(theirs.read_bytes()))
    # Each name of a v5 inode has the time of its own header, the first one counts; v6's last.
    for path in {"own2", "own2-link"} & ours.keys():
        assert (ours[path][5], expected[path][5]) == (1700000022, 1700000023)
        ours[path], expected[path] = (m[path][:5] + m[path][6:] for m in (ours, expected))
    assert ours == expected


def test_unpacked_to_the_bytes_of_v6_of_the_same_layer(tmp_path):
    name = "tar-v5-none-sha256-aligned"
    layer, _ = UNPACKED[name]
    tar = tmp_path / "layer.tar"
    tar.write_bytes(gzip.decompress((MADE / "inputs" / f"{layer}.tar.gz").read_bytes()))
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    boot = tmp_path / "boot"
    build(tar, BuildOptions(source_type=SourceType.TAR, bootstrap=boot, blob_dir=blobs))
    output = io.BytesIO()
    unpack(boot, output, blob_directory(blobs))
    assert output.getvalue() == unpacked(name)


@pytest.mark.parametrize("name", REPEATABLE)
def test_published_trees_and_contents(name):
    text = (PUBLISHED / f"{name}.result").read_text()
    listing, end = json.JSONDecoder().raw_decode(text)
    sums = dict(reversed(line.split("  ", 1)) for line in text[end:].splitlines() if line)
    found = members(unpacked(name))
    first = {path: path for path, member in found.items() if member[0] == tarfile.REGTYPE}
    first |= {path: m[6] for path, m in found.items() if m[0] == tarfile.LNKTYPE}
    assert {
        f"/{path}": hashlib.md5(found[target][-1]).hexdigest() for path, target in first.items()
    } == sums
    kinds = {tarfile.DIRTYPE: "directory", tarfile.SYMTYPE: "link"}
    assert {
        path: (kinds.get(member[0], "file"), member[6] if member[0] == tarfile.SYMTYPE else None)
        for path, member in found.items()
    } == dict(_listed(listing[0]))


def _listed(directory, prefix=""):
    for item in directory["contents"]:
        yield prefix + item["name"], (item["type"], item.get("target"))
        if item["type"] == "directory":
            yield from _listed(item, f"{prefix}{item['name']}/")


@pytest.mark.parametrize("name", WITH_DATA)
def test_chunk_checksums_where_there_are_any(name):
    bootstrap, blobs = WITH_DATA[name]
    with open_rafs(bootstrap) as image:
        blob = (blobs / image.blobs[0].id).read_bytes()
        chunks = [c for _, i in image.walk() if i.is_regular for c in i.file_chunks()]
        plain = [c for c in chunks if c.flags == ChunkFlags.HAS_CRC]
        assert len(plain) > 4 or name in REPEATABLE
        for chunk in plain:
            data = blob[chunk.compressed_offset : chunk.compressed_offset + chunk.compressed_size]
            assert crc32c(data) == chunk.crc32c
            assert digest(image.digester, data) == chunk.digest


def test_values_of_the_made_ones():
    with open_rafs(WITH_DATA["tar-v5"][0]) as image:
        assert (image.compressor, image.digester) == (Compressor.ZSTD, Digester.BLAKE3)
        assert SuperFlags.HAS_XATTR in image.flags
        blob = image.blobs[0]
        report = json.loads((MADE / "cases/tar-v5/out.json").read_text())
        assert [blob.id] == report["blobs"]
        assert (blob.chunk_count, blob.compressed_size, blob.uncompressed_size) == (
            11, 0x5B05, 81586,
        )  # fmt: skip
        own2 = image.lookup(b"/own2-link")
        assert (own2.nid, own2.nlink, own2.size) == (7, 2, 65636)
        assert image.lookup(b"/chg/dmeta").xattrs()
    with open_rafs(WITH_DATA["tar-v5-none-sha256-aligned"][0]) as image:
        assert (image.compressor, image.digester) == (Compressor.NONE, Digester.SHA256)
        files = [inode for _, inode in image.walk() if inode.is_regular]
        assert {c.uncompressed_offset % 4096 for i in files for c in i.file_chunks()} == {0}


def test_the_image_from_before_publication():
    """The current original refuses it; that all digests agree shows that the layout is right."""
    with open_rafs(EARLY) as image:
        assert image.is_early
        assert list(check_image(image)) == []
        kinds = Counter()
        for _, inode in image.walk():
            kinds[inode.mode >> 12] += 1
            assert digest(image.digester, digest_input(inode)) == inode.digest
        assert kinds == {0o4: 1427, 0o10: 12464, 0o12: 2941}
        assert image.lookup(b"/bin/bzcmp").readlink() == b"bzdiff"
        assert image.lookup(b"/bin/bunzip2").nlink == 3
        (blob,) = image.blobs
        assert blob.id.startswith("66b413a7")


@pytest.mark.parametrize("path", [EARLY, *(pair[0] for pair in WITH_DATA.values())], ids=str)
def test_translated_trees_are_the_same(path):
    with open_rafs(path) as image:
        translation = translate(image)
        assert translate(image) == translation
        stable = [blob.is_stable for blob in translation.blobs]
        assert stable == [not image.is_early]
        left, right = load_tree(image), load_tree(open_bootstrap(translation.bootstrap))
    stack = [(left, right)]
    while stack:
        old, new = stack.pop()
        for field in ("mode", "uid", "gid", "mtime", "mtime_nsec", "rdev", "target", "xattrs"):
            assert getattr(old, field) == getattr(new, field)
        assert [chunk.digest for chunk in old.chunks] == [chunk.digest for chunk in new.chunks]
        assert [(c.compressed_offset, c.compressed_size) for c in old.chunks] == [
            (c.compressed_offset, c.compressed_size) for c in new.chunks
        ]
        if old.is_dir:
            assert list(old.entries) == list(new.entries)
            stack += [(child, new.entries[name]) for name, child in old.entries.items()]
