"""From an image back to a tree in memory, which can be changed and written again."""

from __future__ import annotations

from collections.abc import Sequence

from erofs.errors import CorruptStructure, error_context
from erofs.opening import AnyBootstrap, AnyInode
from erofs.tree import Chunk, Node

__all__ = ["load_nodes", "load_tree"]

_Chunks = dict[tuple[int, int, int], Chunk]


def _node(inode: AnyInode, chunks: _Chunks, numbers: Sequence[int] | None) -> Node:
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
        for info in inode.file_chunks():
            # The earliest v5 images have no chunk index; batched chunks share their offset.
            key = (info.blob_index, info.chunk_index, info.compressed_offset)
            chunk = chunks.get(key)
            if chunk is None:
                chunk = chunks[key] = Chunk.from_info(info)
                if numbers is not None:
                    chunk.blob_index = numbers[info.blob_index]
            node.chunks.append(chunk)
    return node


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
        for entry in inode.entries():
            if entry.name in (b".", b".."):
                continue
            name = path + b"/" + entry.name
            with error_context(entry=name):
                if entry.name in entries:
                    raise CorruptStructure("name twice in a directory", offset=inode.offset)
                node = nodes.get(entry.nid)
                if node is None:
                    child = image.inode(entry.nid)
                    claimed += child.claimed_bytes
                    if claimed > image.view.length:
                        raise CorruptStructure("inodes share their data", offset=child.offset)
                    node = nodes[entry.nid] = _node(child, chunks, numbers)
                    if child.is_dir:
                        stack.append((child, name))
                elif node.is_dir:
                    raise CorruptStructure("directory met twice", offset=inode.offset)
            entries[entry.name] = node
    return nodes


def load_tree(image: AnyBootstrap, numbers: Sequence[int] | None = None) -> Node:
    """Read the whole tree and return its root; everything else as `load_nodes`."""
    return next(iter(load_nodes(image, numbers).values()))
