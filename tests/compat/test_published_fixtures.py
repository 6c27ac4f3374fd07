"""Files of the real nydus-image, read by us: values, digests, ids, and no findings."""

import gzip
import hashlib
import json

import pytest
from fixtures_path import FIXTURES, needs_fixtures
from undump import rebuild

from erofs import (
    check_blob,
    check_image,
    codec,
    dump_blob,
    dump_image,
    framing,
    layout,
    open_bootstrap,
)
from erofs.blobcheck import read_compression_table
from erofs.citable import parse_cached
from erofs.digest import digest
from erofs.errors import FormatError
from erofs.inlined import read_inlined_bootstrap
from erofs.rafs import Compressor, Digester
from erofs.view import View

pytestmark = needs_fixtures

_NYDUS = FIXTURES / "nydus"
_CASES = FIXTURES / "made-by-nydus-image" / "cases"
_RELEASE_CANDIDATE = "2fa78cad554b75ac91a4a125ed148d0ddeb25efa4aaa8bd80e5dc292690a4dca"
_MARCH_2023 = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
_BOOTSTRAPS = ["rafs-v6-2.2.boot", f"{_RELEASE_CANDIDATE}.image.boot"]


def _load(path):
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _expected(name):
    return json.loads((_NYDUS / "expected" / name).read_text())


def _named(record, names):
    """Return fields of a record under the names of the expected files."""
    values = {}
    for theirs, ours in names.items():
        value = getattr(record, ours)
        values[theirs] = value.hex() if isinstance(value, bytes) else int(value)
    return values


_BLOB_NAMES = {
    "blob_index": "blob_index", "chunk_size": "chunk_size", "chunk_count": "chunk_count",
    "comp": "compressor", "digest": "digester", "features": "features",
    "csize": "compressed_size", "usize": "uncompressed_size", "toc_size": "blob_toc_size",
    "ci_comp": "ci_compressor", "ci_off": "ci_offset", "ci_csize": "ci_compressed_size",
    "ci_usize": "ci_uncompressed_size", "toc_digest": "blob_toc_digest",
    "meta_digest": "blob_meta_digest", "meta_size": "blob_meta_size", "iv": "cipher_iv",
    "cipher": "cipher",
}  # fmt: skip
_CHUNK_NAMES = {
    "digest": "digest", "blob_index": "blob_index", "flags": "flags",
    "compressed_size": "compressed_size", "uncompressed_size": "uncompressed_size",
    "compressed_offset": "compressed_offset", "uncompressed_offset": "uncompressed_offset",
    "file_offset": "file_offset", "index": "chunk_index", "crc32": "crc32c",
}  # fmt: skip


def _superblock(image):
    names = [
        "magic",
        "checksum",
        "feature_compat",
        "blkszbits",
        "sb_extslots",
        "root_nid",
        "inos",
        "build_time",
        "build_time_nsec",
        "blocks",
        "meta_blkaddr",
        "xattr_blkaddr",
        "feature_incompat",
        "u1",
        "extra_devices",
        "devt_slotoff",
    ]
    values = _named(image.superblock, dict(zip(names, names, strict=True)))
    for name in ("magic", "feature_compat", "feature_incompat"):
        values[name] = hex(values[name])
    return values


def _extended(image):
    names = [
        "flags",
        "blob_table_offset",
        "blob_table_size",
        "chunk_size",
        "chunk_table_offset",
        "chunk_table_size",
        "prefetch_table_offset",
        "prefetch_table_size",
    ]
    values = _named(image.extended, dict(zip(names, names, strict=True)))
    return values | {"flags": hex(values["flags"])}


def _dirents(image, inode):
    """Return the entries of a directory with their place in the block."""
    found = []
    entries = iter(inode.entries())
    for start, block in inode.blocks():
        count = layout.Dirent.parse(View(block), 0).nameoff // layout.DIRENT_SIZE
        for number in range(count):
            entry = next(entries)
            nameoff = layout.Dirent.parse(image.view, start + 12 * number).nameoff
            found.append(
                {"name": entry.name.decode(), "nid": entry.nid, "nameoff": nameoff,
                 "file_type": entry.file_type}
            )  # fmt: skip
    return found


