"""Check RAFS v5 bootstraps: what the original and its daemon insist on.

Chunk digests are promises about blobs, so only their own digest, the inode's, is verified
here; `builder.datacheck` verifies the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from erofs import layout
from erofs.digest import digest
from erofs.findings import Collector, Finding
from erofs.rafs import BlobEntry, ChunkFlags, ChunkInfo, SuperFlags
from erofs.v5.image import BootstrapV5
from erofs.v5.inode import InodeV5, digest_input, same_inode
from erofs.v5.layout import ROOT_INO

__all__ = ["check_v5"]

_KNOWN_CHUNK_FLAGS = ChunkFlags.COMPRESSED | ChunkFlags.HAS_CRC


class _TreeCheckV5:
    """Walks the tree once, and every place of the inode table at most once."""

    def __init__(
        self, image: BootstrapV5, out: Collector, progress: Callable[[int], None] | None
    ) -> None:
        self.image = image
        self._progress = progress
        self.out = out
        self.seen = bytearray(image.name_count + 1)
        self.names: Counter[int] = Counter()
        self.nlinks: dict[int, tuple[bytes, int, bool]] = {}
        self.subdirectories: Counter[int] = Counter()
        self.has_xattr = False
        self._claimed = 0

    def run(self) -> Iterator[Finding]:
        """Yield what is wrong with directories and inodes."""
        root = self.image.root
        self.seen[ROOT_INO] = 1
        self._inode(b"/", root)
        stack = [(b"/", root)]
        while stack:
            path, directory = stack.pop()
            children, names = [], 0
            for name, child in self._children(path, directory):
                self._inode(name, child)
                names += 1
                if child.is_dir:
                    self.subdirectories[directory.nid] += 1
                    children.append((name, child))
            stack.extend(reversed(children))
            if self._progress is not None:
                self._progress(names)
            yield from self.out.drain()
            if self._claimed > self.image.view.length:
                # Records do not overlap: this bounds the work.
                self.out.error("inodes claim more bytes than the image has, the walk stops here")
                return
        self._check_links()

    def _children(self, path: bytes, directory: InodeV5) -> Iterator[tuple[bytes, InodeV5]]:
        out = self.out
        prefix = path if path == b"/" else path + b"/"
        previous = b""
        for index in directory.child_indexes():
            if self.seen[index]:
                out.error("directory shares its entries with another one", path, directory.offset)
                return
            self.seen[index] = 1
            with out.guard(path):
                child = InodeV5(self.image, index)
                name = child.entry().name
                if name == previous:
                    out.error(f"name {name!r} twice in the directory", path)
                elif name < previous:
                    out.error(f"name {name!r} behind {previous!r}", path)
                previous = name
                if child.record.parent != directory.nid:
                    out.error(
                        f"parent: expected {directory.nid}, got {child.record.parent}",
                        prefix + name,
                        child.offset,
                    )
                yield prefix + name, child

    def _inode(self, path: bytes, inode: InodeV5) -> None:
        out = self.out
        self.names[inode.nid] += 1
        self._claimed += inode.claimed_bytes
        if not inode.nlink:
            out.error("link count of 0", path, inode.offset)
        if inode.mtime_nsec >= 1_000_000_000:
            out.warn(f"impossible nanoseconds {inode.mtime_nsec}", path, inode.offset)
        with out.guard(path):
            expected = digest(self.image.digester, digest_input(inode))
            is_promised = inode.is_regular or inode.is_dir or inode.is_symlink
            if is_promised and expected != inode.digest:
                out.error(
                    f"inode digest: expected {expected.hex()}, got {inode.digest.hex()}",
                    path,
                    inode.offset,
                )
        with out.guard(path):
            if inode.nid != inode.index:
                if not same_inode(inode, self.image.inode(inode.nid)):
                    out.error(f"not the same as inode {inode.nid}", path, inode.offset)
                return
            self.nlinks[inode.nid] = path, inode.nlink, inode.is_dir
            self._xattrs(path, inode)
            if inode.is_symlink:
                self._symlink(path, inode)
            elif inode.is_regular:
                self._chunks(path, inode)

    def _xattrs(self, path: bytes, inode: InodeV5) -> None:
        found: set[bytes] = set()
        for offset, name, _ in inode.xattr_entries():
            if name in found:
                self.out.error(f"xattr {name!r} twice", path, offset)
            found.add(name)
        self.has_xattr = self.has_xattr or bool(found)

    def _symlink(self, path: bytes, inode: InodeV5) -> None:
        target = inode.readlink()
        if b"\0" in target or len(target) > layout.SYMLINK_MAX:
            self.out.error("symlink target that Linux does not follow", path, inode.offset)

    def _chunks(self, path: bytes, inode: InodeV5) -> None:
        for number, info in enumerate(inode.file_chunks()):
            wrong = _check_chunk(info, self.image.blobs[info.blob_index])
            if wrong is not None:
                self.out.error(f"chunk {number}: {wrong}", path, inode.offset)

    def _check_links(self) -> None:
        for nid, (path, nlink, is_dir) in self.nlinks.items():
            expected = 2 + self.subdirectories[nid] if is_dir else self.names[nid]
            # 1 is what file systems say that do not count; early images do not.
            if is_dir and nlink == 1:
                continue
            # Daemons pass it on, and nobody relies on it.
            if nlink != expected:
                self.out.warn(f"link count: expected {expected}, got {nlink}", path)


def _check_chunk(info: ChunkInfo, blob: BlobEntry) -> str | None:
    """Return what is wrong with a chunk, if anything; unknown sizes of a blob are 0."""
    if info.flags & ~_KNOWN_CHUNK_FLAGS:
        return f"unknown flags {info.flags:#x}"
    if not info.compressed_size:
        return "no stored bytes"
    if not info.is_compressed and info.compressed_size != info.uncompressed_size:
        return "two sizes, but not compressed"
    if blob.chunk_count and info.chunk_index >= blob.chunk_count:
        return f"index {info.chunk_index} of a blob with {blob.chunk_count} chunks"
    if blob.compressed_size and info.compressed_offset + info.compressed_size > (
        blob.compressed_size
    ):
        return f"ends behind its blob, stored at {info.compressed_offset:#x}"
    if blob.uncompressed_size and info.uncompressed_offset + info.uncompressed_size > (
        blob.uncompressed_size
    ):
        return f"ends behind its blob, at {info.uncompressed_offset:#x}"
    return None


def _check_tables(image: BootstrapV5, tree: _TreeCheckV5, out: Collector) -> None:
    ids = [blob.blob_id for blob in image.blobs]
    for index, blob_id in enumerate(ids):
        if not blob_id or any(not 0x20 < byte < 0x7F for byte in blob_id):
            out.error(f"blob {index}: id {blob_id!r} is empty or not printable ASCII")
    if len(set(ids)) != len(ids):
        out.error("two blobs have one id")
    inodes = len(tree.names)
    # Builders up to 2.1 do not count the root.
    if image.inode_count not in (inodes, inodes - 1):
        out.warn(f"number of inodes: expected {inodes}, got {image.inode_count}")
    if tree.has_xattr and SuperFlags.HAS_XATTR not in image.flags:
        out.error("there are xattrs, but no flag that says so: nydusd will hide them")
    for nid in image.prefetch_nids:
        if nid not in tree.names:
            out.error(f"prefetch table names inode {nid}, which is not in the tree")


def check_v5(
    image: BootstrapV5, progress: Callable[[int], None] | None = None
) -> Iterator[Finding]:
    """Yield what is wrong with a v5 bootstrap; nothing means that the original takes it.

    The whole tree is decoded: names and their order, parents, links, xattrs, targets, chunks
    against the blob tables, and every inode digest: a file's is that of its chunk digests, a
    directory's that of its children's, so the root's stands for all but names and attributes.
    Memory is in proportion to the number of names. Errors become findings. `progress` is called
    with the number of names of each directory.
    """
    out = Collector()
    tree = _TreeCheckV5(image, out, progress)
    with out.guard():
        yield from tree.run()
    with out.guard():
        _check_tables(image, tree, out)
    yield from out.drain()
