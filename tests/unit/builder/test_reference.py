"""Images over original layers: what is written, read back, and refused."""

import hashlib
import io
import os
import tarfile
import threading

import pytest
from fakes.layer_image import LayerBlob, content, gzipped, layer_tar
from fakes.memory_reader import MemoryReader

from builder import BuildError, PrefetchPolicy, export_block, unpack
from builder.backends import blob_directory
from builder.bootstrap import inlined_bootstrap
from builder.build import BuildOptions, SourceType, build
from builder.datacheck import check_data
from builder.merge import MergeOptions, merge
from builder.unpack import UnpackResult
from erofs import IntegrityError, NydusError, check_image, contexts, open_bootstrap
from erofs.cipher import BlobCipher
from erofs.citable import parse_cached
from erofs.rafs import BlobFeatures, Compressor, Digester
from tests.fakes.disk_files import files_of
from tests.unit.builder.test_tarsparse import form_1_0

FILES = [content(size, size) for size in (100, 70_000, 1_200_000, 0, 5000)]
LAYER = gzipped(layer_tar(*FILES))
LAYER_ID = hashlib.sha256(LAYER).hexdigest()


def made(folder, layer=LAYER, **changes):
    """Build an image of bytes; return the result."""
    return built(folder, io.BytesIO(layer), **changes)


def built(folder, source, **changes):
    """Build an image; return the result."""
    options = {"source_type": SourceType.TARGZ_REF, "blob_dir": folder, "chunk_size": 0x10000}
    if not changes.get("inline_bootstrap"):
        options["bootstrap"] = folder / "boot"
    return build(source, BuildOptions(**options | changes))


def unpacked(folder, bootstrap):
    """Return the contents that the image has, by name."""
    output = io.BytesIO()
    result = unpack(bootstrap, output, blob_directory(folder), inlined=bootstrap.name != "boot")
    assert isinstance(result, UnpackResult)
    output.seek(0)
    with tarfile.open(fileobj=output) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive if m.isreg()}


def expected():
    return {str(number): data for number, data in enumerate(FILES)}


def findings(folder, bootstrap):
    with open_bootstrap(bootstrap) as image:
        assert list(check_image(image)) == []
        ids = [blob.id for blob in image.blobs]
        return list(check_data(image, ids, blob_directory(folder), bootstrap))


@pytest.mark.parametrize("toc", [False, True])
def test_layer_and_tables(tmp_path, toc):
    result = made(tmp_path, toc=toc)
    assert result.blobs == [LAYER_ID]
    assert result.blob_size == len(LAYER)
    assert result.compressor is Compressor.GZIP
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["boot", result.blob_path.name]
    )
    with open_bootstrap(tmp_path / "boot") as image:
        (entry,) = image.blobs
        assert image.digester is Digester.SHA256
        assert entry.blob_meta_digest.hex() == result.blob_path.name
        assert entry.blob_meta_size == result.blob_path.stat().st_size
        assert entry.features & BlobFeatures.ZRAN
    (tmp_path / LAYER_ID).write_bytes(LAYER)
    assert unpacked(tmp_path, tmp_path / "boot") == expected()
    assert findings(tmp_path, tmp_path / "boot") == []


@pytest.mark.parametrize("toc", [False, True])
@pytest.mark.parametrize("where", ["the layer's own file", "the directory"])
def test_bootstrap_beside_the_tables(tmp_path, toc, where):
    result = made(tmp_path, inline_bootstrap=True, blob=tmp_path / "one.zran", toc=toc)
    assert result.blobs == [LAYER_ID]
    assert result.blob_size == len(LAYER)
    (tmp_path / LAYER_ID).write_bytes(LAYER)
    bootstrap = tmp_path / "one.zran"
    if where == "the directory":
        bootstrap = tmp_path / "other.boot"
        bootstrap.write_bytes(inlined_bootstrap(tmp_path / "one.zran"))
        (tmp_path / "one.zran").rename(tmp_path / "other")
    assert unpacked(tmp_path, bootstrap) == expected()


