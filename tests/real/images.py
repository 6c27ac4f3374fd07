"""Make Nydus images out of layers, as nydusify does: an OCI layout to push.

Stands in for nydusify until this project has its own (media types and annotations: spec
tools 16.1, rafs-v6 5.2).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.bootstrap import inlined_bootstrap
from erofs import codec
from erofs.blobmeta import CI_ALIGNMENT
from erofs.framing import SECTION_META, SECTION_META_HEADER, TOC_ZSTD, read_toc
from erofs.rafs import Compressor
from erofs.view import View, align_up
from tests.real.settings import architecture

__all__ = ["Image", "make_image"]

_PREFIX = "containerd.io/snapshot/nydus-"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"
_BOOTSTRAP = "application/vnd.oci.image.layer.v1.tar+gzip"
# The words of nydusify's calls (fixtures/made-by-nydusify/big-convert-zst/builder.txt).
_CREATE = (
    "create", "--log-level", "warn", "--prefetch-policy", "fs", "--whiteout-spec", "none",
    "--fs-version", "6", "--type", "tar-rafs", "--blob-inline-meta", "--features", "blob-toc",
    "--compressor", "zstd", "--chunk-size", "0x100000", "--blob",
)  # fmt: skip
_MERGE = ("merge", "--log-level", "warn", "--prefetch-policy", "fs", "--bootstrap")
_BUILD_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Image:
    """An OCI layout; `name` is repository and tag, `blobs` are sizes by id."""

    name: str
    layout: Path
    blobs: dict[str, int]


def _nydus_image(*words: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "builder.cli", *map(str, words)],
        cwd=Path(__file__).resolve().parents[2],
        input=b"/",
        timeout=_BUILD_SECONDS,
        check=True,
    )


def _blob_meta(blob: bytes) -> bytes | None:
    """Return the chunk table as caches keep it: plain, padded, with its header (rafs-v6 4.4)."""
    toc = read_toc(View(blob))
    table, header = toc.find(SECTION_META), toc.find(SECTION_META_HEADER)
    if table is None or header is None:
        return None
    data = blob[table.offset : table.offset + table.compressed_size]
    if table.flags & TOC_ZSTD:
        data = codec.decompress(Compressor.ZSTD, data, table.uncompressed_size)
    padded = data.ljust(align_up(len(data), CI_ALIGNMENT), b"\0")
    return padded + blob[header.offset : header.offset + header.uncompressed_size]


def _bootstrap_tar(files: dict[str, bytes]) -> bytes:
    """Return the uncompressed bootstrap layer."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        top = tarfile.TarInfo("image")
        top.type, top.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(top)
        for name, content in files.items():
            member = tarfile.TarInfo(f"image/{name}")
            member.mode, member.size = 0o444, len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


class _Layout:
    """An OCI image layout that is being written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.blobs = directory / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def add(self, content: bytes, media_type: str, **annotations: str) -> dict[str, object]:
        """Store a blob and return its descriptor."""
        digest = hashlib.sha256(content).hexdigest()
        (self.blobs / digest).write_bytes(content)
        descriptor: dict[str, object] = {
            "mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content),
        }  # fmt: skip
        if annotations:
            named = {_PREFIX + key.replace("_", "-"): text for key, text in annotations.items()}
            descriptor["annotations"] = named
        return descriptor

    def add_json(self, content: object, media_type: str) -> dict[str, object]:
        """Store a document and return its descriptor."""
        return self.add(json.dumps(content).encode(), media_type)


def _config(diff_ids: Sequence[str]) -> dict[str, object]:
    history = [{"created_by": f"layer {number}"} for number in range(1, len(diff_ids))]
    converter = {"created_by": "Nydus Converter", "comment": "Nydus Bootstrap Layer"}
    return {
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": ["/bin/sh"],
        },
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        "history": [*history, converter],
    }


def make_image(name: str, layers: Sequence[Path], work: Path) -> Image:
    """Build a layout in an empty directory from the tars of layers, lowest first."""
    layout = _Layout(work / "layout")
    descriptors, diff_ids, bootstraps = [], [], []
    files = {"image.boot": b""}
    blobs = {}
    for number, tar in enumerate(layers):
        path = work / f"{number}.blob"
        _nydus_image(*_CREATE, path, tar)
        content = path.read_bytes()
        descriptor = layout.add(content, _BLOB, blob="true")
        digest = str(descriptor["digest"])
        blob_id = digest.removeprefix("sha256:")
        descriptors.append(descriptor)
        diff_ids.append(digest)
        blobs[blob_id] = len(content)
        meta = _blob_meta(content)
        if meta is not None:
            files[f"{blob_id}.blob.meta"] = meta
        bootstraps.append(work / blob_id)
        bootstraps[-1].write_bytes(inlined_bootstrap(path))
    _nydus_image(*_MERGE, work / "image.boot", *bootstraps)
    files["image.boot"] = (work / "image.boot").read_bytes()
    plain = _bootstrap_tar(files)
    packed = gzip.compress(plain, mtime=0)
    descriptors.append(layout.add(packed, _BOOTSTRAP, bootstrap="true", fs_version="6"))
    diff_ids.append(f"sha256:{hashlib.sha256(plain).hexdigest()}")
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": layout.add_json(_config(diff_ids), _CONFIG),
        "layers": descriptors,
        "annotations": {f"{_PREFIX}fs-version": "6"},
    }
    index = {"schemaVersion": 2, "manifests": [layout.add_json(manifest, _MANIFEST)]}
    (layout.directory / "index.json").write_text(json.dumps(index))
    return Image(name, layout.directory, blobs)
