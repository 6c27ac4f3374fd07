"""What becomes of each recorded command of the real nydus-image: the same, or why not.

A case that is in none of these lists has to be in the table "Recorded cases" of
docs/compatibility.md, which says what is different and why.
"""

# Bootstraps, blobs, disks, cache files and reports, byte for byte.
SAME_BYTES = [
    "tar-none",
    "tar-zstd",
    "tar-lz4",
    "tar-none-sha256",
    "tar-zstd-sha256",
    "tar-chunk4k",
    "tar-chunk64k",
    "tar-big-1m",
    "tar-big-16m",
    "tar-big-64k-lz4",
    "tar-toc",
    "tar-inline",
    "tar-inline-toc",
    "tar-inline-toc-lz4",
    "tar-inline-toc-none",
    "tar-blob-id",
    "tar-bootdir",
    "tar-repeatable",
    "tar-aligned",
    "tar-fifo",
    "targz-rafs",
    "tar-from-gz-autodetect",
    "tar-whiteout-none",
    "tar-whiteout-overlayfs",
    "tar-nodata",
    "tar-nodata-inline",
    "tar-nodata-inline-notoc",
    "tar-empty-zeroblocks",
    "tar-gnu",
    "tar-ustar",
    "prefetch-fs",
    "prefetch-fs-root",
    "prefetch-blob",
    "prefetch-nodata",
    "merge-separate",
    "merge-parent",
    "merge-mixed-compressor",
    "tarfs-l2",
    "tarfs-big",
    "tarfs-merge-23",
    "tar-blob-cache",
    "batch-64k-zstd",
    "batch-64k-none",
    "batch-4k-zstd",
    "batch-1m-lz4-toc",
    "batch-l1-toc",
    "chunkdict",
    "chunkdict-all-hit",
    "zran",
    "zran-big",
    "zran-big-64k",
    "zran-inline-toc",
    "zran-l3-inline-toc",
    "zran-multi-member",
    "zran-plain-tar",
    "merge-zran",
    "estargz-rafs",
    "estargz-ref",
]

# The same, of directories with owners and devices: root makes them.
SAME_BYTES_OF_DIRECTORIES = [
    "dir-zstd",
    "dir-none-64k",
    "dir-l2-none",
    "dir-inline-toc",
    "dir-prefetch-blob",
    "dir-repeatable",
    "dir-sparse-socket",
    "dir-hardlink-symlink",
    "dir-overlayfs",
    "dir-blob-cache",
    "parent-dir",
    "parent-dir-3",
]

# Many commands; `test_merge_of_inlined_bootstraps` and its neighbours replay them.
SAME_BYTES_OF_STEPS = ["merge-inline"]

# What is printed, and reports.
SAME_OUTPUT = ["check", "inspect", "inspect-prefetch", "stat"]

# The same exit status, a text of the same meaning, and nothing left behind.
SAME_REFUSAL = [
    "err-badlink",
    "err-batch-2000",
    "err-batch-gt-chunk",
    "err-batch-v5",
    "err-chunk-3000",
    "err-chunk-32m",
    "err-dir-is-tar",
    "err-empty-file",
    "err-external-attr-missing",
    "err-feature",
    "err-gzip-compressor",
    "err-inline-and-bootstrap",
    "err-merge-count",
    "err-merge-mixed-chunk-size",
    "err-merge-none",
    "err-missing-source",
    "err-no-args",
    "err-no-blob-dir",
    "err-no-output",
    "err-tar-is-dir",
    "err-tarfs-blob",
    "err-tarfs-toc",
    "err-tarfs-v5",
    "err-trunc",
    "err-xattr-bad",
    "err-zran-blob-id",
    "err-zran-encrypt",
    "err-zran-v5",
]

# The same for other commands than `create` and `merge`.
SAME_REFUSAL_OF_READERS = [
    "err-bad-sub",
    "err-check-missing",
    "err-check-not-boot",
    "err-inspect-missing",
    "err-unpack-no-blob",
]
