"""Makes small images for tests: nodes, their blob and their bootstrap."""

import stat

from builder.blob import BlobFormat, BlobWriter
from erofs import BootstrapSpec, Chunk, Node, write_bootstrap
from erofs.digest import crc32c, digest
from erofs.rafs import BlobEntry, BlobFeatures, Compressor, Digester


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
        self.form = BlobFormat(compressor, digester, chunk_size, toc=toc)
        self.writer = BlobWriter(self, self.form)
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
                size, crc = len(piece), crc32c(piece)
                self.chunks[key] = chunk = Chunk(key, 0, 0, 0, size, 0, 0, 0, 0, crc)
                self.writer.add_chunk(chunk, piece, self.form.encode(piece))
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


class TinyTarfs:
    """The same over a tar, of which only what lies in the places of the files is there."""

    def __init__(self, chunk_size=0x1000):
        self.blob = bytearray()
        self.chunk_size = chunk_size
        self.root = Node.directory()
        self.count = 0
        self.entry = None

    def file(self, data, **attributes):
        node = Node(stat.S_IFREG | 0o644, size=len(data), **attributes)
        self.blob += bytes(512)
        for start in range(0, len(data), self.chunk_size):
            piece = data[start : start + self.chunk_size]
            size, offset = len(piece), len(self.blob)
            self.blob += piece
            node.chunks.append(
                Chunk(bytes(32), 0, 0, size, size, offset, offset, start, self.count, 0)
            )
            self.count += 1
        self.blob += bytes(-len(self.blob) % 512)
        return node

    def finish(self, prefetch=()):
        """Return the bytes of the bootstrap."""
        size = len(self.blob)
        if self.count:
            self.entry = BlobEntry(
                digest(Digester.SHA256, self.blob).hex().encode(), 0, self.chunk_size, self.count,
                Compressor.NONE, Digester.SHA256, BlobFeatures.TARFS | BlobFeatures.CAP_TAR_TOC,
                size, size, 0, Compressor.LZ4_BLOCK, 0, 0, 0,
            )  # fmt: skip
        self.spec = BootstrapSpec(
            root=self.root,
            blobs=[] if self.entry is None else [self.entry],
            chunk_size=self.chunk_size,
            compressor=Compressor.NONE,
            digester=Digester.SHA256,
            prefetch=prefetch if self.entry is not None else (),
            tarfs=True,
        )
        return write_bootstrap(self.spec)


def symlink(target, **attributes):
    return Node(stat.S_IFLNK | 0o777, target=target, **attributes)


def device(kind, rdev=0):
    return Node(kind | 0o600, rdev=rdev)


def everything(**options):
    """Return an unfinished image with a bit of all that the format knows."""
    return fill(TinyImage(**options))


def fill(image):
    """Put a bit of all that the format knows into an image."""
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
