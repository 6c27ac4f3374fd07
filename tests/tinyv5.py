"""Makes small RAFS v5 images for tests, by the records of the reader; the product writes none.

That the records are right is what the published images are for.
"""

import stat

from erofs import Chunk, Node, codec
from erofs.digest import crc32c, digest
from erofs.rafs import (
    COMPRESSOR_FLAGS,
    DIGESTER_FLAGS,
    ChunkFlags,
    Compressor,
    Digester,
    SuperFlags,
)
from erofs.v5.layout import (
    MAGIC,
    SUPERBLOCK_SIZE,
    VERSION,
    BlobName,
    EarlyInodeRecord,
    ExtendedBlob,
    InodeFlags,
    InodeRecord,
    SuperblockV5,
    pack_blob_table,
)
from erofs.view import align_up

BLOB_ID = b"5" * 64


class TinyV5:
    """One image in the making: `file` adds content to the blob, `finish` returns the bootstrap.

    `early` writes the layout from before publication, without owners, times and chunk
    indexes; without `extended` nothing is said about the blob but its id.
    """

    def __init__(
        self, chunk_size=0x1000, compressor=Compressor.NONE, digester=Digester.SHA256,
        *, aligned=False, early=False, extended=True,
    ):  # fmt: skip
        self.chunk_size = chunk_size
        self.compressor = compressor
        self.digester = digester
        self.aligned = aligned
        self.early = early
        self.extended = extended and not early
        self.root = Node.directory()
        self.blob = bytearray()
        self.uncompressed_size = 0
        self.chunks = {}
        self.readahead = (0, 0)
        self.blob_id = BLOB_ID

    def file(self, data, **attributes):
        node = Node(stat.S_IFREG | 0o644, size=len(data), **attributes)
        for start in range(0, len(data), self.chunk_size):
            node.chunks.append(self._chunk(data[start : start + self.chunk_size]))
        return node

    def _chunk(self, piece):
        key = digest(self.digester, piece)
        if key in self.chunks:
            return self.chunks[key]
        stored = codec.compress(self.compressor, piece)
        flags = ChunkFlags(0) if self.early else ChunkFlags.HAS_CRC
        chunk = self.chunks[key] = Chunk(
            digest=key,
            blob_index=0,
            flags=flags | (0 if stored is None else ChunkFlags.COMPRESSED),
            compressed_size=len(piece if stored is None else stored),
            uncompressed_size=len(piece),
            compressed_offset=len(self.blob),
            uncompressed_offset=self.uncompressed_size,
            file_offset=0,
            chunk_index=0 if self.early else len(self.chunks),
            crc32c=0 if self.early else crc32c(piece),
        )
        self.blob += piece if stored is None else stored
        self.uncompressed_size += align_up(len(piece), 4096) if self.aligned else len(piece)
        return chunk

    def finish(self, prefetch=()):
        """Return the bytes of the bootstrap; `prefetch` are nodes."""
        names = self._number()
        records = [self._record(*name) for name in names]
        entries = [BlobName(*self.readahead, self.blob_id)] if self.chunks else []
        table = pack_blob_table(entries)
        extended = b""
        if entries and self.extended:
            extended = ExtendedBlob(
                len(self.chunks), 0, self.uncompressed_size, len(self.blob)
            ).pack()
        hints = b"".join(self.inos[id(node)].to_bytes(4, "little") for node in prefetch)
        hints += bytes(-len(hints) % 8)
        index_table = SUPERBLOCK_SIZE
        hint_table = index_table + align_up(4 * len(names), 8)
        blob_table = hint_table + len(hints)
        start = blob_table + len(table) + len(extended)
        offsets = bytearray()
        position = start
        for record in records:
            offsets += (position >> 3).to_bytes(4, "little")
            position += len(record)
        superblock = SuperblockV5(
            magic=MAGIC,
            version=VERSION,
            sb_size=SUPERBLOCK_SIZE,
            block_size=self.chunk_size,
            flags=self._flags(),
            inodes_count=len(self.inos),
            inode_table_offset=index_table,
            prefetch_table_offset=hint_table,
            blob_table_offset=blob_table,
            inode_table_entries=len(names),
            prefetch_table_entries=len(prefetch),
            blob_table_size=len(table),
            extended_blob_table_entries=len(extended) // 64,
            extended_blob_table_offset=blob_table + len(table),
        )
        offsets += bytes(-len(offsets) % 8)
        return superblock.pack() + offsets + hints + table + extended + b"".join(records)

    def _flags(self):
        if self.early:
            return SuperFlags.COMPRESSION_NONE | SuperFlags.HAS_XATTR
        flags = COMPRESSOR_FLAGS[self.compressor] | DIGESTER_FLAGS[self.digester]
        return flags | SuperFlags.EXPLICIT_UID_GID | SuperFlags.HAS_XATTR

    def _number(self):
        """Give each name its index as builders do; return (name, node, index, parent)."""
        self.inos = {id(self.root): 1}
        self.first_child = {}
        self.names_of = {}
        names = [(b"/", self.root, 1, 0)]
        self._number_below(self.root, names)
        for _, node, _, _ in names:
            self.names_of[id(node)] = self.names_of.get(id(node), 0) + 1
        return names

    def _number_below(self, directory, names):
        self.first_child[id(directory)] = len(names) + 1
        children = [child for _, child in sorted(directory.entries.items())]
        for name, child in sorted(directory.entries.items()):
            index = len(names) + 1
            self.inos.setdefault(id(child), index)
            names.append((name, child, index, self.inos[id(directory)]))
        for child in children:
            if child.is_dir:
                self._number_below(child, names)

    def _digest(self, node):
        if node.is_dir:
            below = [self._digest(child) for _, child in sorted(node.entries.items())]
            return digest(self.digester, b"".join(below))
        if stat.S_ISLNK(node.mode):
            return digest(self.digester, node.target)
        return digest(self.digester, b"".join(chunk.digest for chunk in node.chunks))

    def _record(self, name, node, index, parent):
        flags = InodeFlags.XATTR if node.xattrs else InodeFlags(0)
        child_count = len(node.entries) if node.is_dir else len(node.chunks)
        below = [child for child in node.entries.values() if child.is_dir] if node.is_dir else []
        early = self.early
        fields = {
            "digest": self._digest(node),
            "parent": parent,
            "ino": self.inos[id(node)],
            "projid": 0,
            "mode": node.mode,
            "size": len(node.target) or (4096 if node.is_dir else node.size),
            "blocks": -(-node.size // 512),
            "flags": flags | (InodeFlags.SYMLINK if node.target else 0),
            "nlink": 2 + len(below) if node.is_dir else self.names_of[id(node)],
            "child_index": self.first_child.get(id(node), 0),
            "child_count": child_count,
            "name_size": align_up(len(name), 8) if early else len(name),
            "symlink_size": align_up(len(node.target), 8) if early else len(node.target),
        }
        if early:
            record = EarlyInodeRecord(**fields).pack()
        else:
            # Builders put all ones where there is no device.
            is_device = stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode)
            record = InodeRecord(
                **fields, uid=node.uid, gid=node.gid, mtime=node.mtime,
                mtime_nsec=node.mtime_nsec, rdev=node.rdev if is_device else 0xFFFFFFFF,
            ).pack()  # fmt: skip
        parts = [record, _padded(name), _padded(node.target), _xattrs(node.xattrs)]
        for number, chunk in enumerate(node.chunks):
            chunk.file_offset = number * self.chunk_size
            parts.append(chunk.info().pack())
        return b"".join(parts)