def test_layer_that_is_not_compressed(tmp_path):
    layer = layer_tar(*FILES)
    (tmp_path / hashlib.sha256(layer).hexdigest()).write_bytes(layer)
    made(tmp_path, layer)
    with open_bootstrap(tmp_path / "boot") as image:
        (entry,) = image.blobs
        assert entry.features == (
            BlobFeatures.ALIGNED
            | BlobFeatures.CHUNK_INFO_V2
            | BlobFeatures.SEPARATE
            | BlobFeatures.CAP_TAR_TOC
        )
    assert unpacked(tmp_path, tmp_path / "boot") == expected()
    assert findings(tmp_path, tmp_path / "boot") == []


def test_files_of_a_cache(tmp_path):
    build(
        io.BytesIO(LAYER),
        BuildOptions(
            source_type=SourceType.TARGZ_REF, bootstrap=tmp_path / "boot",
            blob_cache_dir=tmp_path, chunk_size=0x10000,
        ),
    )  # fmt: skip
    data = (tmp_path / f"{LAYER_ID}.blob.data").read_bytes()
    assert data == b"".join(file + bytes(-len(file) % 4096) for file in FILES)
    table = parse_cached((tmp_path / f"{LAYER_ID}.blob.meta").read_bytes())
    with open_bootstrap(tmp_path / "boot") as image:
        assert all(table.agrees(info) for info in image.chunk_infos)


def test_disk(tmp_path):
    made(tmp_path)
    (tmp_path / LAYER_ID).write_bytes(LAYER)
    result = export_block(tmp_path / "boot", tmp_path / "disk", blob_directory(tmp_path))
    found = files_of(result.disk.read_bytes())
    assert found == {name.encode(): data for name, data in expected().items()}


def test_same_bytes_for_any_number_of_workers(tmp_path):
    outputs = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        made(folder, workers=workers)
        outputs.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert outputs[0] == outputs[1]


def test_layer_from_a_pipe_is_read_to_its_end(tmp_path):
    layer = LAYER + gzipped(bytes(300_000))
    read, write = os.pipe()
    with open(read, "rb") as source, open(write, "wb") as sink:
        feeder = threading.Thread(target=lambda: (sink.write(layer), sink.close()))
        feeder.start()
        result = build(
            source,
            BuildOptions(
                source_type=SourceType.TARGZ_REF, bootstrap=tmp_path / "boot", blob_dir=tmp_path
            ),
        )
        feeder.join()
    assert result.blobs == [hashlib.sha256(layer).hexdigest()]
    assert result.blob_size == len(layer)


def test_no_data(tmp_path):
    layer = gzipped(layer_tar(b""))
    assert made(tmp_path, layer).blobs == []
    assert [path.name for path in tmp_path.iterdir()] == ["boot"]
    result = made(tmp_path, layer, inline_bootstrap=True, blob=tmp_path / "one.zran", toc=True)
    assert result.blobs == [hashlib.sha256(layer).hexdigest()]


def test_merged_layers(tmp_path):
    """As the snapshotter does it: layers and tables by digests, one bootstrap over all."""
    sources, digests, ids = [], [], []
    for number in range(3):
        files = [content(200_000, number), content(10 + number, 77)]
        names = [f"of {number}", "of all"]
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name, data in zip(names, files, strict=True):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        layer = gzipped(stream.getvalue())
        ids.append(hashlib.sha256(layer).hexdigest())
        (tmp_path / ids[-1]).write_bytes(layer)
        result = made(tmp_path, layer, bootstrap=tmp_path / f"boot{number}")
        sources.append(result.bootstrap)
        digests.append(bytes.fromhex(result.blob_path.name))
    options = MergeOptions(bootstrap=tmp_path / "boot", original_blob_ids=ids, blob_digests=digests)
    result = merge(sources, options)
    assert result.blobs == ids
    assert unpacked(tmp_path, tmp_path / "boot") == {
        **{f"of {number}": content(200_000, number) for number in range(3)},
        "of all": content(12, 77),
    }
    # Of a chunk that no file has any more nobody knows the digest.
    found = findings(tmp_path, tmp_path / "boot")
    assert {finding.severity for _, finding in found} == {"warning"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"blob_id": "x"}, "'targz-ref' conflicts with '--blob-id'"),
        ({"batch_size": 0x1000}, "'targz-ref' conflicts with '--batch-size'"),
        ({"encryption": BlobCipher.generate()}, "'targz-ref' conflicts with '--encrypt'"),
        ({"prefetch_policy": PrefetchPolicy.BLOB}, "conflicts with '--prefetch-policy blob'"),
        (
            {"source_type": SourceType.ESTARGZ_REF, "blob_cache_dir": "here", "blob_dir": None},
            "'estargz-ref' conflicts with '--blob-cache-dir'",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path, change, word):
    if change.get("blob_cache_dir"):
        change["blob_cache_dir"] = tmp_path
    with pytest.raises(BuildError, match=word):
        made(tmp_path, **change)
    assert not list(tmp_path.iterdir())


