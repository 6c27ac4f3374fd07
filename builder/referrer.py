"""The OCI referrer of an image that carries what its disk is checked by: root hash and signature.

An artifact manifest whose subject is the image (OCI image-spec 1.1, `manifest.md`): registries list
it among the image's referrers, and it can be copied and signed like any other.
"""

from __future__ import annotations

from dataclasses import replace

from builder.oci import media
from builder.oci.place import Target
from builder.oci.records import Descriptor, Manifest, describe, go_json
from builder.roothash import SIGNATURE_TYPE
from erofs.errors import UnsupportedFeature
from erofs.verity import HashTree

__all__ = ["ARTIFACT_TYPE", "PARAMETERS_TYPE", "ROOT_HASH", "add_verity_referrer"]

ARTIFACT_TYPE = "application/vnd.nydus-erofs.dm-verity.v1"
PARAMETERS_TYPE = "application/vnd.nydus-erofs.dm-verity.v1+json"
ROOT_HASH = "vnd.nydus-erofs.dm-verity.root-hash"
_TITLE = "org.opencontainers.image.title"


def add_verity_referrer(
    target: Target, subject: Descriptor, tree: HashTree, signature: bytes | None = None
) -> Descriptor:
    """Store the referrer where the image is, and return its descriptor.

    The same arguments give the same bytes.

    Args:
        target: a layout or a repository.
        subject: of the image: a manifest or an index.
        tree: of the disk that was exported from it.
        signature: of the root hash, in DER (`builder.roothash`).

    Raises:
        UnsupportedFeature: the subject is something else.
        NydusError: the target does not take it.
    """
    if not (media.is_manifest(subject.media_type) or media.is_index(subject.media_type)):
        raise UnsupportedFeature("subject that is no image", got=subject.media_type)
    contents = [(go_json(tree.as_json()), PARAMETERS_TYPE, "verity.json")]
    if signature is not None:
        contents.append((signature, SIGNATURE_TYPE, "root-hash.p7s"))
    named = {ROOT_HASH: tree.root.hex()}
    manifest = Manifest(
        media.OCI_MANIFEST,
        _put(target, b"{}", media.OCI_EMPTY),
        tuple(
            replace(_put(target, data, kind), annotations={_TITLE: title})
            for data, kind, title in contents
        ),
        named,
        subject.plain(),
        ARTIFACT_TYPE,
    )
    data = manifest.pack()
    referrer = replace(
        describe(data, media.OCI_MANIFEST), annotations=named, artifact_type=ARTIFACT_TYPE
    )
    target.attach(data, referrer, subject)
    return referrer


def _put(target: Target, data: bytes, media_type: str) -> Descriptor:
    descriptor = describe(data, media_type)
    target.put(descriptor, [data])
    return descriptor