def _inode(image, path, inode):
    names = [
        "offset", "nid", "size", "uid", "gid", "mtime", "mtime_nsec", "nlink",
    ]  # fmt: skip
    values = _named(inode, dict(zip(names, names, strict=True)))
    values |= {
        "path": path.decode(),
        "i_format": 1 | inode.layout << 1,
        "mode": oct(inode.mode),
        "i_u": inode.union,
        "i_ino": inode.ino,
        "xattr_icount": inode.xattr_size // 4,
    }
    if inode.is_dir:
        values["dirents"] = _dirents(image, inode)
    else:
        values["chunk_index"] = [
            {"w0": index.advise, "w1": index.device_id, "blkaddr": index.blkaddr,
             "device_id": index.blob_index + 1, "ci_index": index.chunk_index}
            for index in inode.chunk_indexes()
        ]  # fmt: skip
    return values


@pytest.mark.parametrize("name", _BOOTSTRAPS)
def test_bootstraps_decode_to_the_expected_values(name):
    image = open_bootstrap(_NYDUS / "v6" / name)
    assert {
        "superblock": _superblock(image),
        "ext_superblock": _extended(image),
        "devices": [
            {"tag": slot.tag.decode(), "blocks": slot.blocks,
             "mapped_blkaddr": slot.mapped_blkaddr}
            for slot in image.devices
        ],
        "blobs": [{"id": blob.id} | _named(blob, _BLOB_NAMES) for blob in image.blobs],
        "chunk_table": [_named(info, _CHUNK_NAMES) for info in image.chunk_infos],
        "inodes": [_inode(image, path, inode) for path, inode in image.walk()],
    } == _expected(f"{name}.json")  # fmt: skip
    assert list(check_image(image)) == []


def _section(blob, section):
    values = {
        "name": section.name.decode(),
        "offset": section.offset,
        "size": section.size,
        "header_offset": section.header_offset,
    }
    if section.name == framing.SECTION_TOC:
        values["entries"] = [
            {"flags": entry.flags, "name": entry.name.decode(),
             "uncompressed_sha256": entry.digest.hex(), "compressed_offset": entry.offset,
             "compressed_size": entry.compressed_size,
             "uncompressed_size": entry.uncompressed_size}
            for entry in framing.read_toc(blob).entries
        ]  # fmt: skip
    return values


def _chunks(blob, image):
    """Decompress every chunk and name the file that it belongs to."""
    files = {
        info.chunk_index: path
        for path, inode in image.walk()
        if inode.is_regular
        for info in image.file_chunks(inode)
    }
    found = []
    for number, chunk in enumerate(read_compression_table(blob, image.blobs[0]).entries):
        stored = blob.read_at(chunk.compressed_offset, chunk.compressed_size)
        data = codec.decompress(Compressor.ZSTD, stored, chunk.uncompressed_size)
        found.append(
            {"index": number, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data),
             "file": files[number].decode()}
        )  # fmt: skip
    return found


def test_blobs_decode_to_the_expected_values():
    found = {}
    for name, boot in ((_MARCH_2023, _BOOTSTRAPS[0]), (_RELEASE_CANDIDATE, _BOOTSTRAPS[1])):
        data = (_NYDUS / "v6" / name).read_bytes()
        blob = View(data)
        found[name] = {
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "sections_in_file_order": [_section(blob, s) for s in framing.read_sections(blob)],
        }
        if name == _MARCH_2023:
            image = open_bootstrap(_NYDUS / "v6" / boot)
            found[name]["uncompressed_chunks"] = _chunks(blob, image)
    assert found == _expected("v6-blobs.json")


def test_blob_with_digests_and_toc_has_no_findings():
    # Among what is compared: the id (without the digest array), ToC, sections, chunk digests.
    image = open_bootstrap(_NYDUS / "v6" / _BOOTSTRAPS[0])
    blob = View((_NYDUS / "v6" / _MARCH_2023).read_bytes())
    assert list(check_blob(image.blobs[0], blob, image, data=True)) == []


