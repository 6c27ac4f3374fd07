"""A Debian image of three layers as an OCI layout, for tests and benchmarks that want a real one.

The second layer has whiteouts, an opaque directory and hard links to what the first has, the
third replaces files and adds large ones.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from builder.oci import media
from builder.oci.layout import LayoutTarget
from builder.oci.records import Descriptor, Index, Manifest, Platform, describe

__all__ = ["debian_tar", "make_debian_layout", "upper_layers"]

_PIECE = 1 << 20


def debian_tar(work: Path) -> Path:
    """Return the Debian tree that the demo keeps, without one a part of this machine's."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(base) if base.startswith("/") else Path.home() / ".cache"
    for path in sorted((cache / "nydus-erofs").glob("debian-*.tar")):
        return path
    tar = work / "host.tar"
    names = [name for name in ("etc", "usr/share/doc", "usr/share/zoneinfo", "usr/lib/python3")
             if Path("/", name).is_dir()]  # fmt: skip
    # Files of /etc come and go; sockets are left out with a warning.
    subprocess.run(["tar", "-C", "/", "-cf", tar, *names], check=False, capture_output=True)
    return tar


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _packed(plain: Iterable[bytes], form: str, sums) -> Iterator[bytes]:
    packer = (
        zlib.compressobj(6, zlib.DEFLATED, 31)
        if form == "gzip"
        else (zstandard.ZstdCompressor(3).compressobj())
    )
    for piece in plain:
        sums.update(piece)
        if data := packer.compress(piece):
            yield data
    yield packer.flush()


def _add(tar, name, kind=tarfile.REGTYPE, content=b"", **more):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.mtime = kind, len(content), 0o644, 1_700_000_000
    if kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
        info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o777
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def upper_layers(lower: Path) -> list[bytes]:
    """Return the plain tars of the second and third layer over a Debian tree."""
    with tarfile.open(lower) as tar:
        names = [member.name.removeprefix("./") for member in tar if member.isreg()]
    gone = [name for name in names if name.startswith("usr/share/doc/")][:50]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in gone:
            directory, _, base = name.rpartition("/")
            _add(tar, f"{directory}/.wh.{base}")
        _add(tar, "usr/share/zoneinfo", tarfile.DIRTYPE)
        _add(tar, "usr/share/zoneinfo/.wh..wh..opq")
        _add(tar, "usr/share/zoneinfo/UTC", content=b"TZif2")
        # The real tool needs directories described: for hard links, and for their attributes.
        _add(tar, "etc", tarfile.DIRTYPE)
        _add(tar, "etc/hostname", content=b"converted\n",
             pax_headers={"SCHILY.xattr.user.note": "a=b"})  # fmt: skip
        _add(tar, "etc/hostname-too", tarfile.LNKTYPE, linkname="etc/hostname")
        _add(tar, "srv", tarfile.DIRTYPE, mode=0o1777, uid=1000)
        # No FIFO: the real builder refuses those that Python writes.
        _add(tar, "srv/null", tarfile.CHRTYPE, devmajor=1, devminor=3)
    second = stream.getvalue()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, "etc", tarfile.DIRTYPE)
        _add(tar, "srv", tarfile.DIRTYPE, mode=0o1777, uid=1000)
        _add(tar, "srv/large", content=os.urandom(3 << 20) + bytes(2 << 20))
        _add(tar, "etc/hostname", content=b"third\n")
        _add(tar, "srv/.wh.null")
        _add(tar, "srv/link", tarfile.SYMTYPE, linkname="../etc/hostname")
    return [second, stream.getvalue()]


def make_debian_layout(lower: Path, directory: Path, form: str = "gzip") -> Path:
    """Write a layout with an index of two platforms that share the layers; return it.

    Args:
        lower: a tar of a Debian tree.
        directory: of the layout.
        form: gzip or zstd.
    """
    target = LayoutTarget(directory, "latest")
    kind = media.OCI_LAYER_GZIP if form == "gzip" else media.OCI_LAYER_ZSTD
    layers, diff_ids = [], []
    plains: list[Iterable[bytes]] = [_pieces(lower), *([one] for one in upper_layers(lower))]
    for plain in plains:
        sums, upload = hashlib.sha256(), target.begin()
        for data in _packed(plain, form, sums):
            upload.write(data)
        layers.append(upload.finish(kind))
        diff_ids.append(f"sha256:{sums.hexdigest()}")
    entries = []
    for platform in (Platform("amd64", "linux"), Platform("arm64", "linux", variant="v8")):
        config = json.dumps(
            {
                **platform.to_json(),
                "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/bin:/bin"]},
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
                "history": [{"created_by": f"layer {number}"} for number in range(3)],
            }
        ).encode()
        stored = describe(config, media.OCI_CONFIG)
        target.put(stored, [config])
        data = Manifest(media.OCI_MANIFEST, stored, tuple(layers)).pack()
        descriptor = describe(data, media.OCI_MANIFEST)
        target.publish(data, descriptor, named=False)
        entries.append(
            Descriptor(descriptor.media_type, descriptor.digest, descriptor.size, platform=platform)
        )
    data = Index(media.OCI_INDEX, tuple(entries)).pack()
    target.publish(data, describe(data, media.OCI_INDEX))
    target.close()
    return directory
