"""Small blobs made from raw records, without the builder."""

from __future__ import annotations

import hashlib
import random

from erofs import framing
from erofs.blobmeta import CiFlags, CompressionInfoV2, CompressionTableHeader
from erofs.citable import pack_cached
from erofs.codec import compress
from erofs.contexts import BatchContext
from erofs.digest import crc32c, digest
from erofs.rafs import BlobEntry, BlobFeatures, ChunkFlags, ChunkInfo, Compressor, Digester
from erofs.view import align_up

CHUNK_SIZE = 0x10000


class Blob:
    """A stored blob with its table: `entry`, `chunks`, `stored`, and `plain`."""

    def __init__(
        self,
        sizes,
        *,
        blob_id="b" * 64,
        compressor=Compressor.ZSTD,
        digester=Digester.SHA256,
        chunk_size=CHUNK_SIZE,
        seed=1,
    ):
        rng = random.Random(seed)
        stored, plain, chunks = bytearray(), bytearray(), []
        for index, size in enumerate(sizes):
            # Half random: compresses, and no two chunks are alike.
            data = rng.randbytes(size - size // 2) + bytes(size // 2)
            packed = compress(compressor, data)
            body = data if packed is None else packed
            chunks.append(
                ChunkInfo(
                    digest(digester, data),
                    0,
                    0 if packed is None else ChunkFlags.COMPRESSED,
                    len(body),
                    size,
                    len(stored),
                    len(plain),
                    0,
                    index,
                    0,
                )
            )
            stored += body
            plain += data + bytes(-size % 4096)
        self.plain = bytes(plain)
        self.stored = bytes(stored)
        self.chunks = chunks
        self.entry = BlobEntry(
            blob_id.encode(),
            0,
            chunk_size,
            len(sizes),
            compressor,
            digester,
            0x40000001,
            len(stored),
            align_up(len(plain), 4096),
            0,
            0,
            0,
            0,
            0,
        )

    @property
    def id(self):
        return self.entry.id


class BatchBlob:
    """A stored blob of batches: lists of sizes are batches, numbers chunks by themselves.

    `entry`, `chunks` (as a bootstrap has them, without places of batched ones), `stored` with
    its table at the end, `plain`; `places` are (offset, length) of what is stored together.
    """

    def __init__(self, layout, *, blob_id="c" * 64, compressor=Compressor.ZSTD, toc=False, seed=1):
        self._rng = random.Random(seed)
        self._compressor = compressor
        self.entries, self.contexts, self.chunks, self.places = [], [], [], []
        self._stored, self._plain = bytearray(), bytearray()
        for item in layout:
            if isinstance(item, list):
                self._add_batch(item)
            else:
                self._add_chunk(item)
        self.plain = bytes(self._plain)
        self.data_size = len(self._stored)
        self._seal(blob_id, toc)

    def _content(self, size):
        return self._rng.randbytes(size - size // 2) + bytes(size // 2)

    def _add(self, data, flags, size, place, context):
        offset = len(self._plain)
        stored_offset = len(self._stored)
        self.entries.append(
            CompressionInfoV2(offset, len(data), stored_offset, size, flags, place, context)
        )
        batched = bool(flags & CiFlags.BATCH)
        self.chunks.append(
            ChunkInfo(
                digest(Digester.SHA256, data),
                0,
                ChunkFlags.HAS_CRC | (ChunkFlags.COMPRESSED if flags == 0x11 else 0),
                0 if batched else size,
                len(data),
                0 if batched else stored_offset,
                offset,
                0,
                len(self.chunks),
                crc32c(data),
            )
        )
        self._plain += data + bytes(-len(data) % 4096)

    def _store(self, data):
        self.places.append((len(self._stored), len(data)))
        self._stored += data

    def _add_batch(self, sizes):
        pieces = [self._content(size) for size in sizes]
        start = 0
        for piece in pieces:
            self._add(piece, CiFlags.COMPRESSED | CiFlags.BATCH, 0, start, len(self.contexts))
            start += len(piece)
        whole = b"".join(pieces)
        packed = compress(self._compressor, whole) or whole
        self.contexts.append(BatchContext(len(packed), len(whole)))
        self._store(packed)

    def _add_chunk(self, size):
        data = self._content(size)
        packed = compress(self._compressor, data)
        body = data if packed is None else packed
        flags = CiFlags.HAS_CRC | (0 if packed is None else CiFlags.COMPRESSED)
        self._add(data, flags, len(body), crc32c(data), 0)
        self._store(body)

    def _seal(self, blob_id, toc):
        features = BlobFeatures.ALIGNED | BlobFeatures.CAP_TAR_TOC
        features |= BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.BATCH
        if toc:
            features |= BlobFeatures.HAS_TAR_HEADER | BlobFeatures.HAS_TOC
            self._stored += framing.pack_section_header(b"image.blob", self.data_size)
        table = b"".join(item.pack() for item in [*self.entries, *self.contexts])
        packed = compress(self._compressor, table)
        body = table if packed is None else packed
        self.header = CompressionTableHeader(
            features,
            Compressor.NONE if packed is None else self._compressor,
            len(self.entries),
            len(self._stored),
            len(body),
            len(table),
            24 * len(self.entries),
            40 * len(self.contexts),
            len(self.contexts),
        )
        offset = len(self._stored)
        header = self.header.pack()
        self._stored += body + header
        self.cached = pack_cached(table, header)
        toc_bytes = b""
        if toc:
            flags = framing.TOC_NONE if packed is None else framing.TOC_ZSTD
            toc_bytes = framing.pack_toc(
                [
                    _toc_entry(b"blob.meta", flags, table, offset, len(body)),
                    _toc_entry(b"blob.meta.header", 1, header, offset + len(body), 4096),
                ]
            )
            self._stored += framing.pack_section_header(b"blob.meta", len(body) + 4096) + toc_bytes
        self.stored = bytes(self._stored)
        self.entry = BlobEntry(
            blob_id.encode(),
            0,
            CHUNK_SIZE,
            len(self.chunks),
            self._compressor,
            Digester.SHA256,
            features,
            len(self.stored),
            len(self.plain),
            len(toc_bytes),
            self.header.ci_compressor,
            offset,
            len(body),
            len(table),
            blob_toc_digest=hashlib.sha256(toc_bytes).digest() if toc else bytes(32),
        )

    @property
    def id(self):
        return self.entry.id

    @property
    def table_range(self):
        """Offset and length of the stored table with its header."""
        return self.entry.ci_offset, self.entry.ci_compressed_size + 4096


def _toc_entry(name, flags, plain, offset, length):
    digest = hashlib.sha256(plain).digest()
    return framing.TocEntry(flags, name, digest, offset, length, len(plain))