def test_blob_of_the_release_candidate():
    # Its id is that of a rule of the time, by which the embedded bootstrap did not count.
    data = (_NYDUS / "v6" / _RELEASE_CANDIDATE).read_bytes()
    image = open_bootstrap(_NYDUS / "v6" / _BOOTSTRAPS[1])
    found = list(check_blob(image.blobs[0], View(data), image, data=True))
    assert [(f.severity, f.what[:8]) for f in found] == [("warning", "blob id ")]
    toc = framing.read_toc(View(data))
    for entry in toc.entries:
        section = data[entry.offset : entry.offset + entry.compressed_size]
        if entry.name == framing.SECTION_BLOB:
            section = data[: entry.compressed_size + framing.TAR_HEADER_SIZE]
        elif entry.flags == framing.TOC_ZSTD:
            section = codec.decompress(Compressor.ZSTD, section, entry.uncompressed_size)
            assert section == (_NYDUS / "v6" / _BOOTSTRAPS[1]).read_bytes()
        assert digest(Digester.SHA256, section) == entry.digest, entry.name


def test_constructed_example():
    image = open_bootstrap(_NYDUS / "constructed" / "exB.boot")
    blob = _load(_NYDUS / "constructed" / "exB.blob.gz")
    assert list(check_image(image)) == []
    assert list(check_blob(image.blobs[0], View(blob), image, data=True)) == []
    assert image.blobs[0].id == hashlib.sha256(blob).hexdigest()
    assert image.lookup(b"/link").readlink() == b"data"


def test_zran_table_of_a_cache():
    name = next((_NYDUS / "zran").glob("233c72f2*"))
    table = parse_cached(name.read_bytes())
    expected = _expected("zran-233c72f2.blob.meta.json")
    chunks, contexts = expected.pop("chunks"), expected.pop("contexts")
    names = list(table.header._fields)
    names[-3:] = ["zran_offset", "zran_size", "zran_count"]
    found = dict(zip(names, table.header, strict=True))
    assert {"magic": "0xb10bb10b"} | found | {"features": hex(found["features"])} == expected
    assert [
        {
            "uncompressed_offset": entry.uncompressed_offset,
            "uncompressed_size": entry.uncompressed_size,
            "flags": entry.flags,
            "compressed_offset": entry.compressed_offset,
            "compressed_size": entry.compressed_size,
            "zran_index": entry.context,
            "zran_offset": entry.data,
        }
        for entry in table.entries
    ] == chunks
    found = [context._asdict() for context in table.zran]
    assert all(not context.pop("reserved") for context in found)
    assert found == contexts
    assert len(table.dictionaries) == sum(context.dict_size for context in table.zran)


# Bootstraps that are not sound, or hold what we do not read: folder or file, and why.
_EXCEPTIONS = {
    "chunkdict-generate": "a generated dictionary names its only entry '/chunkdict'",
    "chunkdict-generate-12": "a generated dictionary names its only entry '/chunkdict'",
    "chunkdict-generate-versions/dict.boot": "its only entry is called '/chunkdict'",
    "optimize/opt.boot": "the real tool refuses its own result: table size of the new blob",
    "optimize-none/opt.boot": "the real tool refuses its own result: table size of the new blob",
    "optimize-toc/opt.boot": "the real tool refuses its own result: table size of the new blob",
    "parent-bootstrap/l12.boot.gz": "chunks of the upper layer name the blob of the lower one",
    "tarfs/boot.gz": "symlinks longer than 512 bytes overwrite what lies behind them",
    "tar-nodata-inline-notoc/blob.nydus": "a bootstrap with a tar header behind it",
}


def _is_bootstrap(path):
    try:
        return _load(path)[1024:1028] == bytes.fromhex("e2e1f5e0")
    except (OSError, EOFError):
        return False


def _made_by_the_tool():
    """Return (name, path) of all v6 bootstraps; v5 ones and empty outputs are not EROFS."""
    if not _CASES.is_dir():
        return []
    paths = sorted(path for path in _CASES.rglob("*") if path.is_file())
    return [
        (str(path.relative_to(_CASES)), path)
        for path in paths
        if path.suffix not in (".txt", ".json") and _is_bootstrap(path)
    ]


def _exception(name):
    return _EXCEPTIONS.get(name) or _EXCEPTIONS.get(name.split("/")[0])


_MADE = dict(_made_by_the_tool())


def test_there_are_cases():
    assert len(_MADE) > 90
    for name in _EXCEPTIONS:
        assert any(made == name or made.startswith(f"{name}/") for made in _MADE), name


