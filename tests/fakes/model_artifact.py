"""A model artifact as modctl pushes it: plain tars, and a configuration of its own kind."""

from __future__ import annotations

import json

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT = "application/vnd.cnai.model.manifest.v1+json"
CONFIG = "application/vnd.cnai.model.config.v1+json"


def add_model(repo, tag, tars, **more):
    """Store an artifact of (media type, tar), and return its manifest."""
    layers = [
        {"mediaType": kind, "digest": repo.add_blob(data), "size": len(data),
         "annotations": {"org.cnai.model.filepath": "x"}}
        for kind, data in tars
    ]  # fmt: skip
    config = json.dumps({"descriptor": {"name": "m"}, "modelfs": {"type": "layers"}}).encode()
    value = {
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": ARTIFACT,
        "config": {"mediaType": CONFIG, "digest": repo.add_blob(config), "size": len(config)},
        "layers": layers,
    } | more  # fmt: skip
    repo.add_manifest(json.dumps(value).encode(), MANIFEST, tag)
    return value
