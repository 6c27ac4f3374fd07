"""Check images: what strict readers and the kernel insist on and the lazy reader does not.

Findings are values, not exceptions: a check goes on where it can. Data blobs are checked
in `erofs.blobcheck`.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from erofs import layout
from erofs.blobmeta import CI_ALIGNMENT, chunk_data_size
from erofs.errors import NydusError
from erofs.findings import ERROR, WARNING, Collector, Finding
from erofs.rafs import CHUNK_INFO_SIZE, BlobEntry, BlobFeatures, ChunkFlags, ChunkInfo
from erofs.rafs import SuperFlags as Flags
from erofs.reader import Bootstrap, DirectoryEntry, Image, Inode
from erofs.v5.check import check_v5
from erofs.v5.image import BootstrapV5
from erofs.view import align_up

__all__ = ["ERROR", "WARNING", "Collector", "Finding", "check_image"]

_DICTIONARY_NAME = b"chunkdict"
_DOTS = frozenset((b".", b".."))
_KIND_MASK = stat.S_IFMT(0xFFFF)
_ENCODED = int(ChunkFlags.COMPRESSED | ChunkFlags.ENCRYPTED | ChunkFlags.BATCH)


class _Links(NamedTuple):
    """What an inode says about its links, and its first path."""

    path: bytes
    nlink: int
    is_dir: bool


class _TreeCheck:
    """Walks the tree once; every inode is decoded once, whatever its number of names."""

    def __init__(
        self, image: Image, out: Collector, progress: Callable[[int], None] | None
    ) -> None:
        self.image = image
        self._progress = progress
        self.out = out
        self.links: dict[int, _Links] = {}
        # Of inodes that have one more than their first; all of them together; of directories.
        self.more_names: dict[int, int] = {}
        self.names = 0
        self.subdirectories: Counter[int] = Counter()
        self.has_xattr = False
        self._claimed = 0
        self._is_bootstrap = isinstance(image, Bootstrap)
        self._with_chunks: Bootstrap | None = None

    def run(self) -> Iterator[Finding]:
        image, root = self.image, self.image.root
        if isinstance(image, Bootstrap) and not _is_dictionary(image):
            self._with_chunks = image
        self.names = 1
        stack = []
        if self._inode(b"/", root):
            stack.append((b"/", root, root.nid))
        while stack:
            path, directory, parent = stack.pop()
            prefix = path if path == b"/" else path + b"/"
            children, before = [], self.names
            for entry in self._entries(path, directory, parent):
                name = prefix + entry.name
                child = self._child(name, directory, entry)
                if child is not None:
                    children.append((name, child, directory.nid))
            stack.extend(reversed(children))
            if self._progress is not None:
                self._progress(self.names - before)
            yield from self.out.drain()
            if self._claimed > self.image.view.length:
                # Without overlaps, the sum of all parts is below the whole: this bounds the work.
                self.out.error("inodes claim more bytes than the image has, the walk stops here")
                return
        self._check_links()

    def _entries(self, path: bytes, directory: Inode, parent: int) -> Iterator[DirectoryEntry]:
        """Yield the entries of a directory without `.` and `..`, which are checked."""
        out = self.out
        previous = b""
        dots = {b".": directory.nid, b"..": parent}
        with out.guard(path):
            for entry in directory.entries():
                name = entry.name
                if name <= previous:
                    if name == previous:
                        out.error(f"name {name!r} twice in the directory", path)
                    else:
                        out.error(f"name {name!r} behind {previous!r}", path)
                previous = name
                if name not in _DOTS:
                    yield entry
                    continue
                expected = dots.pop(name, entry.nid)
                if entry.nid != expected or entry.file_type != layout.FT_DIRECTORY:
                    out.error(
                        f"entry {name!r} is wrong: expected nid {expected}, got {entry.nid}"
                        f" of type {entry.file_type}",
                        path,
                    )
            for name in dots:
                out.error(f"directory without {name!r}", path)

    def _child(self, path: bytes, directory: Inode, entry: DirectoryEntry) -> Inode | None:
        """Check what an entry points to; return it if it is a directory still to be walked."""
        out, nid = self.out, entry.nid
        self.names += 1
        known = self.links.get(nid)
        if known is not None:
            self.more_names[nid] = self.more_names.get(nid, 0) + 1
            if known.is_dir:
                out.error(f"directory met twice, first as {known.path!r}", path)
                return None
        try:
            inode = self.image.inode(nid)
        except NydusError as error:
            out.take(error, path)
            self.subdirectories[directory.nid] += entry.file_type == layout.FT_DIRECTORY
            return None
        expected = layout.FILE_TYPES[inode.mode & _KIND_MASK]
        is_dir = expected == layout.FT_DIRECTORY
        if is_dir:
            self.subdirectories[directory.nid] += 1
        if entry.file_type != expected:
            out.error(f"file type of the entry: expected {expected}, got {entry.file_type}", path)
        if known is not None or not self._inode(path, inode):
            return None
        return inode if is_dir else None

    def _inode(self, path: bytes, inode: Inode) -> bool:
        """Check an inode that is met for the first time; return whether its data is in place."""
        out, kind = self.out, inode.mode & _KIND_MASK
        self.links[inode.nid] = _Links(path, inode.nlink, kind == stat.S_IFDIR)
        self._claimed += inode.record_size + inode.xattr_size
        if inode.mtime_nsec >= 1_000_000_000:
            out.warn(f"impossible nanoseconds {inode.mtime_nsec}", path, inode.offset)
        if inode.xattr_size:
            self._xattrs(path, inode)
        try:
            if kind == stat.S_IFREG:
                self._regular(path, inode)
            elif kind in (stat.S_IFDIR, stat.S_IFLNK):
                inode.flat_parts()
                self._claimed += inode.size
                if kind == stat.S_IFLNK:
                    self._symlink(path, inode)
        except NydusError as error:
            out.take(error, path)
            return False
        return True

    def _symlink(self, path: bytes, inode: Inode) -> None:
        target = inode.readlink()
        if b"\0" in target or inode.size > layout.SYMLINK_MAX:
            self.out.error("symlink target that Linux does not follow", path, inode.offset)

    def _xattrs(self, path: bytes, inode: Inode) -> None:
        seen: set[bytes] = set()
        with self.out.guard(path):
            for offset, name, _ in inode.xattr_entries():
                if name in seen:
                    self.out.error(f"xattr {name!r} twice", path, offset)
                seen.add(name)
        self.has_xattr = self.has_xattr or bool(seen)

    def _regular(self, path: bytes, inode: Inode) -> None:
        image, out = self.image, self.out
        if inode.layout != layout.LAYOUT_CHUNK_BASED:
            if self._is_bootstrap:
                out.error("regular file that is not in chunks", path, inode.offset)
            inode.flat_parts()
            return
        start, count = inode.index_area()
        self._claimed += count * layout.CHUNK_INDEX_SIZE
        known = len(image.devices)
        for number, (key, block) in enumerate(inode.raw_indexes()):
            offset = start + number * layout.CHUNK_INDEX_SIZE
            if block == layout.NULL_BLOCK:
                if self._is_bootstrap:
                    out.error("hole, which nydusd does not know", path, offset)
            elif key >> 16 & 0xFF > known:
                out.error(f"chunk {number}: no device {key >> 16 & 0xFF}", path, offset)
        if count and self._with_chunks is not None:
            self._chunks(path, inode, self._with_chunks)

    def _chunks(self, path: bytes, inode: Inode, image: Bootstrap) -> None:
        """Check a file's chunks against the tables, and what the kernel will make of them."""
        for _ in image.file_chunks(inode):
            pass
        if inode.size <= image.chunk_size or inode.chunk_size == image.chunk_size:
            return
        step = image.chunk_size // image.block_size
        adjacent = all(
            left.blob_index == right.blob_index and left.blkaddr + step == right.blkaddr
            for left, right in pairwise(inode.chunk_indexes())
        )
        if inode.chunk_size < inode.size or not adjacent:
            self.out.error(
                f"Linux takes the chunks for {inode.chunk_size} bytes", path, inode.offset
            )

    def _check_links(self) -> None:
        for nid, (path, nlink, is_dir) in self.links.items():
            expected = 2 + self.subdirectories[nid] if is_dir else 1 + self.more_names.get(nid, 0)
            if nlink != expected:
                self.out.error(f"link count: expected {expected}, got {nlink}", path)


