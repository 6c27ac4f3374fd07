"""From an image back to a tree in memory, which can be changed and written again."""

from __future__ import annotations

from collections.abc import Sequence

from erofs.errors import CorruptStructure, NydusError
from erofs.opening import AnyBootstrap, AnyInode
from erofs.rafs import ChunkInfo
from erofs.tree import Chunk, Node

__all__ = ["load_nodes", "load_tree"]

_Chunks = dict[tuple[int, int, int], Chunk]
_DOTS = frozenset((b".", b".."))


def _node(inode: AnyInode, chunks: _Chunks, numbers: Sequence[int] | None) -> Node:
    node = Node(
        inode.mode, inode.uid, inode.gid, inode.mtime, inode.mtime_nsec, inode.rdev,
        xattrs=inode.xattrs(),
    )  # fmt: skip
    if inode.is_regular:
        node.size = inode.size
        if node.size:
            node.chunks = [_chunk(info, chunks, numbers) for info in inode.file_chunks()]
    elif inode.is_dir:
        node.children = {}
    elif inode.is_symlink:
        node.target = inode.readlink()
    return node


def _chunk(info: ChunkInfo, chunks: _Chunks, numbers: Sequence[int] | None) -> Chunk:
    # The earliest v5 images have no chunk index; batched chunks share their offset.
    key = (info.blob_index, info.chunk_index, info.compressed_offset)
    chunk = chunks.get(key)
    if chunk is None:
        chunk = chunks[key] = Chunk(*info)
        if numbers is not None:
            chunk.blob_index = numbers[info.blob_index]
    return chunk


def load_nodes(image: AnyBootstrap, numbers: Sequence[int] | None = None) -> dict[int, Node]:
    """Read the whole tree and return its nodes by inode number, the root first.

    Names of one inode share a node, references of a chunk a `Chunk`. With `numbers` chunks
    get other blob indexes: each the item of the index that the image has.

    Raises:
        FormatError: the bootstrap is broken, or a directory has two names.
    """
    chunks: _Chunks = {}
    top = image.root
    nodes = {top.nid: _node(top, chunks, numbers)}
    stack: list[tuple[AnyInode, bytes]] = [(top, b"")]
    claimed = top.claimed_bytes
    while stack:
        inode, path = stack.pop()
        entries = nodes[inode.nid].entries
        for name, nid, _ in inode.entries():
            if name in _DOTS:
                continue
            try:
                if name in entries:
                    raise CorruptStructure("name twice in a directory", offset=inode.offset)
                node = nodes.get(nid)
                if node is None:
                    child = image.inode(nid)
                    claimed += child.claimed_bytes
                    if claimed > image.view.length:
                        raise CorruptStructure("inodes share their data", offset=child.offset)
                    node = nodes[nid] = _node(child, chunks, numbers)
                    if node.children is not None:
                        stack.append((child, path + b"/" + name))
                elif node.children is not None:
                    raise CorruptStructure("directory met twice", offset=inode.offset)
            except NydusError as error:
                error.add_context(entry=path + b"/" + name)
                raise
            entries[name] = node
    return nodes


def load_tree(image: AnyBootstrap, numbers: Sequence[int] | None = None) -> Node:
    """Read the whole tree and return its root; everything else as `load_nodes`."""
    return next(iter(load_nodes(image, numbers).values()))
