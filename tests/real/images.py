"""Make Nydus images out of layers by nydusify: an OCI layout to push."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.oci import media
from builder.oci.layout import LayoutSource, LayoutTarget
from builder.oci.records import Descriptor, Manifest, describe
from tests.real.settings import architecture

__all__ = ["Image", "make_image"]

_CONVERT_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Image:
    """An OCI layout; `name` is repository and tag, `blobs` are sizes by id."""

    name: str
    layout: Path
    blobs: dict[str, int]


def _layer(target: LayoutTarget, tar: Path, packed: Path) -> tuple[Descriptor, str]:
    """Store a layer; return its descriptor and the digest of the plain tar."""
    with tar.open("rb") as file, gzip.open(packed, "wb", 1) as out:
        shutil.copyfileobj(file, out)
    upload = target.begin()
    upload.write(packed.read_bytes())
    plain = hashlib.sha256(tar.read_bytes()).hexdigest()
    return upload.finish(media.OCI_LAYER_GZIP), f"sha256:{plain}"


def _source(layers: Sequence[Path], work: Path) -> Path:
    """Write the image of a container, to be converted."""
    target = LayoutTarget(work / "source")
    stored = [_layer(target, tar, work / "layer.gz") for tar in layers]
    config = json.dumps(
        {
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Cmd": ["/bin/sh"],
            },
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in stored]},
            "history": [{"created_by": f"layer {number}"} for number in range(len(stored))],
        }
    ).encode()
    descriptor = describe(config, media.OCI_CONFIG)
    target.put(descriptor, [config])
    data = Manifest(media.OCI_MANIFEST, descriptor, tuple(one for one, _ in stored)).pack()
    target.publish(data, describe(data, media.OCI_MANIFEST))
    return work / "source"


def make_image(name: str, layers: Sequence[Path], work: Path) -> Image:
    """Build a layout in an empty directory from the tars of layers, lowest first."""
    source, layout = _source(layers, work), work / "layout"
    subprocess.run(
        [sys.executable, "-m", "builder.nydusify", "convert", "--source", f"oci:{source}",
         "--target", f"oci:{layout}", "--proof", "none", "--work-dir", work / "tmp"],
        cwd=Path(__file__).resolve().parents[2],
        timeout=_CONVERT_SECONDS,
        check=True,
    )  # fmt: skip
    place = LayoutSource(layout)
    manifest = Manifest.parse(place.document(place.resolve()))
    return Image(name, layout, {one.hex: one.size for one in manifest.layers[:-1]})
