"""Read EROFS images lazily, and RAFS v6 bootstraps as the narrower profile.

`open_image` takes any uncompressed EROFS image; `open_bootstrap` then insists on what
RAFS v6 promises (spec rafs-v6 section 7.1). Everything is decoded when it is asked for,
from an mmap, by explicit offsets, so images may be shared between threads.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import cached_property
from operator import itemgetter

from erofs import layout, rafs
from erofs.base import BlobHint, DirectoryEntry, ImageBase, Source, Tables, open_as
from erofs.blobmeta import DIGEST_SIZE
from erofs.errors import BadMagic, CorruptStructure, FormatError, UnsupportedFeature
from erofs.inode import Inode, index_key
from erofs.layout import DeviceSlot, Superblock
from erofs.rafs import BlobEntry, BlobFeatures, ChunkInfo, ExtendedSuperblock, SuperFlags
from erofs.restrict import restrict_blob, restrict_extended, restrict_superblock
from erofs.view import View

__all__ = ["Bootstrap", "DirectoryEntry", "Image", "Inode", "open_bootstrap", "open_image"]

_BLOB_INDEX = ChunkInfo._fields.index("blob_index")


class Image(ImageBase[Inode]):
    """An EROFS image; a context manager that closes the mapping it was opened with.

    Raises:
        FormatError: the superblock is not one that this reader understands.
    """

    def __init__(self, source: View, mapping: mmap.mmap | None = None) -> None:
        super().__init__(source, mapping)
        if source.length < layout.SUPERBLOCK_OFFSET + layout.SUPERBLOCK_SIZE:
            raise BadMagic("not an EROFS image, too short", got=f"{source.length} bytes")
        self.superblock = superblock = Superblock.parse(source)
        if superblock.magic != layout.SUPERBLOCK_MAGIC:
            raise BadMagic(
                "not an EROFS image",
                offset=layout.SUPERBLOCK_OFFSET,
                expected=f"{layout.SUPERBLOCK_MAGIC:#x}",
                got=f"{superblock.magic:#x}",
            )
        if not layout.MIN_BLOCK_BITS <= superblock.blkszbits <= layout.MAX_BLOCK_BITS:
            raise UnsupportedFeature("block size", got=f"2^{superblock.blkszbits}")
        unknown = superblock.feature_incompat & ~layout.FEATURE_INCOMPAT_RAFS_V6
        if unknown or superblock.dirblkbits:
            raise UnsupportedFeature("EROFS feature", got=f"incompat {unknown:#x}")
        self.block_size = 1 << superblock.blkszbits
        self.inode_base = superblock.meta_blkaddr * self.block_size

    @property
    def root(self) -> Inode:
        """The root directory; raise `FormatError`."""
        root = self.inode(self.superblock.root_nid)
        if not root.is_dir:
            raise CorruptStructure("the root is not a directory", offset=root.offset)
        return root

    def inode_offset(self, nid: int) -> int:
        """Return the position of an inode in the image."""
        return self.inode_base + layout.SLOT_SIZE * nid

    def inode(self, nid: int) -> Inode:
        """Decode the inode `nid`; raise `FormatError`."""
        return Inode(self, nid)

    def index_granularity(self, inode: Inode) -> int:
        """Return how many bytes of a file one chunk index stands for."""
        return inode.chunk_size

    def file_chunks(self, inode: Inode) -> Iterator[ChunkInfo]:
        """Raise `UnsupportedFeature`: only RAFS has a table of chunks."""
        raise UnsupportedFeature("chunks of an image that is not RAFS", offset=inode.offset)

    @cached_property
    def devices(self) -> tuple[DeviceSlot, ...]:
        """The device table; raise `FormatError`."""
        start = self.superblock.devt_slotoff * layout.DEVICE_SLOT_SIZE
        count = self.superblock.extra_devices
        self.view.check(start, count * layout.DEVICE_SLOT_SIZE, "device table")
        return tuple(
            DeviceSlot.parse(self.view, start + number * layout.DEVICE_SLOT_SIZE)
            for number in range(count)
        )


class Bootstrap(Image):
    """A RAFS v6 bootstrap: an EROFS image with blob, chunk and prefetch tables."""

    version = 6

    def __init__(self, source: View, mapping: mmap.mmap | None = None) -> None:
        super().__init__(source, mapping)
        restrict_superblock(self.superblock, source.length)
        self.extended = ExtendedSuperblock.parse(source)
        restrict_extended(self.extended, self.superblock, source.length)
        self.flags = SuperFlags(self.extended.flags & ~rafs.SUPER_FLAGS_RESERVED)
        self.chunk_size = self.extended.chunk_size
        # Whether the blobs are plain tars in 512-byte blocks.
        self.is_tarfs = SuperFlags.TARTFS_MODE in self.flags
        self.blobs = self._blobs()

    def _blobs(self) -> tuple[BlobEntry, ...]:
        start = self.extended.blob_table_offset
        count = self.extended.blob_table_size // rafs.BLOB_ENTRY_SIZE
        if count != self.superblock.extra_devices:
            raise CorruptStructure(
                "blob table and device table differ",
                expected=f"{self.superblock.extra_devices} blobs",
                got=count,
            )
        blobs = []
        for index in range(count):
            offset = start + index * rafs.BLOB_ENTRY_SIZE
            blob = BlobEntry.parse(self.view, offset)
            try:
                restrict_blob(blob, index, self.chunk_size)
                if bool(blob.features & BlobFeatures.TARFS) != self.is_tarfs:
                    raise CorruptStructure("either image or blob is a tar", got=f"{self.flags:#x}")
            except FormatError as error:
                error.add_context(offset=offset, blob=index)
                raise
            blobs.append(blob)
        return tuple(blobs)

    @property
    def inode_count(self) -> int:
        """The number of names that the superblock tells."""
        return self.superblock.inos

    @property
    def tables(self) -> Tables:
        """Where the tables are."""
        extended = self.extended
        return Tables(
            extended.blob_table_offset,
            extended.blob_table_size,
            extended.prefetch_table_offset,
            extended.prefetch_table_size // rafs.PREFETCH_ENTRY_SIZE,
            extended.chunk_table_offset,
            extended.chunk_table_size,
        )

    @property
    def blob_hints(self) -> tuple[BlobHint, ...]:
        """What the device table says of each blob; raise `FormatError`."""
        return tuple(BlobHint(device.mapped_blkaddr) for device in self.devices)

    @property
    def compressor(self) -> rafs.Compressor:
        """The compressor that the build was asked for; each blob has its own value."""
        return next(c for c, flag in rafs.COMPRESSOR_FLAGS.items() if flag in self.flags)

    @property
    def digester(self) -> rafs.Digester:
        """The digest algorithm of the chunks."""
        return next(d for d, flag in rafs.DIGESTER_FLAGS.items() if flag in self.flags)

    def index_granularity(self, inode: Inode) -> int:
        """Return the global chunk size: RAFS keeps one index for each of its own chunks."""
        return self.chunk_size

    @cached_property
    def chunk_infos(self) -> tuple[ChunkInfo, ...]:
        """The chunk info table; raise `FormatError`."""
        table = self.view.slice(
            self.extended.chunk_table_offset, self.extended.chunk_table_size, "chunk table"
        )
        infos = tuple(rafs.iter_chunk_infos(table))
        indexes = list(map(itemgetter(_BLOB_INDEX), infos))
        if max(indexes, default=-1) >= len(self.blobs):
            position = next(n for n, index in enumerate(indexes) if index >= len(self.blobs))
            raise CorruptStructure(
                "chunk of a blob that is not in the table",
                offset=self.extended.chunk_table_offset + position * rafs.CHUNK_INFO_SIZE,
                got=indexes[position],
            )
        return infos

    @cached_property
    def _chunks_by_key(self) -> dict[int, ChunkInfo]:
        return {
            index_key(info.blob_index, info.chunk_index): info
            for info in self.chunk_infos
            if info.chunk_index < rafs.MAX_CHUNKS_PER_BLOB
        }

    def file_chunks(self, inode: Inode) -> Iterator[ChunkInfo]:
        """Yield the chunks of a regular file, in file order; raise `FormatError`.

        They are entries of the chunk table, but for tarfs, where it holds one entry a blob
        (spec 2.5): there they are made from the inode, without a digest.
        """
        if self.is_tarfs:
            yield from self._tar_pieces(inode)
            return
        rest, known, block_size = inode.size, self._chunks_by_key, self.block_size
        for number, (key, block) in enumerate(inode.raw_indexes()):
            info = known.get(key)
            if info is None or info.uncompressed_offset != block * block_size:
                index = list(inode.chunk_indexes())[number]
                raise CorruptStructure(
                    "chunk index without an entry in the chunk table",
                    offset=inode.offset,
                    chunk=number,
                    got=f"blob {index.blob_index}, chunk {index.chunk_index}",
                )
            size = info.uncompressed_size
            if size != min(rest, self.chunk_size):
                raise CorruptStructure(
                    "chunk of the wrong size",
                    offset=inode.offset,
                    chunk=number,
                    expected=min(rest, self.chunk_size),
                    got=size,
                )
            rest -= size
            yield info

    def _tar_pieces(self, inode: Inode) -> Iterator[ChunkInfo]:
        """Yield the pieces of a tar that a file is made of; raise `FormatError`."""
        for number, index in enumerate(inode.chunk_indexes()):
            file_offset = number * self.chunk_size
            size = min(inode.size - file_offset, self.chunk_size)
            offset = index.blkaddr * self.block_size
            if not 0 <= index.blob_index < len(self.blobs):
                raise CorruptStructure(
                    "piece of a tar that is not in the table",
                    offset=inode.offset,
                    chunk=number,
                    got=index.blob_index,
                )
            if offset + size > self.blobs[index.blob_index].uncompressed_size:
                raise CorruptStructure(
                    "file ends behind its tar", offset=inode.offset, chunk=number, got=offset + size
                )
            yield ChunkInfo(
                digest=bytes(DIGEST_SIZE),
                blob_index=index.blob_index,
                flags=0,
                compressed_size=size,
                uncompressed_size=size,
                compressed_offset=offset,
                uncompressed_offset=offset,
                file_offset=file_offset,
                chunk_index=index.chunk_index,
                crc32c=0,
            )

    @cached_property
    def prefetch_nids(self) -> tuple[int, ...]:
        """The prefetch table up to its first zero; raise `FormatError`."""
        offset, size = self.extended.prefetch_table_offset, self.extended.prefetch_table_size
        if not offset or not size:
            return ()
        table = self.view.slice(offset, size, "prefetch table").cast("B")
        nids = [int.from_bytes(table[i : i + 4], "little") for i in range(0, size, 4)]
        return tuple(nids[: nids.index(0)] if 0 in nids else nids)


def open_image(source: Source) -> Image:
    """Open any uncompressed EROFS image from a path (mapped) or from bytes.

    Raises:
        FormatError: not an EROFS image that this reader understands.
        OSError: the path cannot be opened.
    """
    return open_as(Image, source)


def open_bootstrap(source: Source) -> Bootstrap:
    """Open a RAFS v6 bootstrap from a path (mapped) or from bytes.

    Raises:
        FormatError: not a RAFS v6 bootstrap, or one that strict readers refuse.
        OSError: the path cannot be opened.
    """
    return open_as(Bootstrap, source)
