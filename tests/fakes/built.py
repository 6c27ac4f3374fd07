"""Images built from a few tar members that a test writes down."""

from __future__ import annotations

import io
import tarfile

from builder.build import BuildOptions, SourceType, build
from builder.source.options import SourceOptions
from erofs.rafs import Compressor

TYPES = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "link": tarfile.LNKTYPE,
    "symlink": tarfile.SYMTYPE,
    "char": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
    "fifo": tarfile.FIFOTYPE,
}


def member(name, kind="file", data=b"", **fields):
    """Return a member; `fields` are those of `TarInfo`, `xattrs` goes into PAX records."""
    info = tarfile.TarInfo(name)
    info.type = TYPES[kind]
    info.size = len(data)
    info.mode = fields.pop("mode", 0o755 if kind == "dir" else 0o644)
    xattrs = fields.pop("xattrs", {})
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in xattrs.items()}
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar_of(*members):
    """Return a tar of members in PAX format."""
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape"
    ) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def built(folder, tar, *, name="boot", **options):
    """Build an image from tar bytes into `folder`; return the path of the bootstrap."""
    options.setdefault("compressor", Compressor.ZSTD)
    options.setdefault("chunk_size", 0x1000)
    options.setdefault("source", SourceOptions(pax_mtime=True))
    if not options.get("inline_bootstrap"):
        options["bootstrap"] = folder / name
    result = build(
        io.BytesIO(tar),
        BuildOptions(source_type=SourceType.TAR, blob_dir=folder, workers=1, **options),
    )
    return result.bootstrap or result.blob_path
