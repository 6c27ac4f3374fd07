"""Small blobs made from raw records, without the builder."""

from __future__ import annotations

import random

from erofs.codec import compress
from erofs.digest import digest
from erofs.rafs import BlobEntry, ChunkFlags, ChunkInfo, Compressor, Digester
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
