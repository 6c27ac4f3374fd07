"""Encryption of stored data, and the way back from what is stored to content."""

import pytest

from erofs.blobmeta import CiFlags, CompressionInfoV2, CompressionTableHeader
from erofs.cipher import BlobCipher, blob_cipher
from erofs.citable import CompressionTable
from erofs.codec import compress
from erofs.contexts import BatchContext
from erofs.errors import CodecError, CorruptStructure, FormatError, UnsupportedFeature
from erofs.rafs import BlobEntry, BlobFeatures, Compressor
from erofs.stored import StoredData, parse_stored_header, read_stored_table

KEY, IV = bytes(range(32)), bytes(range(100, 116))


def entry(**changes):
    blank = BlobEntry(b"a" * 64, 0, 0x100000, 1, Compressor.ZSTD, 0, 0x40000105, 1, 4096, 0, 0, 0,
                      0, 0)  # fmt: skip
    return blank._replace(**{**BlobCipher(KEY, IV).fields(), **changes})


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 18, 31, 32, 33, 100, 5000])
def test_content_comes_back_and_only_short_data_grows(size):
    cipher = BlobCipher(KEY, IV)
    data = bytes(number % 251 for number in range(size))
    stored = cipher.encrypt(data)
    assert len(stored) == cipher.stored_size(size) == (size if size >= 16 else 18)
    assert data not in stored
    assert cipher.decrypt(stored) == data
    assert cipher.decrypt(memoryview(stored), size) == data


def test_known_vector():
    """IEEE 1619, vector 2: the key halves are 0x11… and 0x22…, the sector is 0x3333333333."""
    cipher = BlobCipher(b"\x11" * 16 + b"\x22" * 16, b"\x33" * 5 + bytes(11))
    assert cipher.encrypt(b"\x44" * 32).hex() == (
        "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0"
    )


def test_data_that_looks_padded():
    cipher = BlobCipher(KEY, IV)
    looks_padded = bytes(14) + b"\x02\x02\x78\x90"
    assert cipher.decrypt(cipher.encrypt(looks_padded), 18) == looks_padded
    assert cipher.decrypt(cipher.encrypt(looks_padded)) == bytes(14)
    for other in (bytes(15) + b"\x02\x78\x90", bytes(16) + b"\x78\x90", bytes(18)):
        assert cipher.decrypt(cipher.encrypt(other)) == other


def test_wrong_keys_and_lengths():
    with pytest.raises(CodecError):
        BlobCipher(b"same key, twice!" * 2, IV)
    with pytest.raises(CodecError):
        BlobCipher(KEY[:16], IV)
    with pytest.raises(CodecError, match="too short"):
        BlobCipher(KEY, IV).decrypt(b"123")


def test_secrets_are_not_shown():
    cipher = BlobCipher.generate()
    other = BlobCipher.generate()
    assert (cipher.key, cipher.iv) != (other.key, other.iv)
    for text in (repr(cipher), str(cipher)):
        assert repr(cipher.key)[2:10] not in text
        assert cipher.key.hex() not in text


def test_cipher_of_an_entry():
    found = blob_cipher(entry())
    assert (found.key, found.iv) == (KEY, IV)
    assert blob_cipher(entry(cipher=0, features=0x40000001)) is None
    with pytest.raises(CorruptStructure, match="without its cipher"):
        blob_cipher(entry(cipher=0))
    with pytest.raises(CorruptStructure):
        blob_cipher(entry(blob_meta_digest=b"same key, twice!" * 2))


CONTENT = b"content that is easy to compress " * 40


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("content", [CONTENT, b"short"])
def test_chunks(encrypted, content):
    blob = entry() if encrypted else entry(cipher=0, features=0x40000001)
    packed = compress(Compressor.ZSTD, content)
    stored = content if packed is None else packed
    if encrypted:
        stored = BlobCipher(KEY, IV).encrypt(stored)
    data = StoredData(blob)
    compressed = packed is not None
    assert data.chunk(stored, len(content), compressed=compressed, encrypted=encrypted) == content
    with pytest.raises(CodecError):
        data.chunk(stored, len(content) + 1, compressed=compressed, encrypted=encrypted)


def test_encrypted_chunk_of_a_plain_blob():
    with pytest.raises(CodecError, match="not encrypted"):
        StoredData(entry(cipher=0, features=0x40000001)).chunk(
            bytes(18), 18, compressed=False, encrypted=True
        )


@pytest.mark.parametrize("content", [CONTENT, b"tiny", bytes(range(20))])
def test_batches(content):
    packed = compress(Compressor.ZSTD, content)
    stored = BlobCipher(KEY, IV).encrypt(content if packed is None else packed)
    context = BatchContext(len(stored), len(content))
    assert StoredData(entry()).batch(context, stored) == content


def test_parts_of_batches_are_no_units():
    chunk = CompressionInfoV2(0, 5, 0, 0, CiFlags.BATCH | CiFlags.COMPRESSED)
    table = CompressionTable(CompressionTableHeader(0, 0, 1, 0, 0, 0), [chunk])
    with pytest.raises(UnsupportedFeature):
        StoredData(entry()).entry(table, 0, b"12345")


def stored_table(encrypt):
    row = CompressionInfoV2(0, 5, 0, 18, CiFlags.ENCRYPTED | CiFlags.HAS_CRC, 7)
    plain = row.pack()
    header = CompressionTableHeader(int(BlobFeatures(0x40000105)), 0, 1, 18, 24, 24).pack()
    cipher = BlobCipher(KEY, IV)
    if encrypt:
        return cipher.encrypt(plain) + cipher.encrypt(header), plain, header
    return plain + header, plain, header


def test_encrypted_tables():
    stored, plain, header = stored_table(True)
    blob = entry(ci_offset=18, ci_compressed_size=24, ci_uncompressed_size=24)
    found = read_stored_table(blob, stored)
    assert (found.plain, found.header) == (plain, header)
    assert found.table.entries[0].compressed_size == 18
    assert parse_stored_header(blob, stored[24:]).ci_entries == 1
    with pytest.raises((FormatError, CodecError)):
        read_stored_table(entry(ci_compressed_size=24, blob_meta_size=5), stored)
    with pytest.raises((FormatError, CodecError)):
        read_stored_table(blob, stored_table(False)[0])