def _is_dictionary(image: Bootstrap) -> bool:
    """Tell whether the files are only lists of chunks, which nobody reads (spec 4.12)."""
    generated = all(blob.features & BlobFeatures.IS_CHUNKDICT_GENERATED for blob in image.blobs)
    if not image.blobs or not generated:
        return False
    names = {entry.name for entry in image.root.entries()} - {b".", b".."}
    return names == {_DICTIONARY_NAME}


def _check_devices(image: Bootstrap, out: Collector) -> None:
    """Compare the device table with the blob table (spec 1.8, 2.4, 7.1)."""
    # The chunk table comes last, also in a disk image that has the blobs behind it.
    end = image.extended.chunk_table_offset + image.extended.chunk_table_size
    taken = [(0, -(-end // image.block_size), "the bootstrap")]
    tags: set[bytes] = set()
    for number, (slot, blob) in enumerate(zip(image.devices, image.blobs, strict=True)):
        offset = layout.DEVICE_TABLE_OFFSET + number * layout.DEVICE_SLOT_SIZE
        tag = slot.tag.rstrip(b"\0")
        if tag != blob.blob_id:
            out.error(f"device tag {tag!r} is not the blob id {blob.blob_id!r}", offset=offset)
        if tag in tags:
            out.error(f"two devices have the tag {tag!r}", offset=offset)
        tags.add(tag)
        if not tag or any(not 0x20 < byte < 0x7F for byte in tag):
            out.error(f"blob id {tag!r} is empty or not printable ASCII", offset=offset)
        blocks = blob.uncompressed_size // image.block_size
        if slot.blocks != blocks or not blocks:
            out.error(f"blocks of the device: expected {blocks}, got {slot.blocks}", offset=offset)
        if slot.mapped_blkaddr:
            end = slot.mapped_blkaddr + slot.blocks
            taken.append((slot.mapped_blkaddr, end, f"device {number + 1}"))
    taken.sort()
    for (_, end, name), (start, _, other) in pairwise(taken):
        if start < end:
            out.error(f"{other} is mapped into {name}, at block {start:#x}")


def _check_superblock(image: Bootstrap, tree: _TreeCheck, out: Collector) -> None:
    superblock = image.superblock
    if superblock.feature_compat & layout.FEATURE_COMPAT_CHECKSUM:
        out.error("superblock with the checksum feature, but RAFS v6 has no checksum")
    blocks = sum(slot.blocks for slot in image.devices)
    if not image.devices and superblock.blocks not in (0, layout.BLOCK_SIZE):
        out.error(f"blocks of an image without blobs: expected 0, got {superblock.blocks}")
    elif superblock.blocks != blocks:
        out.warn(f"blocks of the superblock: expected {blocks}, got {superblock.blocks}")
    names = tree.names
    if superblock.inos != names:
        out.warn(f"number of inodes: expected {names}, got {superblock.inos}")
    if tree.has_xattr and Flags.HAS_XATTR not in image.flags:
        out.error("there are xattrs, but no flag that says so: nydusd will hide them")
    for nid in image.prefetch_nids:
        if nid not in tree.links:
            out.error(f"prefetch table names nid {nid}, which is not in the tree")


class _ChunkLimits(NamedTuple):
    """What the blob of a chunk permits it."""

    chunk_count: int
    uncompressed_end: int
    data_size: int
    is_external: bool
    has_batches: bool


def _limits(blob: BlobEntry) -> _ChunkLimits:
    return _ChunkLimits(
        blob.chunk_count,
        align_up(blob.uncompressed_size, CI_ALIGNMENT),
        chunk_data_size(blob),
        # External chunks have no digests, and lie wherever their blob has them.
        bool(blob.features & BlobFeatures.EXTERNAL),
        bool(blob.features & BlobFeatures.BATCH),
    )


def _check_chunk_info(info: ChunkInfo, limits: _ChunkLimits, chunk_size: int) -> str | None:
    """Return what is wrong with a chunk by itself, if anything."""
    if info.chunk_index >= limits.chunk_count:
        return f"chunk index {info.chunk_index} of a blob with {limits.chunk_count} chunks"
    size, stored_size = info.uncompressed_size, info.compressed_size
    if not 0 < size <= chunk_size:
        return f"impossible chunk size {size}"
    if info.uncompressed_offset + size > limits.uncompressed_end:
        return f"chunk ends behind its blob, at {info.uncompressed_offset + size:#x}"
    if info.compressed_offset + stored_size > limits.data_size:
        return f"chunk data ends behind its blob, at offset {info.compressed_offset:#x}"
    if stored_size != size and not info.flags & _ENCODED:
        in_batch = limits.has_batches and not stored_size
        if not in_batch:
            return "chunk of two sizes that is not compressed"
    return None


def _check_chunk_table(image: Bootstrap, out: Collector) -> None:
    """Check the chunk info table by itself and against the blob table (spec 2.5, 4.3)."""
    start = image.extended.chunk_table_offset
    by_blob: dict[int, list[ChunkInfo]] = {}
    previous: tuple[bytes, int, int] | None = None
    limits = [_limits(blob) for blob in image.blobs]
    chunk_size = image.chunk_size
    for number, info in enumerate(image.chunk_infos):
        of_blob = limits[info.blob_index]
        key = (info.digest, info.blob_index, info.chunk_index if of_blob.is_external else -1)
        if previous is not None and key <= previous:
            out.error(
                "chunk table is not sorted, or has a chunk twice",
                offset=start + number * CHUNK_INFO_SIZE,
            )
        previous = key
        wrong = _check_chunk_info(info, of_blob, chunk_size)
        if wrong is not None:
            out.error(wrong, offset=start + number * CHUNK_INFO_SIZE)
        if not of_blob.is_external:
            by_blob.setdefault(info.blob_index, []).append(info)
    for index, infos in sorted(by_blob.items()):
        _check_adjacent(index, image.blobs[index], infos, out)


def _check_adjacent(index: int, blob: BlobEntry, infos: list[ChunkInfo], out: Collector) -> None:
    infos.sort(key=attrgetter("chunk_index"))
    last = None
    end = 0
    for info in infos:
        number, offset = info.chunk_index, info.uncompressed_offset
        if last == number:
            out.error(f"blob {index}: two entries for chunk {number}")
        elif last is not None and (offset < end or (last + 1 == number and offset != end)):
            out.error(
                f"blob {index}: chunk {number} at {offset:#x}"
                f" does not follow chunk {last}, which ends at {end:#x}"
            )
        last = number
        end = align_up(offset + info.uncompressed_size, CI_ALIGNMENT)
    if len(infos) == blob.chunk_count and infos[0].uncompressed_offset:
        out.error(f"blob {index}: its first chunk is not at 0")


def _check_blobs(image: Bootstrap, out: Collector) -> None:
    for index, blob in enumerate(image.blobs):
        if not blob.chunk_count and not image.is_tarfs:
            out.error(f"blob {index} has no chunks")


def check_image(
    image: Image | BootstrapV5, progress: Callable[[int], None] | None = None
) -> Iterator[Finding]:
    """Yield what is wrong with an image; nothing means that strict readers take it.

    The whole tree is decoded: names, types, link counts, xattrs, symlinks, chunk indexes,
    and for a bootstrap the tables against each other (spec rafs-v6 7.1, 7.2). Memory is
    in proportion to the number of inodes, and work to the length of the image. Errors that
    the reader raises become findings. What is checked of RAFS v5, `check_v5` tells. `progress`
    is called with the number of names of each directory.
    """
    if isinstance(image, BootstrapV5):
        yield from check_v5(image, progress)
        return
    out = Collector(ERROR if isinstance(image, Bootstrap) else WARNING)
    if not image.superblock.root_nid:
        out.error("the root has nid 0, which Linux refuses")
    tree = _TreeCheck(image, out, progress)
    with out.guard():
        yield from tree.run()
    if isinstance(image, Bootstrap):
        with out.guard():
            _check_superblock(image, tree, out)
        with out.guard():
            _check_devices(image, out)
        _check_blobs(image, out)
        if not image.is_tarfs:
            with out.guard():
                _check_chunk_table(image, out)
    yield from out.drain()
