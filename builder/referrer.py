"""The OCI referrer of an image that carries what its disk is checked by: root hash and signature.

An artifact manifest whose subject is the image (OCI image-spec 1.1, `manifest.md`): registries list
it among the image's referrers, and it can be copied and signed like any other.
"""

from __future__ import annotations

from builder.ocilayout import INDEX_TYPES, MANIFEST_TYPES, Descriptor, Layout, json_bytes
from builder.roothash import SIGNATURE_TYPE
from erofs.errors import UnsupportedFeature
from erofs.verity import HashTree

__all__ = ["ARTIFACT_TYPE", "PARAMETERS_TYPE", "ROOT_HASH", "add_verity_referrer"]

ARTIFACT_TYPE = "application/vnd.nydus-erofs.dm-verity.v1"
PARAMETERS_TYPE = "application/vnd.nydus-erofs.dm-verity.v1+json"
ROOT_HASH = "vnd.nydus-erofs.dm-verity.root-hash"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_TITLE = "org.opencontainers.image.title"


def add_verity_referrer(
    layout: Layout, subject: Descriptor, tree: HashTree, signature: bytes | None = None
) -> Descriptor:
    """Write the referrer into a layout and list it in the index; return its descriptor.

    The same arguments give the same bytes.

    Args:
        layout: where the image is.
        subject: of the image: a manifest or an index.
        tree: of the disk that was exported from it.
        signature: of the root hash, in DER (`builder.roothash`).

    Raises:
        UnsupportedFeature: the subject is something else.
        BuildError: the layout cannot be written.
    """
    if subject.media_type not in (*MANIFEST_TYPES, *INDEX_TYPES):
        raise UnsupportedFeature("subject that is no image", got=subject.media_type)
    contents = [(json_bytes(tree.as_json()), PARAMETERS_TYPE, "verity.json")]
    if signature is not None:
        contents.append((signature, SIGNATURE_TYPE, "root-hash.p7s"))
    layers = [
        {**layout.write(data, kind).as_json(), "annotations": {_TITLE: title}}
        for data, kind, title in contents
    ]
    named = {ROOT_HASH: tree.root.hex()}
    plain = Descriptor(subject.media_type, subject.digest, subject.size)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPES[0],
        "artifactType": ARTIFACT_TYPE,
        "config": layout.write(b"{}", _EMPTY_TYPE).as_json(),
        "layers": layers,
        "subject": plain.as_json(),
        "annotations": named,
    }
    written = layout.write(json_bytes(manifest), MANIFEST_TYPES[0])
    referrer = Descriptor(
        written.media_type, written.digest, written.size, named, artifact_type=ARTIFACT_TYPE
    )
    layout.add(referrer)
    return referrer
