"""Compares our records with the kernel's structures, as a C parser lays them out."""

import struct

import cffi
import pytest

from erofs import layout, rafs

# The documented layout of fs/erofs/erofs_fs.h, and of RAFS' records in the same style.
_DECLARATIONS = """
struct super_block {
    uint32_t magic; uint32_t checksum; uint32_t feature_compat; uint8_t blkszbits;
    uint8_t sb_extslots; uint16_t root_nid; uint64_t inos; uint64_t build_time;
    uint32_t build_time_nsec; uint32_t blocks; uint32_t meta_blkaddr; uint32_t xattr_blkaddr;
    uint8_t uuid[16]; uint8_t volume_name[16]; uint32_t feature_incompat; uint16_t u1;
    uint16_t extra_devices; uint16_t devt_slotoff; uint8_t dirblkbits; uint8_t xattr_prefix_count;
    uint32_t xattr_prefix_start; uint64_t packed_nid; uint8_t xattr_filter_reserved;
    uint8_t reserved[23];
};
struct inode_compact {
    uint16_t i_format; uint16_t i_xattr_icount; uint16_t i_mode; uint16_t i_nlink;
    uint32_t i_size; uint32_t reserved; uint32_t i_u; uint32_t i_ino; uint16_t i_uid;
    uint16_t i_gid; uint32_t reserved2;
};
struct inode_extended {
    uint16_t i_format; uint16_t i_xattr_icount; uint16_t i_mode; uint16_t reserved;
    uint64_t i_size; uint32_t i_u; uint32_t i_ino; uint32_t i_uid; uint32_t i_gid;
    uint64_t i_mtime; uint32_t i_mtime_nsec; uint32_t i_nlink; uint8_t reserved2[16];
};
struct dirent { uint64_t nid; uint16_t nameoff; uint8_t file_type; uint8_t reserved; };
struct xattr_header { uint32_t name_filter; uint8_t shared_count; uint8_t reserved[7]; };
struct xattr_entry { uint8_t name_len; uint8_t name_index; uint16_t value_size; };
struct chunk_index { uint16_t advise; uint16_t device_id; uint32_t blkaddr; };
struct device_slot {
    uint8_t tag[64]; uint32_t blocks; uint32_t mapped_blkaddr; uint8_t reserved[56];
};
struct extended_superblock {
    uint64_t flags; uint64_t blob_table_offset; uint32_t blob_table_size; uint32_t chunk_size;
    uint64_t chunk_table_offset; uint64_t chunk_table_size; uint64_t prefetch_table_offset;
    uint32_t prefetch_table_size; uint32_t padding; uint8_t reserved[200];
};
struct blob_entry {
    uint8_t blob_id[64]; uint32_t blob_index; uint32_t chunk_size; uint32_t chunk_count;
    uint32_t compressor; uint32_t digester; uint32_t features; uint64_t compressed_size;
    uint64_t uncompressed_size; uint32_t blob_toc_size; uint32_t ci_compressor;
    uint64_t ci_offset; uint64_t ci_compressed_size; uint64_t ci_uncompressed_size;
    uint8_t blob_toc_digest[32]; uint8_t blob_meta_digest[32]; uint64_t blob_meta_size;
    uint8_t cipher_iv[8]; uint32_t cipher; uint8_t reserved[36];
};
struct chunk_info {
    uint8_t digest[32]; uint32_t blob_index; uint32_t flags; uint32_t compressed_size;
    uint32_t uncompressed_size; uint64_t compressed_offset; uint64_t uncompressed_offset;
    uint64_t file_offset; uint32_t chunk_index; uint32_t crc32c;
};
"""
_FFI = cffi.FFI()
_FFI.cdef(_DECLARATIONS, packed=True)

_RECORDS = {
    "super_block": (layout.Superblock, layout._SUPERBLOCK),
    "inode_compact": (layout.InodeCompact, layout._INODE_COMPACT),
    "inode_extended": (layout.InodeExtended, layout._INODE_EXTENDED),
    "dirent": (layout.Dirent, layout._DIRENT),
    "xattr_header": (layout.XattrHeader, layout._XATTR_HEADER),
    "xattr_entry": (layout.XattrEntry, layout._XATTR_ENTRY),
    "chunk_index": (layout.ChunkIndex, layout._CHUNK_INDEX),
    "device_slot": (layout.DeviceSlot, layout._DEVICE_SLOT),
    "extended_superblock": (rafs.ExtendedSuperblock, rafs._EXTENDED_SUPERBLOCK),
    "blob_entry": (rafs.BlobEntry, rafs._BLOB_ENTRY),
    "chunk_info": (rafs.ChunkInfo, rafs._CHUNK_INFO),
}


def _offsets(format_string):
    """Return the offset of every field of a struct format."""
    items, number = [], ""
    for letter in format_string.lstrip("<"):
        if letter.isdigit():
            number += letter
        elif letter == "s":
            items.append(number + letter)
            number = ""
        else:
            items += [letter] * int(number or 1)
            number = ""
    return [struct.calcsize("<" + "".join(items[:end])) for end in range(len(items))]


@pytest.mark.parametrize("name", _RECORDS)
def test_sizes_names_and_offsets(name):
    record, ours = _RECORDS[name]
    theirs = _FFI.typeof(f"struct {name}")
    assert ours.size == _FFI.sizeof(theirs)
    fields = [(field, place.offset) for field, place in theirs.fields]
    assert list(zip(record._fields, _offsets(ours.format), strict=True)) == fields


@pytest.mark.parametrize("name", _RECORDS)
def test_a_value_lands_in_the_field_of_its_name(name):
    record, ours = _RECORDS[name]
    for number, field in enumerate(record._fields):
        value = bytearray(ours.size)
        kind = dict(_FFI.typeof(f"struct {name}").fields)[field]
        value[kind.offset] = 0x5A
        parsed = record._make(ours.unpack(value))
        expected = b"\x5a" if isinstance(parsed[number], bytes) else 0x5A
        found = parsed[number]
        assert (found.rstrip(b"\0") if isinstance(found, bytes) else found) == expected
