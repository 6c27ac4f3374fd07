"""Remake the golden images: `python tests/golden/make.py` (with tests/ and the root importable).

Every image is a bootstrap, its blob if it has one, and the dump of both.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from tiny import TinyImage, TinyTarfs, everything, fill, symlink  # noqa: E402

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


def make(name):
    """Return the files of an image by name."""
    image = IMAGES[name]()
    prefetch = [image.root.entries[b"dir"]] if b"dir" in image.root.entries else []
    bootstrap = image.finish(prefetch)
    lines = list(dump_image(open_bootstrap(bootstrap)))
    files = {f"{name}.boot": bootstrap}
    # What a tar holds is for tar to tell.
    if image.entry is not None and not isinstance(image, TinyTarfs):
        files[f"{name}.blob"] = bytes(image.blob)
        lines += ["blob", *dump_blob(View(bytes(image.blob)), image.entry)]
    files[f"{name}.dump"] = "".join(f"{line}\n" for line in lines).encode()
    return files


def main():
    for name in IMAGES:
        for file, content in make(name).items():
            (HERE / file).write_bytes(content)


if __name__ == "__main__":
    main()
