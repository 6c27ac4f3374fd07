"""Read RAFS v5 bootstraps lazily, with the interface of v6's `Bootstrap`."""

from __future__ import annotations

import mmap
import stat
from collections.abc import Iterator
from functools import cached_property
from itertools import takewhile

from erofs import rafs
from erofs.base import BlobHint, ImageBase, Tables
from erofs.errors import CorruptStructure, FormatError, OutOfBounds, UnsupportedFeature
from erofs.rafs import BlobEntry, BlobFeatures, ChunkInfo, Compressor, Digester, SuperFlags
from erofs.v5.inode import InodeV5
from erofs.v5.layout import (
    BLOB_ID_MAX,
    DIGEST_SIZE,
    EXTENDED_BLOB_SIZE,
    INDEX_SIZE,
    ROOT_INO,
    SUPERBLOCK_SIZE,
    BlobName,
    EarlyInodeRecord,
    ExtendedBlob,
    InodeFlags,
    InodeRecord,
    SuperblockV5,
    parse_blob_table,
)
from erofs.v5.restrict import restrict_superblock
from erofs.view import View

__all__ = ["BootstrapV5"]

_NO_EXTENSION = ExtendedBlob(0, 0, 0, 0)


class BootstrapV5(ImageBase[InodeV5]):
    """A RAFS v5 bootstrap; inode numbers, from 1 on, are places in its inode table.

    `blobs` are entries as v6 has them, with what v5 knows; without an extended blob table
    their chunk count and sizes are 0, which means unknown. `is_early` tells images from
    before the format was published.

    Raises:
        FormatError: not a RAFS v5 bootstrap, or one that strict readers refuse.
    """

    version = 5
    is_tarfs = False

    def __init__(self, source: View, mapping: mmap.mmap | None = None) -> None:
        super().__init__(source, mapping)
        self.superblock = superblock = SuperblockV5.parse(source)
        restrict_superblock(superblock, source.length)
        self.flags = SuperFlags(superblock.flags & ~rafs.SUPER_FLAGS_RESERVED)
        self.chunk_size = superblock.block_size
        self.name_count = superblock.inode_table_entries
        self._places: dict[tuple[int, int], ChunkInfo] = {}
        self.is_early = self._has_early_root()
        self._names = self._blob_names()
        self.blobs = tuple(map(self._blob, range(len(self._names)), self._names))

    def _has_early_root(self) -> bool:
        """Tell by the root's mode, where the two layouts of inodes have it, which one this is."""
        offset = self.inode_offset(ROOT_INO)
        if stat.S_ISDIR(InodeRecord.parse(self.view, offset).mode):
            return False
        if stat.S_ISDIR(EarlyInodeRecord.parse(self.view, offset).mode):
            return True
        raise CorruptStructure("the root is not a directory", offset=offset)

    def _blob_names(self) -> list[BlobName]:
        superblock = self.superblock
        offset, size = superblock.blob_table_offset, superblock.blob_table_size
        return parse_blob_table(self.view.slice(offset, size, "blob table")) if size else []

    def _blob(self, index: int, name: BlobName) -> BlobEntry:
        superblock = self.superblock
        extension = _NO_EXTENSION
        if superblock.extended_blob_table_entries:
            if index >= superblock.extended_blob_table_entries:
                raise CorruptStructure("extended blob table without this blob", blob=index)
            offset = superblock.extended_blob_table_offset + index * EXTENDED_BLOB_SIZE
            extension = ExtendedBlob.parse(self.view, offset)
        if (
            extension.uncompressed_size > rafs.MAX_UNCOMPRESSED_SIZE
            or extension.compressed_size > rafs.MAX_COMPRESSED_SIZE
            or extension.chunk_count > rafs.MAX_CHUNKS_PER_BLOB
            or len(name.blob_id) > BLOB_ID_MAX
        ):
            raise OutOfBounds("impossible sizes of a blob or its id", blob=index)
        if extension.features & BlobFeatures.TARFS:
            # Chunks of a tar have no digest, and nobody would verify them.
            raise CorruptStructure("tar as a blob of RAFS v5", blob=index)
        return BlobEntry(
            blob_id=name.blob_id,
            blob_index=index,
            chunk_size=self.chunk_size,
            chunk_count=extension.chunk_count,
            compressor=self.compressor,
            digester=self.digester,
            features=extension.features & sum(BlobFeatures),
            compressed_size=extension.compressed_size,
            uncompressed_size=extension.uncompressed_size,
            blob_toc_size=0,
            ci_compressor=Compressor.NONE,
            ci_offset=0,
            ci_compressed_size=0,
            ci_uncompressed_size=0,
        )

    @property
    def compressor(self) -> Compressor:
        """The compressor of all chunks; lz4_block when nothing is said, or nothing was known."""
        if self.is_early:
            # Its flags had another meaning; compressed chunks tell so themselves.
            return Compressor.LZ4_BLOCK
        found = [c for c, flag in rafs.COMPRESSOR_FLAGS.items() if flag in self.flags]
        return found[0] if found else Compressor.LZ4_BLOCK

    @property
    def digester(self) -> Digester:
        """The digest algorithm of chunks and inodes; blake3 when nothing is said."""
        is_sha256 = SuperFlags.HASH_SHA256 in self.flags
        return Digester.SHA256 if is_sha256 else Digester.BLAKE3

    @property
    def inode_count(self) -> int:
        """The number of inodes that the superblock tells."""
        return self.superblock.inodes_count

    @property
    def tables(self) -> Tables:
        """Where the tables are; there is no chunk table."""
        superblock = self.superblock
        return Tables(
            superblock.blob_table_offset,
            superblock.blob_table_size,
            superblock.prefetch_table_offset,
            superblock.prefetch_table_entries,
        )

    @property
    def blob_hints(self) -> tuple[BlobHint, ...]:
        """What to read ahead of each blob."""
        return tuple(
            BlobHint(0, name.readahead_offset, name.readahead_size) for name in self._names
        )

    @property
    def root(self) -> InodeV5:
        """The root directory; raise `FormatError`."""
        return self.inode(ROOT_INO)

    def inode_offset(self, index: int) -> int:
        """Return where the record of a name is; raise `FormatError`."""
        if not 1 <= index <= self.name_count:
            raise OutOfBounds("no such inode", expected=f"1 to {self.name_count}", got=index)
        place = self.superblock.inode_table_offset + (index - 1) * INDEX_SIZE
        offset = int.from_bytes(self.view.slice(place, INDEX_SIZE, "inode table"), "little") << 3
        if offset <= SUPERBLOCK_SIZE:
            raise OutOfBounds("inode inside of the superblock", offset=place, got=offset)
        return offset

    def stored_digest(self, index: int) -> memoryview:
        """Return the digest in the record of a name; raise `FormatError`."""
        return self.view.slice(self.inode_offset(index), DIGEST_SIZE, "inode")

    def parse_record(self, offset: int) -> InodeRecord:
        """Decode the fixed part of an inode of either layout; raise `OutOfBounds`."""
        if self.is_early:
            return EarlyInodeRecord.parse(self.view, offset).current()
        return InodeRecord.parse(self.view, offset)

    def inode(self, nid: int) -> InodeV5:
        """Decode the inode `nid`; raise `FormatError`."""
        inode = InodeV5(self, nid)
        if inode.nid != nid:
            raise CorruptStructure(
                "further name instead of an inode", offset=inode.offset, expected=nid, got=inode.nid
            )
        return inode

    def file_chunks(self, inode: InodeV5) -> Iterator[ChunkInfo]:
        """Yield the chunks of a regular file, which cover it in order; raise `FormatError`.

        Chunks at one place of a blob say the same, whichever file refers to them.
        """
        if not inode.is_regular:
            raise CorruptStructure("not a regular file", offset=inode.offset)
        count = -(-inode.size // self.chunk_size)
        if inode.record.child_count != count:
            if inode.record.flags & InodeFlags.HAS_HOLE:
                raise UnsupportedFeature("file with holes", offset=inode.offset)
            raise CorruptStructure(
                "number of chunks", offset=inode.offset, expected=count,
                got=inode.record.child_count,
            )  # fmt: skip
        for number, info in enumerate(inode.stored_chunks()):
            try:
                self._check_chunk(info, number * self.chunk_size, inode.size)
            except FormatError as error:
                error.add_context(offset=inode.offset, chunk=number)
                raise
            yield info

    def _check_chunk(self, info: ChunkInfo, file_offset: int, file_size: int) -> None:
        if info.blob_index >= len(self.blobs):
            raise CorruptStructure("chunk of a blob that is not in the table", got=info.blob_index)
        expected = (file_offset, min(self.chunk_size, file_size - file_offset))
        if (info.file_offset, info.uncompressed_size) != expected:
            raise CorruptStructure(
                "file offset and size of a chunk",
                expected=expected,
                got=(info.file_offset, info.uncompressed_size),
            )
        if info.compressed_offset + info.compressed_size > rafs.MAX_COMPRESSED_SIZE:
            raise OutOfBounds("chunk behind the largest blob", got=info.compressed_offset)
        common = info._replace(file_offset=0)
        place = (info.blob_index, info.compressed_offset)
        if self._places.setdefault(place, common) != common:
            raise CorruptStructure("two chunks at one place", got=info.compressed_offset)

    @cached_property
    def prefetch_nids(self) -> tuple[int, ...]:
        """The prefetch table up to its first zero; raise `FormatError`."""
        superblock = self.superblock
        size = superblock.prefetch_table_entries * INDEX_SIZE
        if not size:
            return ()
        table = self.view.slice(superblock.prefetch_table_offset, size, "prefetch table")
        numbers = (
            int.from_bytes(table[i : i + INDEX_SIZE], "little") for i in range(0, size, INDEX_SIZE)
        )
        return tuple(takewhile(bool, numbers))
