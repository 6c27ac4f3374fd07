"""What RAFS v6 insists on beyond EROFS: checks of the superblocks and of the blob table.

Source: spec rafs-v6 section 7.1.
"""

from __future__ import annotations

from itertools import pairwise

from erofs import layout, rafs
from erofs.errors import BadMagic, CorruptStructure, OutOfBounds, UnsupportedFeature
from erofs.layout import Superblock
from erofs.rafs import BlobEntry, BlobFeatures, ExtendedSuperblock, SuperFlags

__all__ = ["restrict_blob", "restrict_extended", "restrict_superblock"]


def restrict_superblock(superblock: Superblock, length: int) -> None:
    """Refuse what RAFS v6 never writes (spec 7.1)."""
    if not superblock.feature_compat & layout.FEATURE_COMPAT_RAFS_V6:
        raise BadMagic("an EROFS image, but not a RAFS v6 bootstrap")
    expected = {
        "checksum": 0,
        "sb_extslots": 0,
        "u1": 0,
        "xattr_blkaddr": 0,
        "devt_slotoff": layout.DEVICE_TABLE_OFFSET // layout.DEVICE_SLOT_SIZE,
        "feature_incompat": layout.FEATURE_INCOMPAT_RAFS_V6,
    }
    for name, value in expected.items():
        if getattr(superblock, name) != value:
            raise CorruptStructure(
                f"{name} of the superblock", expected=value, got=getattr(superblock, name)
            )
    if superblock.blkszbits not in (layout.BLOCK_BITS, layout.MIN_BLOCK_BITS):
        raise UnsupportedFeature("block size of a RAFS v6 image", got=1 << superblock.blkszbits)
    block_size = 1 << superblock.blkszbits
    if length < layout.BLOCK_SIZE or length % block_size:
        raise OutOfBounds("bootstrap of an impossible length", got=length)
    if superblock.meta_blkaddr * block_size > length or not superblock.inos:
        raise CorruptStructure("metadata address or inode count", got=superblock.meta_blkaddr)


def restrict_extended(extended: ExtendedSuperblock, superblock: Superblock, length: int) -> None:
    """Refuse flags that nobody knows, and tables outside of the file or over each other."""
    flags = extended.flags
    known = sum(SuperFlags) | rafs.SUPER_FLAGS_RESERVED
    if flags & ~known:
        raise UnsupportedFeature("RAFS flags", got=f"{flags & ~known:#x}")
    for group, what in (
        (rafs.SUPER_FLAGS_COMPRESSION, "compressor"),
        (rafs.SUPER_FLAGS_HASH, "digest"),
    ):
        if (flags & group).bit_count() != 1:
            raise CorruptStructure(f"not exactly one {what} flag", got=f"{flags:#x}")
    size = extended.chunk_size
    if size & (size - 1) or not rafs.MIN_CHUNK_SIZE <= size <= rafs.MAX_CHUNK_SIZE:
        raise CorruptStructure("impossible chunk size", got=size)
    tables = [
        ("blob table", extended.blob_table_offset, extended.blob_table_size, 256, 4096),
        ("chunk table", extended.chunk_table_offset, extended.chunk_table_size, 80, 4096),
        ("prefetch table", extended.prefetch_table_offset, extended.prefetch_table_size, 4, 8),
    ]
    used: list[tuple[int, int, str]] = []
    for name, start, size, entry, alignment in tables:
        if not size or not start:
            continue
        if size % entry or start % alignment or start < 4096 or start + size > length:
            raise OutOfBounds(f"{name} at an impossible place", offset=start, got=size)
        used.append((start, start + size, name))
    used.sort()
    for (_, end, name), (start, _, other) in pairwise(used):
        if start < end:
            raise CorruptStructure(f"{name} and {other} overlap", offset=start)
    devices_end = layout.DEVICE_TABLE_OFFSET + superblock.extra_devices * layout.DEVICE_SLOT_SIZE
    if extended.blob_table_size and extended.blob_table_offset < devices_end:
        raise CorruptStructure("blob table inside of the device table")


def restrict_blob(blob: BlobEntry, index: int, chunk_size: int) -> None:
    """Refuse an entry that contradicts its place, its features or the format's limits."""
    if blob.blob_index != index:
        raise CorruptStructure("blob index", expected=index, got=blob.blob_index)
    if blob.chunk_size != chunk_size:
        raise CorruptStructure("chunk size of a blob", expected=chunk_size, got=blob.chunk_size)
    if blob.chunk_count > rafs.MAX_CHUNKS_PER_BLOB:
        raise CorruptStructure("impossible number of chunks", got=blob.chunk_count)
    if blob.features & rafs.BLOB_FEATURES_INCOMPATIBLE:
        raise UnsupportedFeature("blob features", got=f"{blob.features:#x}")
    if (
        blob.compressor not in rafs.Compressor.__members__.values()
        or blob.ci_compressor not in rafs.Compressor.__members__.values()
        or blob.digester not in rafs.Digester.__members__.values()
        or blob.cipher not in rafs.Cipher.__members__.values()
    ):
        raise UnsupportedFeature("unknown algorithm of a blob")
    if (
        blob.uncompressed_size > rafs.MAX_UNCOMPRESSED_SIZE
        or blob.compressed_size > rafs.MAX_COMPRESSED_SIZE
        or blob.ci_compressed_size > blob.ci_uncompressed_size
    ):
        raise OutOfBounds("impossible sizes of a blob", got=blob.uncompressed_size)
    blob.encryption()
    _restrict_table(blob)


def _restrict_table(blob: BlobEntry) -> None:
    features = blob.features
    native = not features & BlobFeatures.TARFS
    if bool(features & BlobFeatures.ALIGNED) != native:
        raise CorruptStructure("feature 'aligned' of a blob", got=f"{features:#x}")
    extra = BlobFeatures.BATCH | BlobFeatures.ZRAN | BlobFeatures.ENCRYPTED
    version2 = bool(features & BlobFeatures.CHUNK_INFO_V2)
    if features & extra and not version2:
        raise CorruptStructure("batch, zran or encrypted blob without chunk info v2")
    size = blob.ci_uncompressed_size
    if version2:
        needed = 24 * blob.chunk_count
        fits = size >= needed if features & extra else size == needed
    else:
        relaxed = features & (BlobFeatures.IS_CHUNKDICT_GENERATED | BlobFeatures.TARFS)
        fits = bool(relaxed) or size == 16 * blob.chunk_count
    if not fits:
        raise CorruptStructure("size of a compression table", got=size)
