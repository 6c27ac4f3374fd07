"""The flags of `nydusify convert` (spec tools 15.1)."""

from __future__ import annotations

from builder.nydusify.flags import Command, Flag

__all__ = ["CONVERT"]

_SOURCE = (
    Flag("source", "Source OCI image reference"),
    Flag("source-archive", "Path to source OCI image layout tar archive, or of `docker save`"),
    Flag("target", "Target (Nydus) image reference, oci:FOLDER[:TAG] or file:///ARCHIVE"),
    Flag("target-archive", "Path to target OCI image layout tar archive"),
    Flag(
        "source-backend-type",
        "Type of storage backend, possible values: 'oss', 's3', 'localfs' with --reverse; or"
        " 'model-artifact' for a source that is one",
    ),
    Flag("source-backend-config", "Json configuration string for storage backend"),
    Flag(
        "target-suffix",
        "Generate the target image reference by adding a suffix to the source image"
        " reference, conflicts with --target",
    ),
    Flag("source-insecure", "Skip verifying server certs for HTTPS source registry", False),
    Flag("target-insecure", "Skip verifying server certs for HTTPS target registry", False),
    Flag("mirror", "Ask this address before the source registry, may be repeated", ()),
    Flag("hosts-dir", "Folder with containerd's hosts.toml files", env="NYDUS_HOSTS_DIR"),
)
_BACKEND = (
    Flag("backend-type", "Type of storage backend, possible values: 'oss', 's3', 'localfs'"),
    Flag("backend-config", "Json configuration string for storage backend"),
    Flag("backend-config-file", "Json configuration file for storage backend"),
    Flag("backend-force-push", "Push Nydus blobs even if they already exist in the backend", False),
)
_CACHE = (
    Flag("build-cache", "Specify a cache image to accelerate nydus image conversion"),
    Flag("build-cache-tag", "Use $target:$build-cache-tag as cache image"),
    Flag("build-cache-version", "Version number to filter cache images", "v1"),
    Flag("build-cache-insecure", "Skip verifying server certs for HTTPS cache registry", False),
    Flag("build-cache-max-records", "Maximum cache records in a cache image", 200),
    Flag("build-cache-dir", "Keep records of converted layers in this folder"),
    Flag(
        "chunk-dict",
        "Chunk dictionary: bootstrap:registry:localhost:5000/namespace/app:chunk_dict or"
        " bootstrap:local:/path/to/chunk_dict.boot",
    ),
    Flag("chunk-dict-insecure", "Skip verifying server certs for HTTPS dict registry", False),
)
_FORM = (
    Flag(
        "merge-platform",
        "Generate an OCI image index with both OCI and Nydus manifests for the image",
        False,
        ("multi-platform",),
    ),
    Flag("all-platforms", "Convert images for all platforms", False, env=""),
    Flag("platform", "Convert images for specific platforms: 'linux/amd64,linux/arm64'", env=""),
    Flag("oci-ref", "Convert to OCI-referenced nydus zran image", False),
    Flag("with-referrer", "Associate a reference to the source image", False),
    Flag("oci", "Convert Docker media types to OCI media types", False),
    Flag("docker-v2-format", "", False, hidden=True),
    Flag("reverse", "Perform reverse conversion from Nydus format to OCI format", False),
    Flag("fs-version", "Nydus image format version number, possible values: 6", "6"),
    Flag("fs-align-chunk", "Enable chunk data alignment (4K), which v6 always has", False),
    Flag("backend-aligned-chunk", "[Deprecated] As --fs-align-chunk", False),
    Flag("prefetch-dir", "Specify an absolute path within the image for prefetch"),
    Flag("prefetch-patterns", "Read prefetch list from STDIN, absolute paths line by line", False),
    Flag("compressor", "Algorithm to compress data: none, lz4_block, zstd", "zstd"),
    Flag(
        "fs-chunk-size",
        "size of data chunks, must be power of two and between 0x1000-0x1000000",
        "0x100000",
        ("chunk-size",),
    ),
    Flag("batch-size", "size of batch data chunks, power of two, 0x1000-0x1000000 or zero", "0"),
)
_RUN = (
    Flag("work-dir", "Working directory for image conversion", "./tmp"),
    Flag("nydus-image", "Accepted and not used: the builder is built in", "nydus-image"),
    Flag("output-json", "File path to save the metrics collected during conversion"),
    Flag("plain-http", "Enable plain http for Nydus image push", False),
    Flag("push-retry-count", "Number of retries when pushing to registry fails", 3),
    Flag("push-retry-delay", "Delay between push retries (e.g. 5s, 1m, 1h)", "5s"),
    Flag("no-proof", "Do not compare the result with the source before it is published", False),
    Flag("proof", "Where the statement goes: 'referrer', 'none' or a file", "referrer"),
    Flag("source-file", "Convert every image of a list: SOURCE [TARGET] in each line"),
    Flag("jobs", "Images of a list that are converted at the same time", 2),
    Flag("cluster", "Address of a Dask scheduler that carries out a list, or 'local'"),
    Flag("report", "File with the outcome of every image of the list, also to resume by"),
)

CONVERT = Command(
    "convert",
    "Generate a Nydus image from an OCI image",
    (*_SOURCE, *_BACKEND, *_CACHE, *_FORM, *_RUN),
)
