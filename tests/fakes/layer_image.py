"""Original layers as blobs, made by the builder."""

import io
import random
import tarfile
import zlib

from builder.build import BuildOptions, SourceType, build
from erofs import open_bootstrap
from fakes.memory_reader import MemoryReader
from fscache.cache.layer import LayerReader

__all__ = ["LayerBlob", "Stored", "content", "gzipped", "layer_tar"]


def content(size, seed=0):
    """Return bytes that compress to a half."""
    rng = random.Random(seed)
    return b"".join(rng.randbytes(500) + b"ten bytes " * 50 for _ in range(size // 1000 + 1))[:size]


def layer_tar(*files):
    """Return a tar of contents, which are files `/0`, `/1`, and so on."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number, data in enumerate(files):
            info = tarfile.TarInfo(str(number))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def gzipped(data, members=1, level=1):
    """Return gzip data of so many members."""
    size = -(-len(data) // members)
    packed = b""
    for start in range(0, len(data), size):
        compressor = zlib.compressobj(level, wbits=31)
        packed += compressor.compress(data[start : start + size]) + compressor.flush()
    return packed


class Stored:
    """Bytes under an id, as `MemoryReader` wants them."""

    def __init__(self, blob_id, stored):
        self.id = blob_id
        self.stored = stored


class LayerBlob:
    """A layer with the image of it: `entry`, `chunks`, and what is stored, `layer` and `tables`.

    `plain` are the contents of the files, each at a whole page; all chunks are different.
    """

    def __init__(self, folder, files, layer=None, **options):
        folder.mkdir(exist_ok=True)
        layer = layer or gzipped(layer_tar(*files))
        self.bootstrap = folder / "boot"
        result = build(
            io.BytesIO(layer),
            BuildOptions(
                source_type=SourceType.TARGZ_REF,
                bootstrap=self.bootstrap,
                blob_dir=folder,
                chunk_size=options.pop("chunk_size", 0x10000),
                **options,
            ),
        )
        with open_bootstrap(self.bootstrap) as image:
            (self.entry,) = image.blobs
            self.chunks = list(image.chunk_infos)
        self.layer = Stored(self.entry.id, layer)
        self.tables = Stored(result.blob_path.name, result.blob_path.read_bytes())
        self.plain = b"".join(data + bytes(-len(data) % 4096) for data in files)

    def reader(self):
        """Return a reader of both; its parts count what is read."""
        return LayerReader(MemoryReader(self.layer), MemoryReader(self.tables))
