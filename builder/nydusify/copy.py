"""`nydusify copy` (spec tools 15.5)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import ExitStack

from builder.convert.copying import copy_image
from builder.nydusify.flags import Command, Flag, UsageError, Values
from builder.nydusify.places import Places
from builder.nydusify.stores import blob_reader
from builder.progress import progress_during

__all__ = ["COMMAND", "run"]

logger = logging.getLogger(__name__)

COMMAND = Command(
    "copy",
    "Copy an image from source to target",
    (
        Flag("source", "Source image reference, file:///ARCHIVE or oci:FOLDER", required=True),
        Flag("target", "Target image reference, file:///ARCHIVE or oci:FOLDER", required=True),
        Flag("source-insecure", "Skip verifying server certs for HTTPS source registry", False),
        Flag("target-insecure", "Skip verifying server certs for HTTPS target registry", False),
        Flag("source-backend-type", "Bring the blobs from a storage backend: oss, s3, localfs"),
        Flag("source-backend-config", "Json configuration string for storage backend"),
        Flag("source-backend-config-file", "Json configuration file for storage backend"),
        Flag("all-platforms", "Copy images for all platforms", False, env=""),
        Flag("platform", "Copy images for specific platforms: 'linux/amd64,linux/arm64'", env=""),
        Flag("push-chunk-size", "Chunk size for pushing a blob layer in chunks", "0MB"),
        Flag("mirror", "Ask this address before the source registry, may be repeated", ()),
        Flag(
            "hosts-dir", "Folder with containerd's hosts.toml of registries", env="NYDUS_HOSTS_DIR"
        ),
        Flag("plain-http", "Enable plain http", False),
        Flag("work-dir", "Accepted and not used: nothing is kept", "./tmp"),
        Flag("nydus-image", "Accepted and not used: the builder is built in", "nydus-image"),
    ),
)
_UNITS = {"": 1, "B": 1, "KB": 1000, "KIB": 1 << 10, "MB": 10**6, "MIB": 1 << 20, "GB": 10**9,
          "GIB": 1 << 30, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}  # fmt: skip


def size(text: str) -> int:
    """Return the bytes of `16KB`, `1MiB`; raise `UsageError`."""
    match = re.fullmatch(r"(\d{1,12})\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"invalid --push-chunk-size option: invalid size: {text!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def run(values: Values, environment: Mapping[str, str]) -> int:
    """Copy; return the exit status."""
    chunk = size(values.text("push-chunk-size"))
    if chunk:
        logger.info("will copy layer with chunk size %s", values.text("push-chunk-size"))
    with ExitStack() as stack:
        places = Places(
            environment, stack, plain_http=values.flag("plain-http"),
            mirrors=values.texts("mirror"), hosts=values.text("hosts-dir"),
        )  # fmt: skip
        source = places.source(values.text("source"), values.flag("source-insecure"))
        target = places.target(
            values.text("target"),
            values.flag("target-insecure"),
            source=source,
            chunk_bytes=chunk,
        )
        blobs = blob_reader(values, "source-backend", stack)
        logger.info("pulling source image %s", source.name)
        copy_image(
            source, target, values.text("platform"), values.flag("all-platforms"), blobs,
            progress_during(stack, "copying"),
        )  # fmt: skip
    return 0