def _padded(data):
    return data + bytes(-len(data) % 8)


def _xattrs(xattrs):
    if not xattrs:
        return b""
    pairs = [name + b"\0" + value for name, value in xattrs.items()]
    data = b"".join(len(pair).to_bytes(4, "little") + pair for pair in pairs)
    return len(data).to_bytes(8, "little") + _padded(data)


def everything(**options):
    """Return an unfinished image with a bit of all that the format knows."""
    image = TinyV5(**options)
    early = image.early
    owner = {} if early else {"uid": 70000, "gid": 5}
    time = {} if early else {"mtime": -5, "mtime_nsec": 7}
    entries = image.root.entries
    entries[b"empty"] = image.file(b"")
    entries[b"small"] = image.file(b"small content\n", **time)
    entries[b"linked"] = entries[b"small"]
    entries[b"two chunks"] = image.file(bytes(range(256)) * 16 + b"tail", **owner)
    entries[b"same chunk"] = image.file(bytes(range(256)) * 16)
    entries[b"marked"] = image.file(b"x", xattrs={b"user.a": b"1", b"trusted.b": b"\0\xff"})
    entries[b"link"] = Node(stat.S_IFLNK | 0o777, target=b"dir/nested")
    entries[b"null"] = Node(stat.S_IFCHR | 0o600, rdev=0 if early else 0x103)
    entries[b"fifo"] = Node(stat.S_IFIFO | 0o600)
    entries[b"dir"] = Node.directory()
    entries[b"dir"].entries[b"nested"] = image.file(b"nested")
    entries[b"dir"].entries[b"linked too"] = entries[b"small"]
    entries[b"dir"].entries[b"\xff" * 255] = image.file(b"long name")
    entries[b"hollow"] = Node.directory(0o711)
    return image
