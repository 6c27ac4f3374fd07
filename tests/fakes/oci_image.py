"""Small images of containers, made in memory."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field

from tests.fakes.oci_registry import OCI_INDEX, Repo

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def member(name, content=b"", kind=tarfile.REGTYPE, **more):
    """Return a member of a layer: its header and its content."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.mtime = kind, len(content), 0o644, 1_700_000_000
    if kind == tarfile.DIRTYPE:
        info.mode = 0o755
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def layer(*members):
    """Return a plain tar."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


LOWER = layer(
    member("etc", kind=tarfile.DIRTYPE, mode=0o700, uid=3),
    member("etc/conf", b"one\n"),
    member("etc/gone", b"soon\n"),
    member("data", kind=tarfile.DIRTYPE),
    member("data/big", bytes(range(256)) * 9000),
    member("data/hard", kind=tarfile.LNKTYPE, linkname="data/big"),
    member("data/link", kind=tarfile.SYMTYPE, linkname="big"),
    member("dir", kind=tarfile.DIRTYPE),
    member("dir/a", b"a"),
)
UPPER = layer(
    member("etc/conf", b"two\n", pax_headers={"SCHILY.xattr.user.note": "x=y"}),
    member("etc/.wh.gone"),
    member("dir/.wh..wh..opq"),
    member("dir/b", b"b"),
    member("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3),
)


@dataclass
class Image:
    """An image to put into repositories."""

    layers: list[bytes] = field(default_factory=lambda: [LOWER, UPPER])
    architecture: str = "amd64"
    run: dict = field(default_factory=lambda: {"Cmd": ["/bin/sh"]})

    def add(self, repo: Repo, tag: str = "") -> dict:
        """Store it, and return its entry of an index."""
        entries = []
        for plain in self.layers:
            packed = gzip.compress(plain, mtime=0)
            digest = repo.add_blob(packed)
            entries.append({"mediaType": LAYER, "digest": digest, "size": len(packed)})
        diff_ids = [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in self.layers]
        config = json.dumps(
            {
                "architecture": self.architecture, "os": "linux", "config": self.run,
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
            }
        ).encode()  # fmt: skip
        stored = {"mediaType": CONFIG, "digest": repo.add_blob(config), "size": len(config)}
        data = json.dumps(
            {"schemaVersion": 2, "mediaType": MANIFEST, "config": stored, "layers": entries}
        ).encode()
        digest = repo.add_manifest(data, MANIFEST, tag)
        platform = {"architecture": self.architecture, "os": "linux"}
        return {"mediaType": MANIFEST, "digest": digest, "size": len(data), "platform": platform}


def add_index(repo: Repo, tag: str, *images: Image) -> None:
    """Store an index of images."""
    value = {
        "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [one.add(repo) for one in images],
    }  # fmt: skip
    repo.add_manifest(json.dumps(value).encode(), OCI_INDEX, tag)
