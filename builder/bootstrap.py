"""From a bootstrap back to a tree, for merging and unpacking."""

from __future__ import annotations

import os
from pathlib import Path

from erofs import Bootstrap, Chunk, CorruptStructure, Inode, Node, codec, open_bootstrap
from erofs.blobmeta import SECTION_BOOTSTRAP, TOC_ZSTD, read_toc
from erofs.errors import BadMagic, FormatError, error_context
from erofs.rafs import INLINED_BLOB_ID, Compressor
from erofs.view import View

__all__ = ["blob_ids", "inlined_bootstrap", "load_tree", "open_any_bootstrap"]

_BOOTSTRAP_MAX = 1 << 32


def _node(image: Bootstrap, inode: Inode, chunks: dict[tuple[int, int], Chunk]) -> Node:
    node = Node(
        mode=inode.mode,
        uid=inode.uid,
        gid=inode.gid,
        mtime=inode.mtime,
        mtime_nsec=inode.mtime_nsec,
        rdev=inode.rdev,
        xattrs=inode.xattrs(),
        children={} if inode.is_dir else None,
    )
    if inode.is_symlink:
        node.target = inode.readlink()
    elif inode.is_regular:
        node.size = inode.size
        for info in image.file_chunks(inode):
            key = (info.blob_index, info.chunk_index)
            chunk = chunks.get(key)
            if chunk is None:
                chunk = chunks[key] = Chunk.from_info(info)
            node.chunks.append(chunk)
    return node


def load_tree(image: Bootstrap) -> Node:
    """Read the whole tree; names of one inode share a node, references of a chunk a `Chunk`.

    Raises:
        FormatError: the bootstrap is broken, or a directory has two names.
    """
    chunks: dict[tuple[int, int], Chunk] = {}
    nodes: dict[int, Node] = {}
    root = _node(image, image.root, chunks)
    nodes[image.superblock.root_nid] = root
    stack = [(image.root, root, b"")]
    while stack:
        inode, directory, path = stack.pop()
        for entry in inode.entries():
            if entry.name in (b".", b".."):
                continue
            name = path + b"/" + entry.name
            with error_context(entry=name):
                if entry.name in directory.entries:
                    raise CorruptStructure("name twice in a directory", offset=inode.offset)
                node = nodes.get(entry.nid)
                if node is None:
                    child = image.inode(entry.nid)
                    node = nodes[entry.nid] = _node(image, child, chunks)
                    if child.is_dir:
                        stack.append((child, node, name))
                elif node.is_dir:
                    raise CorruptStructure("directory met twice", offset=inode.offset)
            directory.entries[entry.name] = node
    return root


class _File:
    """A file as `ReadAt`, without a mapping."""

    def __init__(self, path: Path) -> None:
        self._data = path.open("rb", buffering=0)

    def size(self) -> int:
        return os.fstat(self._data.fileno()).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        data = os.pread(self._data.fileno(), length, offset)
        View(data).check(0, length, "blob")
        return data

    def close(self) -> None:
        self._data.close()


def inlined_bootstrap(path: Path) -> bytes | None:
    """Return the bootstrap inside of a blob with inlined metadata, None when it has none.

    Raises:
        CodecError: it is there, but broken.
        OSError: the file cannot be read.
    """
    blob = _File(path)
    try:
        toc = read_toc(blob)
        entry = toc.find(SECTION_BOOTSTRAP)
        if entry is None or entry.uncompressed_size > _BOOTSTRAP_MAX:
            return None
        data = blob.read_at(entry.offset, entry.compressed_size)
    except FormatError:
        return None
    finally:
        blob.close()
    if entry.flags & TOC_ZSTD:
        return codec.decompress(Compressor.ZSTD, data, entry.uncompressed_size)
    return data


def open_any_bootstrap(path: Path, *, inlined: bool = False) -> Bootstrap:
    """Open a bootstrap file, or with `inlined` also a blob that carries one.

    Raises:
        FormatError: neither; the first reason is the one that is told.
        OSError: the file cannot be opened.
    """
    try:
        return open_bootstrap(path)
    except BadMagic:
        data = inlined_bootstrap(path) if inlined else None
        if data is None:
            raise
    with error_context(path=path):
        return open_bootstrap(data)


def blob_ids(image: Bootstrap, path: Path) -> list[str]:
    """Return the ids under which the blobs are stored, in table order.

    A bootstrap from inside of a blob does not know that blob's id: the name of the file
    that it was read from stands for it, up to the first dot (spec rafs-v6 4.7).
    """
    own = path.name.split(".", 1)[0]
    return [own if blob.blob_id == INLINED_BLOB_ID else blob.id for blob in image.blobs]
