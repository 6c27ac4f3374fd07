"""Read EROFS images lazily, and RAFS v6 bootstraps as the narrower profile.

`open_image` takes any uncompressed EROFS image; `open_bootstrap` then insists on what
RAFS v6 promises (spec rafs-v6 section 7.1). Everything is decoded when it is asked for,
from an mmap, by explicit offsets, so images may be shared between threads.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from erofs import layout, rafs
from erofs.errors import (
    BadMagic,
    CorruptStructure,
    FormatError,
    OutOfBounds,
    UnsupportedFeature,
)
from erofs.layout import (
    ChunkIndex,
    DeviceSlot,
    Dirent,
    InodeCompact,
    InodeExtended,
    Superblock,
    XattrEntry,
    XattrHeader,
)
from erofs.rafs import BlobEntry, BlobFeatures, ChunkInfo, ExtendedSuperblock, SuperFlags
from erofs.view import View, align_up

__all__ = ["Bootstrap", "DirectoryEntry", "Image", "Inode", "open_bootstrap", "open_image"]

_FLAT = (layout.LAYOUT_FLAT_PLAIN, layout.LAYOUT_FLAT_INLINE)
_XATTR_NAMES = dict(layout.XATTR_PREFIXES)
_Source = Path | str | bytes | bytearray | memoryview
_T = TypeVar("_T", bound="Image")


class DirectoryEntry(NamedTuple):
    """A name in a directory; `file_type` is one of `layout.FT_*`."""

    name: bytes
    nid: int
    file_type: int


class Inode:
    """A view of one inode; `mtime` in signed seconds, `rdev` in Linux' "new" encoding."""

    __slots__ = (
        "gid", "image", "ino", "layout", "mode", "mtime", "mtime_nsec", "nid", "nlink",
        "offset", "record_size", "size", "uid", "union", "xattr_size",
    )  # fmt: skip

    def __init__(self, image: Image, nid: int) -> None:
        view = image.view
        self.image = image
        self.nid = nid
        self.offset = offset = image.inode_offset(nid)
        format_bits = view.slice(offset, 2, "inode")[0] | view.data[offset + 1] << 8
        if format_bits >> 4:
            raise UnsupportedFeature(
                "inode format with unknown bits", offset=offset, got=f"{format_bits:#x}"
            )
        self.layout = format_bits >> 1 & 7
        if format_bits & 1:
            extended = InodeExtended.parse(view, offset)
            self.record_size = layout.INODE_EXTENDED_SIZE
            self.mtime = _signed(extended.i_mtime)
            self.mtime_nsec = extended.i_mtime_nsec
            icount = extended.i_xattr_icount
            self.mode, self.size, self.union = extended.i_mode, extended.i_size, extended.i_u
            self.ino, self.nlink = extended.i_ino, extended.i_nlink
            self.uid, self.gid = extended.i_uid, extended.i_gid
        else:
            compact = InodeCompact.parse(view, offset)
            self.record_size = layout.INODE_COMPACT_SIZE
            self.mtime = _signed(image.superblock.build_time)
            self.mtime_nsec = image.superblock.build_time_nsec
            icount = compact.i_xattr_icount
            self.mode, self.size, self.union = compact.i_mode, compact.i_size, compact.i_u
            self.ino, self.nlink = compact.i_ino, compact.i_nlink
            self.uid, self.gid = compact.i_uid, compact.i_gid
        self.xattr_size = layout.XATTR_HEADER_SIZE + 4 * (icount - 1) if icount else 0
        self._check()

    def _check(self) -> None:
        kind = stat.S_IFMT(self.mode)
        if kind not in layout.FILE_TYPES:
            raise CorruptStructure(
                "inode of unknown type", offset=self.offset, got=f"mode {self.mode:o}"
            )
        if self.size >> 63:
            raise CorruptStructure("negative file size", offset=self.offset, got=self.size)
        if self.layout not in (*_FLAT, layout.LAYOUT_CHUNK_BASED):
            raise UnsupportedFeature(
                "compressed EROFS inode", offset=self.offset, got=f"layout {self.layout}"
            )
        if kind in (stat.S_IFDIR, stat.S_IFLNK) and self.layout not in _FLAT:
            raise CorruptStructure("directory or symlink in chunks", offset=self.offset)
        self.image.view.check(self.body_offset, 0, "inode body")

    @property
    def body_offset(self) -> int:
        """Where inline data or chunk indexes begin, before their alignment."""
        return self.offset + self.record_size + self.xattr_size

    @property
    def is_dir(self) -> bool:
        """Whether the inode is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        """Whether the inode is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether the inode is a symbolic link."""
        return stat.S_ISLNK(self.mode)

    @property
    def rdev(self) -> int:
        """Device number of a character or block device, 0 for all else."""
        return self.union if stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode) else 0

    def flat_parts(self) -> list[tuple[int, int]]:
        """Return (offset, length) of the pieces of a flat inode's data, in order."""
        if self.layout not in _FLAT:
            raise UnsupportedFeature("data is not flat", offset=self.offset)
        view, block_size = self.image.view, self.image.block_size
        tail = self.size % block_size if self.layout == layout.LAYOUT_FLAT_INLINE else 0
        parts = []
        if self.size - tail:
            start = self.union * block_size
            view.check(start, self.size - tail, "flat data")
            parts.append((start, self.size - tail))
        if tail:
            if self.body_offset % block_size + tail > block_size:
                raise CorruptStructure("inline data crosses a block", offset=self.body_offset)
            view.check(self.body_offset, tail, "inline data")
            parts.append((self.body_offset, tail))
        return parts

    def flat_data(self) -> bytes:
        """Return the whole content of a flat inode; raise `FormatError`."""
        data = self.image.view.data
        return b"".join(data[start : start + length] for start, length in self.flat_parts())

    def readlink(self) -> bytes:
        """Return the target of a symbolic link; raise `FormatError`."""
        if not self.is_symlink:
            raise CorruptStructure("not a symbolic link", offset=self.offset)
        if not 0 < self.size <= layout.BLOCK_SIZE:
            raise CorruptStructure(
                "impossible length of a symlink", offset=self.offset, got=self.size
            )
        return self.flat_data()

    def blocks(self) -> Iterator[tuple[int, memoryview]]:
        """Yield (offset, bytes) of each block of a directory."""
        data, block_size = self.image.view.data, self.image.block_size
        for start, length in self.flat_parts():
            for position in range(start, start + length, block_size):
                end = min(position + block_size, start + length)
                yield position, data[position:end]

    def entries(self) -> Iterator[DirectoryEntry]:
        """Yield the entries of a directory, `.` and `..` included; raise `FormatError`."""
        if not self.is_dir:
            raise CorruptStructure("not a directory", offset=self.offset)
        for offset, block in self.blocks():
            yield from _parse_directory_block(block, offset)

    def lookup(self, name: bytes) -> DirectoryEntry | None:
        """Return the entry called `name`, if there is one; raise `FormatError`."""
        if not self.is_dir:
            return None
        found: tuple[int, memoryview] | None = None
        # Names ascend across blocks, so the last block that does not begin behind the name has it.
        blocks = list(self.blocks())
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            first = next(_parse_directory_block(blocks[middle][1], blocks[middle][0]), None)
            if first is not None and first.name <= name:
                found, low = blocks[middle], middle + 1
            else:
                high = middle
        if found is None:
            return None
        entries = _parse_directory_block(found[1], found[0])
        return next((entry for entry in entries if entry.name == name), None)

    def xattr_entries(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield (offset, full name, value) of each inline xattr; raise `FormatError`."""
        if not self.xattr_size:
            return
        view = self.image.view
        position = self.offset + self.record_size
        end = position + self.xattr_size
        header = XattrHeader.parse(view, position)
        if header.shared_count:
            raise UnsupportedFeature("shared xattrs", offset=position)
        if self.xattr_size == layout.XATTR_HEADER_SIZE:
            raise CorruptStructure("xattr area without an entry", offset=position)
        position += layout.XATTR_HEADER_SIZE
        while position < end:
            entry = XattrEntry.parse(view, position)
            size = layout.XATTR_ENTRY_SIZE + entry.name_len + entry.value_size
            if position + size > end:
                raise OutOfBounds("xattr entry outside of its area", offset=position, got=size)
            prefix = _XATTR_NAMES.get(entry.name_index)
            if prefix is None:
                raise CorruptStructure(
                    "unknown xattr name index", offset=position, got=entry.name_index
                )
            body = view.slice(position + layout.XATTR_ENTRY_SIZE, size - 4, "xattr entry")
            name = prefix + bytes(body[: entry.name_len])
            yield position, name, bytes(body[entry.name_len :])
            position += align_up(size, 4)

    def xattrs(self) -> dict[bytes, bytes]:
        """Return all xattrs by full name; raise `FormatError`."""
        return {name: value for _, name, value in self.xattr_entries()}

    @property
    def chunk_size(self) -> int:
        """The chunk size that the kernel uses for this file, in bytes."""
        self._check_chunk_format()
        return self.image.block_size << (self.union & layout.CHUNK_FORMAT_BITS_MASK)

    def _check_chunk_format(self) -> None:
        if self.layout != layout.LAYOUT_CHUNK_BASED:
            raise UnsupportedFeature("file is not in chunks", offset=self.offset)
        if self.union & 0xFFFF & ~layout.CHUNK_FORMAT_KNOWN:
            raise UnsupportedFeature(
                "unknown chunk format", offset=self.offset, got=f"{self.union & 0xFFFF:#x}"
            )
        if not self.union & layout.CHUNK_FORMAT_INDEXES:
            raise UnsupportedFeature("chunk map without device ids", offset=self.offset)

    def index_area(self) -> tuple[int, int]:
        """Return (offset, number) of the chunk indexes; raise `FormatError`."""
        self._check_chunk_format()
        start = align_up(self.body_offset, layout.CHUNK_INDEX_SIZE)
        count = -(-self.size // self.image.index_granularity(self))
        self.image.view.check(start, count * layout.CHUNK_INDEX_SIZE, "chunk indexes")
        return start, count

    def chunk_indexes(self) -> Iterator[ChunkIndex]:
        """Yield the chunk indexes of a regular file; raise `FormatError`."""
        start, count = self.index_area()
        for position in range(start, start + count * 8, layout.CHUNK_INDEX_SIZE):
            yield ChunkIndex.parse(self.image.view, position)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _parse_directory_block(block: memoryview, offset: int) -> Iterator[DirectoryEntry]:
    view = View(block)
    first = Dirent.parse(view, 0)
    count, rest = divmod(first.nameoff, layout.DIRENT_SIZE)
    if rest or not count or first.nameoff > len(block):
        raise CorruptStructure("impossible start of the names", offset=offset, got=first.nameoff)
    current = first
    for number in range(count):
        last = number + 1 == count
        following = None if last else Dirent.parse(view, (number + 1) * layout.DIRENT_SIZE)
        end = len(block) if following is None else following.nameoff
        if not first.nameoff <= current.nameoff <= end <= len(block):
            raise CorruptStructure("names of a directory out of order", offset=offset, got=end)
        name = bytes(block[current.nameoff : end])
        if following is None:
            name = name.split(b"\0", 1)[0]
        if not 0 < len(name) <= layout.NAME_MAX or b"/" in name or b"\0" in name:
            raise CorruptStructure("impossible file name", offset=offset, got=name[:64])
        yield DirectoryEntry(name, current.nid, current.file_type)
        if following is not None:
            current = following


class Image:
    """An EROFS image; a context manager that closes the mapping it was opened with.

    Raises:
        FormatError: the superblock is not one that this reader understands.
    """

    def __init__(self, source: View, mapping: mmap.mmap | None = None) -> None:
        self.view = source
        self._mapping = mapping
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

    @property
    def root(self) -> Inode:
        """The root directory; raise `FormatError`."""
        root = self.inode(self.superblock.root_nid)
        if not root.is_dir:
            raise CorruptStructure("the root is not a directory", offset=root.offset)
        return root

    def inode_offset(self, nid: int) -> int:
        """Return the position of an inode in the image."""
        return self.superblock.meta_blkaddr * self.block_size + layout.SLOT_SIZE * nid

    def inode(self, nid: int) -> Inode:
        """Decode the inode `nid`; raise `FormatError`."""
        return Inode(self, nid)

    def index_granularity(self, inode: Inode) -> int:
        """Return how many bytes of a file one chunk index stands for."""
        return inode.chunk_size

    def lookup(self, path: bytes) -> Inode | None:
        """Return the inode at an absolute path, without following symlinks; raise `FormatError`."""
        inode = self.root
        for name in path.split(b"/"):
            if name in (b"", b"."):
                continue
            entry = inode.lookup(name)
            if entry is None:
                return None
            inode = self.inode(entry.nid)
        return inode

    def walk(self) -> Iterator[tuple[bytes, Inode]]:
        """Yield (path, inode) of every name, depth first, parents before children.

        Raises:
            CorruptStructure: a directory is met twice, so the tree has a loop, or directories
                share their data, so walking them would take far longer than the image is.
        """
        seen = {self.superblock.root_nid}
        claimed = 0
        stack = [(b"/", self.root)]
        while stack:
            path, inode = stack.pop()
            yield path, inode
            if not inode.is_dir:
                continue
            claimed += inode.size
            if claimed > self.view.length:
                raise CorruptStructure("directories share their data", entry=path)
            prefix = path if path == b"/" else path + b"/"
            children = []
            for entry in inode.entries():
                if entry.name in (b".", b".."):
                    continue
                child = self.inode(entry.nid)
                if child.is_dir:
                    if entry.nid in seen:
                        raise CorruptStructure("directory met twice", entry=prefix + entry.name)
                    seen.add(entry.nid)
                children.append((prefix + entry.name, child))
            stack.extend(reversed(children))

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

    def close(self) -> None:
        """Release the mapping; inodes must not be used afterwards."""
        if self._mapping is not None:
            self.view.data.release()
            self._mapping.close()
            self._mapping = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Bootstrap(Image):
    """A RAFS v6 bootstrap: an EROFS image with blob, chunk and prefetch tables."""

    def __init__(self, source: View, mapping: mmap.mmap | None = None) -> None:
        super().__init__(source, mapping)
        _restrict_superblock(self.superblock, source.length)
        self.extended = ExtendedSuperblock.parse(source)
        _restrict_extended(self.extended, self.superblock, source.length)
        self.flags = SuperFlags(self.extended.flags & ~rafs.SUPER_FLAGS_RESERVED)
        self.chunk_size = self.extended.chunk_size
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
                _restrict_blob(blob, index, self.chunk_size)
            except FormatError as error:
                error.add_context(offset=offset, blob=index)
                raise
            blobs.append(blob)
        return tuple(blobs)

    @property
    def is_tarfs(self) -> bool:
        """Whether the blobs are plain tars in 512-byte blocks."""
        return SuperFlags.TARTFS_MODE in self.flags

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
        for position, info in enumerate(infos):
            if info.blob_index >= len(self.blobs):
                raise CorruptStructure(
                    "chunk of a blob that is not in the table",
                    offset=self.extended.chunk_table_offset + position * rafs.CHUNK_INFO_SIZE,
                    got=info.blob_index,
                )
        return infos

    @cached_property
    def _chunks_by_place(self) -> dict[tuple[int, int], ChunkInfo]:
        return {(info.blob_index, info.chunk_index): info for info in self.chunk_infos}

    def file_chunks(self, inode: Inode) -> Iterator[ChunkInfo]:
        """Yield the chunk table entries of a regular file, in file order; raise `FormatError`."""
        rest = inode.size
        for number, index in enumerate(inode.chunk_indexes()):
            info = self._chunks_by_place.get((index.blob_index, index.chunk_index))
            if info is None or info.uncompressed_offset != index.blkaddr * self.block_size:
                raise CorruptStructure(
                    "chunk index without an entry in the chunk table",
                    offset=inode.offset,
                    chunk=number,
                    got=f"blob {index.blob_index}, chunk {index.chunk_index}",
                )
            if info.uncompressed_size != min(rest, self.chunk_size):
                raise CorruptStructure(
                    "chunk of the wrong size",
                    offset=inode.offset,
                    chunk=number,
                    expected=min(rest, self.chunk_size),
                    got=info.uncompressed_size,
                )
            rest -= info.uncompressed_size
            yield info

    @cached_property
    def prefetch_nids(self) -> tuple[int, ...]:
        """The prefetch table up to its first zero; raise `FormatError`."""
        offset, size = self.extended.prefetch_table_offset, self.extended.prefetch_table_size
        if not offset or not size:
            return ()
        table = self.view.slice(offset, size, "prefetch table").cast("B")
        nids = [int.from_bytes(table[i : i + 4], "little") for i in range(0, size, 4)]
        return tuple(nids[: nids.index(0)] if 0 in nids else nids)


def _restrict_superblock(superblock: Superblock, length: int) -> None:
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


def _restrict_extended(extended: ExtendedSuperblock, superblock: Superblock, length: int) -> None:
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


def _restrict_blob(blob: BlobEntry, index: int, chunk_size: int) -> None:
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
    _restrict_compression_table(blob)


def _restrict_compression_table(blob: BlobEntry) -> None:
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


def _view(source: _Source) -> tuple[View, mmap.mmap | None]:
    if not isinstance(source, Path | str):
        return View(source), None
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Block devices have no st_size; seeking to their end tells it.
        if os.lseek(descriptor, 0, os.SEEK_END) == 0:
            return View(b""), None
        mapping = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    return View(mapping), mapping


def open_image(source: _Source) -> Image:
    """Open any uncompressed EROFS image from a path (mapped) or from bytes.

    Raises:
        FormatError: not an EROFS image that this reader understands.
        OSError: the path cannot be opened.
    """
    return _open(Image, source)


def open_bootstrap(source: _Source) -> Bootstrap:
    """Open a RAFS v6 bootstrap from a path (mapped) or from bytes.

    Raises:
        FormatError: not a RAFS v6 bootstrap, or one that strict readers refuse.
        OSError: the path cannot be opened.
    """
    return _open(Bootstrap, source)


def _open(kind: type[_T], source: _Source) -> _T:
    view, mapping = _view(source)
    try:
        return kind(view, mapping)
    except FormatError as error:
        if isinstance(source, Path | str):
            error.add_context(path=source)
        if mapping is not None:
            view.data.release()
            mapping.close()
        raise
