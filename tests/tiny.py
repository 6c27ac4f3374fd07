"""Makes small images for tests: nodes, their blob and their bootstrap."""

import stat

from builder.blob import BlobWriter
from erofs import BootstrapSpec, Node, codec, write_bootstrap
from erofs.digest import crc32c, digest
from erofs.rafs import Compressor, Digester


class TinyImage:
    """One image in the making: `file` adds content to the blob, `finish` writes both files."""

    def __init__(
        self, chunk_size=0x1000, compressor=Compressor.NONE, digester=Digester.SHA256, toc=False
    ):
        self.blob = bytearray()
        self.chunks = {}
        self.chunk_size = chunk_size
        self.compressor = compressor
        self.digester = digester
        self.writer = BlobWriter(self, compressor, digester, chunk_size, toc=toc)
        self.root = Node.directory()
        self.entry = None

    def write(self, data):
        self.blob += data

    def file(self, data, **attributes):
        node = Node(stat.S_IFREG | 0o644, size=len(data), **attributes)
        for start in range(0, len(data), self.chunk_size):
            piece = data[start : start + self.chunk_size]
            key = digest(self.digester, piece)
            if key not in self.chunks:
                stored = codec.compress(self.compressor, piece)
                self.chunks[key] = self.writer.append_chunk(piece, stored, key, crc32c(piece))
            self.chunks[key].file_offset = start
            node.chunks.append(self.chunks[key])
        return node

    def finish(self, prefetch=()):
        """Return the bytes of the bootstrap; the blob is in `blob` afterwards."""
        self.entry = self.writer.finish_data()
        if self.entry is not None:
            toc = self.writer.write_toc() if self.writer.features & 0x20000000 else b""
            self.entry = self.entry._replace(
                blob_id=self.writer.blob_id().encode(),
                compressed_size=len(self.blob),
                blob_toc_size=len(toc),
                blob_toc_digest=digest(Digester.SHA256, toc) if toc else bytes(32),
            )
        self.spec = BootstrapSpec(
            root=self.root,
            blobs=[] if self.entry is None else [self.entry],
            chunk_size=self.chunk_size,
            compressor=self.compressor,
            digester=self.digester,
            prefetch=prefetch if self.entry is not None else (),
        )
        return write_bootstrap(self.spec)


def symlink(target, **attributes):
    return Node(stat.S_IFLNK | 0o777, target=target, **attributes)


def device(kind, rdev=0):
    return Node(kind | 0o600, rdev=rdev)


def everything(**options):
    """Return an unfinished image with a bit of all that the format knows."""
    image = TinyImage(**options)
    entries = image.root.entries
    entries[b"empty"] = image.file(b"")
    entries[b"small"] = image.file(b"small content\n", mtime=1_700_000_000, mtime_nsec=5)
    entries[b"linked"] = entries[b"small"]
    entries[b"two chunks"] = image.file(bytes(range(256)) * 16 + b"tail", uid=70000, gid=5)
    entries[b"marked"] = image.file(b"x", xattrs={b"user.a": b"1", b"trusted.b": b"\0\xff"})
    entries[b"link"] = symlink(b"dir/nested")
    entries[b"long link"] = symlink(b"t" * 4050)
    entries[b"null"] = device(stat.S_IFCHR, 0x103)
    entries[b"sda"] = device(stat.S_IFBLK, 0x10_03_45 | 8 << 8)
    entries[b"fifo"] = device(stat.S_IFIFO)
    entries[b"socket"] = device(stat.S_IFSOCK)
    entries[b"dir"] = directory = Node.directory(0o700)
    directory.entries[b"nested"] = symlink(b"..", mtime=-5)
    directory.entries[b"\xff not utf-8"] = image.file(b"y" * 100)
    entries[b"many"] = many = Node.directory()
    for number in range(30):
        many.entries[b"%03d" % number + b"n" * 250] = entries[b"empty"]
    return image