@pytest.mark.parametrize("name", _MADE)
def test_bootstraps_of_the_tool(name):
    data = _load(_MADE[name])
    try:
        image = open_bootstrap(data)
        findings = list(check_image(image))
    except FormatError as error:
        findings = [error]
    if _exception(name) is not None:
        # An exception that is none any more should be taken off the list.
        assert findings
        return
    assert findings == []
    lines = list(dump_image(image))
    assert rebuild(lines, bytes(len(data)) if len(data) < 1 << 18 else data) == data
    assert not any("overlap" in line or " error " in line for line in lines)


def _blobs():
    """Return the data blobs by id; cache files share the id but not the format."""
    paths = [path for path in _CASES.rglob("*") if path.suffix in ("", ".gz") and path.is_file()]
    return {
        path.name.split(".")[0]: path
        for path in paths
        if len(path.name.removesuffix(".gz")) == 64 and path.stat().st_size
    }


_PLAIN = [
    "batch-4k-zstd/boot", "batch-64k-none/boot", "batch-64k-zstd/boot", "batch-l1-toc/boot.gz",
    "chunkdict/l2.boot", "dir-none-64k/boot.gz", "dir-repeatable/boot", "dir-zstd/boot.gz",
    "optimize-toc/boot", "tar-big-16m/boot", "tar-big-64k-lz4/boot", "tar-chunk4k/boot.gz",
    "tar-lz4/boot.gz", "tar-none-sha256/boot", "tar-zstd-sha256/boot", "tar-zstd/boot.gz",
]  # fmt: skip


@pytest.mark.parametrize("name", _PLAIN)
def test_blobs_of_the_tool(name):
    image = open_bootstrap(_load(_CASES / name))
    known = _blobs()
    checked = 0
    for entry in image.blobs:
        data = _load(known[entry.id])
        found = list(check_blob(entry, View(data), image, data=True))
        # Content that a later entry of the tar replaced stays in the blob without a digest.
        assert [f for f in found if "no known digest" not in f.what] == []
        assert rebuild(list(dump_blob(View(data), entry)), data) == data
        checked += 1
    assert checked


def test_blob_of_batches_with_everything_inside():
    data = _load(_CASES / "batch-1m-lz4-toc" / "blob.nydus")
    image = open_bootstrap(read_inlined_bootstrap(View(data)))
    (entry,) = image.blobs
    found = list(check_blob(entry, View(data), image, data=True))
    assert [f for f in found if "no known digest" not in f.what] == []
    assert rebuild(list(dump_blob(View(data), entry)), data) == data


@pytest.mark.parametrize(
    "case",
    ["zran", "zran-big", "zran-big-64k", "zran-multi-member", "zran-plain-tar"],
)
def test_zran_tables_of_the_tool(case):
    boot = next(p for p in (_CASES / case).iterdir() if p.name.startswith("boot"))
    image = open_bootstrap(_load(boot))
    (entry,) = image.blobs
    data = next(
        _load(path)
        for path in (_CASES / case).iterdir()
        if len(path.name.removesuffix(".gz")) == 64
    )
    table = read_compression_table(View(data), entry)
    assert list(table.header.differences(entry)) == []
    assert table.uncompressed_size == entry.uncompressed_size
    assert all(table.agrees(info) for info in image.chunk_infos)
    assert bool(table.zran) == (case != "zran-plain-tar")
    lines = list(dump_blob(View(data), entry))
    assert rebuild(lines, data) == data
    assert sum(" zran " in line for line in lines) == len(table.zran)


@pytest.mark.parametrize("case", ["encrypt-batch", "encrypt-zstd"])
def test_encrypted_blobs(case):
    image = open_bootstrap(_load(_CASES / case / "boot"))
    (entry,) = image.blobs
    key, iv = entry.encryption()
    assert (len(key), len(iv)) == (32, 16)
    data = _load(_blobs()[entry.id])
    table = read_compression_table(View(data), entry)
    assert all(table.agrees(info) for info in image.chunk_infos)
    assert list(check_blob(entry, View(data), image, data=True)) == []
    assert rebuild(list(dump_blob(View(data), entry)), data) == data
    wrong = entry._replace(blob_meta_digest=key[::-1])
    assert any(finding.severity == "error" for finding in check_blob(wrong, View(data), image))
