"""Media types and annotation keys of images (spec tools 16, OCI image specification 1.1)."""

from __future__ import annotations

__all__ = [
    "CONFIG_TYPES",
    "INDEX_TYPES",
    "LAYER_TYPES",
    "MANIFEST_TYPES",
    "is_config",
    "is_index",
    "is_manifest",
    "oci_type",
]

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"

DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"

NYDUS_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"
NYDUS_CONFIG = "application/vnd.nydus.image.config.v1+json"
NYDUS_ARTIFACT = "application/vnd.nydus.image.manifest.v1+json"
# The older mark of a Nydus manifest in an index, among the features of the platform.
NYDUS_OS_FEATURE = "nydus.remoteimage.v1"

OCTET_STREAM = "application/octet-stream"

INDEX_TYPES = (OCI_INDEX, DOCKER_INDEX)
MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
CONFIG_TYPES = (OCI_CONFIG, DOCKER_CONFIG, NYDUS_CONFIG)
LAYER_TYPES = (
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
)
_OCI_TYPES = {
    DOCKER_INDEX: OCI_INDEX,
    DOCKER_MANIFEST: OCI_MANIFEST,
    DOCKER_CONFIG: OCI_CONFIG,
    DOCKER_LAYER: OCI_LAYER,
    DOCKER_LAYER_GZIP: OCI_LAYER_GZIP,
    DOCKER_LAYER_ZSTD: OCI_LAYER_ZSTD,
}

MODEL_ARTIFACT = "application/vnd.cnai.model.manifest.v1+json"

PREFIX = "containerd.io/snapshot/"
ARTIFACT_TYPE = f"{PREFIX}nydus-artifact-type"
BLOB = f"{PREFIX}nydus-blob"
BOOTSTRAP = f"{PREFIX}nydus-bootstrap"
BUILDER_VERSION = f"{PREFIX}nydus-builder-version"
COMMIT_BLOBS = f"{PREFIX}nydus-commit-blobs"
CACHE_VERSION = f"{PREFIX}nydus-cache-version"
EMPTY_LAYER = f"{PREFIX}nydus-empty-layer"
FS_VERSION = f"{PREFIX}nydus-fs-version"
LAYER_REF = f"{PREFIX}nydus-ref"
PREFETCH_BLOB = f"{PREFIX}nydus-separated-blob-with-prefetch-files"
SOURCE_DIGEST = f"{PREFIX}nydus-source-digest"
SOURCE_REFERENCE = f"{PREFIX}nydus-source-reference"
UNCOMPRESSED = "containerd.io/uncompressed"
# Ours: how a cached layer was made, and which directories it has entries in but none for.
CACHE_OPTIONS = f"{PREFIX}nydus-cache-options"
CACHE_UNDESCRIBED = f"{PREFIX}nydus-cache-undescribed"

IMAGE_NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"


def is_index(media_type: str) -> bool:
    """Tell whether this is the type of an index (Docker: manifest list)."""
    return media_type in INDEX_TYPES


def is_manifest(media_type: str) -> bool:
    """Tell whether this is the type of one platform's manifest."""
    return media_type in MANIFEST_TYPES


def is_config(media_type: str) -> bool:
    """Tell whether this is the type of an image's configuration."""
    return media_type in CONFIG_TYPES


def oci_type(media_type: str) -> str:
    """Return OCI's name for one of Docker's types, any other as it is."""
    return _OCI_TYPES.get(media_type, media_type)
