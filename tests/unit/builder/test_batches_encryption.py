"""Batches and encryption of `build`: content comes back, whatever the number of workers."""

import io
import random

import pytest

from builder import BuildError, BuildOptions, SourceType, build, export_block, unpack
from builder.backends import blob_directory
from builder.cli import main
from erofs import CodecError, IntegrityError, NydusError, check_blob, check_image, open_bootstrap
from erofs.blobcheck import read_compression_table
from erofs.cipher import BlobCipher
from erofs.rafs import BlobFeatures, ChunkFlags, Compressor
from erofs.view import View
from tests.fakes.built import member, tar_of
from tests.fakes.disk_files import files_of

CIPHER = BlobCipher(bytes(range(32)), bytes(range(16)))
RANDOM = random.Random(5)
FILES = {
    f"file{number:03}": RANDOM.randbytes(size // 2) + bytes(size - size // 2)
    for number, size in enumerate([0, 1, 3, 15, 16, 17, 100, 2047, 2048, 4095, 4096, 4097, 9000,
                                   70000, 500, 500, 30000, 1, 4000, 3, 120000, 12, 12])
}  # fmt: skip
FILES["again"] = FILES["file007"]
TAR = tar_of(*(member(name, data=data) for name, data in FILES.items()))
VARIANTS = {
    "batch": {"batch_size": 0x1000},
    "large batches": {"batch_size": 0x10000},
    "encrypted": {"encryption": CIPHER},
    "encrypted batches": {"encryption": CIPHER, "batch_size": 0x10000},
    "contents": {"encryption": CIPHER, "batch_size": 0x2000, "toc": True},
}


def make(folder, tar=TAR, **changes):
    folder.mkdir(exist_ok=True)
    options = {"chunk_size": 0x10000, "compressor": Compressor.ZSTD, **changes}
    return build(
        io.BytesIO(tar),
        BuildOptions(
            source_type=SourceType.TAR, bootstrap=folder / "boot", blob_dir=folder, **options
        ),
    )


@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD])
@pytest.mark.parametrize("variant", VARIANTS)
def test_content_comes_back(variant, compressor, tmp_path):
    result = make(tmp_path, compressor=compressor, **VARIANTS[variant])
    with open_bootstrap(tmp_path / "boot") as image:
        assert list(check_image(image)) == []
        (blob,) = image.blobs
        stored = View(result.blob_path.read_bytes())
        assert list(check_blob(blob, stored, image, data=True)) == []
        is_batched = "batch_size" in VARIANTS[variant]
        assert bool(read_compression_table(stored, blob).batches) == is_batched
    provider = blob_directory(tmp_path)
    disk = export_block(tmp_path / "boot", tmp_path / "disk", provider).disk
    expected = {name.encode(): data for name, data in FILES.items()}
    assert files_of(disk.read_bytes()) == expected
    unpack(tmp_path / "boot", tmp_path / "tar", provider)
    again = make(tmp_path / "again", (tmp_path / "tar").read_bytes(), encryption=None)
    assert again.stats.content_bytes == sum(map(len, FILES.values()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_number_of_workers_changes_no_byte(variant, tmp_path):
    made = []
    for workers in (1, 2, 5):
        folder = tmp_path / str(workers)
        make(folder, workers=workers, **VARIANTS[variant])
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert made[0] == made[1] == made[2]


def test_nothing_in_clear(tmp_path):
    words = b"these words are nobody's business, " * 3
    tar = tar_of(member("a", data=words), member("b", data=b"tiny secret"))
    for batch in (0, 0x1000):
        folder = tmp_path / str(batch)
        result = make(folder, tar, encryption=CIPHER, batch_size=batch, compressor=Compressor.NONE)
        stored = result.blob_path.read_bytes()
        assert b"nobody" not in stored
        assert b"tiny" not in stored
        with open_bootstrap(folder / "boot") as image:
            assert image.blobs[0].features & BlobFeatures.ENCRYPTED
            assert all(chunk.flags & ChunkFlags.ENCRYPTED for chunk in image.chunk_infos)


def test_batch_that_would_have_to_be_padded_is_no_batch(tmp_path):
    """nydusd refuses a batch that is stored larger than its content."""
    tar = tar_of(member("a", data=b"hello"), member("b", data=b"hi"))
    result = make(tmp_path, tar, encryption=CIPHER, batch_size=0x1000)
    with open_bootstrap(tmp_path / "boot") as image:
        table = read_compression_table(View(result.blob_path.read_bytes()), image.blobs[0])
    assert table.batches == ()
    assert [entry.compressed_size for entry in table.entries] == [18, 18]


def test_another_key_reads_nothing(tmp_path):
    result = make(tmp_path, encryption=CIPHER)
    other = BlobCipher.generate()
    with open_bootstrap(tmp_path / "boot") as image:
        blob = image.blobs[0]._replace(**other.fields())
        stored = View(result.blob_path.read_bytes())
        findings = list(check_blob(blob, stored, image, data=True))
        assert any(finding.severity == "error" for finding in findings)
        with pytest.raises((CodecError, IntegrityError, NydusError)):
            read_compression_table(stored, blob)


def test_large_chunk_that_does_not_compress(tmp_path):
    tar = tar_of(member("large", data=RANDOM.randbytes(1 << 24)))
    with pytest.raises(BuildError, match="smaller --chunk-size"):
        make(tmp_path, tar, chunk_size=1 << 24, encryption=CIPHER)
    assert list(tmp_path.iterdir()) == []
    make(tmp_path, tar, chunk_size=1 << 24)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"batch_size": 0x1001}, "invalid batch size"),
        ({"batch_size": 0x800}, "invalid batch size"),
        ({"batch_size": 0x20000}, "exceeds the chunk size"),
        ({"blob_offset": 512, "toc": True}, "--blob-offset"),
    ],
)
def test_wrong_sizes(changes, what, tmp_path):
    with pytest.raises(BuildError, match=what):
        make(tmp_path, **changes)


def test_blob_that_begins_later_in_what_holds_it(tmp_path):
    """Chunks and table are where they are in a file that has other things before the blob."""
    result = make(tmp_path, blob_offset=8192)
    held = View(b"x" * 8192 + result.blob_path.read_bytes())
    with open_bootstrap(tmp_path / "boot") as image:
        (blob,) = image.blobs
        assert blob.compressed_size == held.length
        findings = [str(f) for f in check_blob(blob, held, image, data=True)]
        assert [text for text in findings if "blob id" not in text] == []


def test_words_of_the_command_line(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(TAR)
    words = ["-l", "warn", "create", "-t", "tar-rafs", "-D", str(tmp_path), str(tmp_path / "a.tar")]
    assert main([*words, "-B", str(tmp_path / "b"), "-E", "--batch-size", "65536"]) == 0
    with open_bootstrap(tmp_path / "b") as image:
        names = BlobFeatures(image.blobs[0].features)
    assert BlobFeatures.ENCRYPTED | BlobFeatures.BATCH in names
    assert main([*words, "-B", str(tmp_path / "c"), "--batch-size", "0x200000"]) == 1
    assert "exceeds the chunk size" in capsys.readouterr().err