BROKEN = {
    "truncated": (LAYER[: len(LAYER) // 2], "ends too early"),
    "without trailer": (LAYER[:-4], "ends too early"),
    "checksum": (LAYER[:-8] + bytes([LAYER[-8] ^ 1]) + LAYER[-7:], "gzip data"),
    "flipped": (LAYER[:9999] + bytes([LAYER[9999] ^ 0x10]) + LAYER[10_000:], "gzip data|tar|end"),
    "garbage": (LAYER + b"garbage", "something else follows"),
    "empty": (b"", "empty file"),
    "no tar": (gzipped(b"x" * 5000), "checksum"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(100), "zstd"),
    "sparse": (gzipped(form_1_0() + bytes(1024)), "sparse"),
    "short tar": (layer_tar(*FILES)[:5000], "ends inside"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_layers_leave_nothing(tmp_path, monkeypatch, case):
    layer, text = BROKEN[case]
    out, path = tmp_path / "out", tmp_path / "layer"
    out.mkdir()
    path.write_bytes(layer)
    told = []
    for source, forks in ((io.BytesIO(layer), False), (path, False), (path, True)):
        monkeypatch.setattr("builder.reference.can_fork", lambda forks=forks: forks)
        with pytest.raises(NydusError, match=text) as caught:
            built(out, source)
        told.append((caught.value.reason, caught.value.where.get("offset")))
        assert not list(out.iterdir())
    assert len(set(told)) == 1


def test_another_layer_is_told(tmp_path):
    made(tmp_path)
    other = gzipped(layer_tar(*(bytes(reversed(data)) for data in FILES)))
    (tmp_path / LAYER_ID).write_bytes(other.ljust(len(LAYER), b"\0")[: len(LAYER)])
    with pytest.raises(NydusError):
        unpacked(tmp_path, tmp_path / "boot")
    texts = [str(finding) for _, finding in findings(tmp_path, tmp_path / "boot")]
    assert any("id of the layer" in text for text in texts)
    assert any(text.startswith("error") for text in texts)


def test_tables_of_another_layer_are_told(tmp_path):
    blob = LayerBlob(tmp_path / "one", FILES)
    other = LayerBlob(tmp_path / "other", FILES[:-1])
    place = tmp_path / "both"
    place.mkdir()
    (place / blob.layer.id).write_bytes(blob.layer.stored)
    (place / blob.tables.id).write_bytes(other.tables.stored)
    with pytest.raises(NydusError):
        unpacked(place, blob.bootstrap)
    texts = [str(finding) for _, finding in findings(place, blob.bootstrap)]
    assert any("size of the tables" in text or "compression table header" in text for text in texts)


def test_one_wrong_byte_of_the_layer(tmp_path):
    """The trailer's checksum is of no use to who starts in the middle; digests are."""
    files = [os.urandom(300_000)]
    layer = bytearray(gzipped(layer_tar(*files), level=0))
    blob = LayerBlob(tmp_path / "made", files, bytes(layer))
    layer[150_000] ^= 1
    place = tmp_path / "place"
    place.mkdir()
    (place / blob.layer.id).write_bytes(layer)
    (place / blob.tables.id).write_bytes(blob.tables.stored)
    with pytest.raises(IntegrityError, match="digest"):
        unpacked(place, blob.bootstrap)


def test_context_is_inflated_once(tmp_path, monkeypatch):
    counted = []

    def count(*arguments):
        counted.append(arguments)
        return inflate_at(*arguments)

    inflate_at = contexts.inflate_at
    monkeypatch.setattr(contexts, "inflate_at", count)
    blob = LayerBlob(tmp_path / "made", FILES)
    (tmp_path / "made" / blob.layer.id).write_bytes(blob.layer.stored)
    assert unpacked(tmp_path / "made", blob.bootstrap) == expected()
    reader = MemoryReader(blob.tables)
    assert reader.size() == len(blob.tables.stored)
    assert 1 <= len(counted) <= 3
