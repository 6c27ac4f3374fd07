"""Remake the golden images: `python tests/golden/make.py` (with tests/ and the root importable).

Every image is a bootstrap, its blob if it has one, and the dump of both.
"""

import io
import struct
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from tiny import TinyImage, TinyTarfs, everything, fill, symlink  # noqa: E402

from builder.build import BuildOptions, SourceType, build  # noqa: E402
from erofs import dump_blob, dump_image, open_bootstrap  # noqa: E402
from erofs.rafs import Compressor, Digester  # noqa: E402
from erofs.view import View  # noqa: E402


def _without_data():
    image = TinyImage()
    image.root.entries[b"link"] = symlink(b"/target", xattrs={b"security.x": b"value"})
    return image


IMAGES = {
    "nodata": _without_data,
    "plain": everything,
    "tarfs": lambda: fill(TinyTarfs()),
    "toc": lambda: everything(compressor=Compressor.ZSTD, digester=Digester.BLAKE3, toc=True),
}


# Small files, one that is no part of a batch, and one of several chunks; as (name, content).
FILES = [
    ("a", b"first " * 20),
    ("b", b"second " * 30),
    ("large", bytes(range(256)) * 12),
    ("last", b"of all"),
    ("two chunks", b"x" * 5000),
]
BUILT = {
    "batch": {"source_type": SourceType.TAR, "batch_size": 0x1000, "compressor": Compressor.NONE},
    "zran": {"source_type": SourceType.TARGZ_REF},
}


def layer():
    """Return a tar of the files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in FILES:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def stored_gzip(data):
    """Return gzip data of blocks that are stored, which no version of zlib has a say in."""
    pieces = [data[start : start + 4000] for start in range(0, len(data), 4000)]
    blocks = [
        struct.pack("<BHH", number == len(pieces), len(piece), len(piece) ^ 0xFFFF) + piece
        for number, piece in enumerate(pieces, 1)
    ]
    head = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
    return b"".join([head, *blocks, struct.pack("<II", zlib.crc32(data), len(data))])


def make_built(name):
    """Return the files of an image that the builder makes."""
    source = stored_gzip(layer()) if name == "zran" else layer()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        options = BuildOptions(
            bootstrap=folder / "boot", blob_dir=folder, chunk_size=0x1000, workers=1,
            **BUILT[name],
        )  # fmt: skip
        blob = build(io.BytesIO(source), options).blob_path.read_bytes()
        bootstrap = (folder / "boot").read_bytes()
    with open_bootstrap(bootstrap) as image:
        lines = [*dump_image(image), "blob", *dump_blob(View(blob), image.blobs[0])]
    return _files(name, bootstrap, blob, lines)


def _files(name, bootstrap, blob, lines):
    files = {f"{name}.boot": bootstrap, f"{name}.dump": "".join(f"{x}\n" for x in lines).encode()}
    return files if blob is None else files | {f"{name}.blob": blob}


def make(name):
    """Return the files of an image by name."""
    if name in BUILT:
        return make_built(name)
    image = IMAGES[name]()
    prefetch = [image.root.entries[b"dir"]] if b"dir" in image.root.entries else []
    bootstrap = image.finish(prefetch)
    lines = list(dump_image(open_bootstrap(bootstrap)))
    blob = None
    # What a tar holds is for tar to tell.
    if image.entry is not None and not isinstance(image, TinyTarfs):
        blob = bytes(image.blob)
        lines += ["blob", *dump_blob(View(blob), image.entry)]
    return _files(name, bootstrap, blob, lines)


def main():
    for name in (*IMAGES, *BUILT):
        for file, content in make(name).items():
            (HERE / file).write_bytes(content)


if __name__ == "__main__":
    main()
