"""`nydusify optimize` (spec tools 15.6)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from builder.convert.rework import optimize_image
from builder.nydusify.convert import work_directory
from builder.nydusify.copy import size
from builder.nydusify.flags import Command, Flag, UsageError, Values
from builder.nydusify.places import Places
from builder.nydusify.stores import blob_store
from builder.oci import media
from builder.oci.errors import ImageError
from builder.progress import progress_during

__all__ = ["COMMAND", "run"]

logger = logging.getLogger(__name__)

_POLICY = "separated-blob-with-prefetch-files"
COMMAND = Command(
    "optimize",
    "Optimize a source nydus image and push to the target",
    (
        Flag("source", "Source (Nydus) image reference", required=True),
        Flag("target", "Target (Nydus) image reference", required=True),
        Flag("source-insecure", "Skip verifying server certs for HTTPS source registry", False),
        Flag("target-insecure", "Skip verifying server certs for HTTPS target registry", False),
        Flag("policy", "Optimize policy", _POLICY, env="OPTIMIZE_POLICY"),
        Flag("prefetch-files", "File path with the prefetch files in JSON", required=True),
        Flag("source-backend-type", "Where the data is: oss, s3, localfs"),
        Flag("source-backend-config", "Json configuration string for storage backend"),
        Flag("source-backend-config-file", "Json configuration file for storage backend"),
        Flag("push-chunk-size", "Chunk size for pushing a blob layer in chunks", "0MB"),
        Flag("plain-http", "Enable plain http", False),
        Flag("work-dir", "Working directory", "./tmp"),
        Flag("nydus-image", "Accepted and not used: the builder is built in", "nydus-image"),
    ),
)


def run(values: Values, environment: Mapping[str, str]) -> int:
    """Optimise; return the exit status."""
    if values.text("policy") != _POLICY:
        raise UsageError(f"--policy should be {_POLICY}")
    files = Path(values.text("prefetch-files")).read_text("utf-8", "surrogateescape")
    with ExitStack() as stack:
        work = stack.enter_context(work_directory(values, "nydusify-"))
        places = Places(environment, stack, plain_http=values.flag("plain-http"))
        source = places.source(values.text("source"), values.flag("source-insecure"))
        target = places.target(
            values.text("target"), values.flag("target-insecure"), source=source,
            chunk_bytes=size(values.text("push-chunk-size")),
        )  # fmt: skip
        top = source.resolve()
        if media.is_index(top.media_type):
            raise ImageError(f"{source.name} is an index, one image is wanted")
        store = blob_store(values, "source-backend", work, places.retry, stack)
        start = time.monotonic()
        progress = progress_during(stack, "optimizing")
        optimize_image(source, target, top, files, work, store, progress)
        logger.info("pushed new image, elapsed: %.6fs", time.monotonic() - start)
    return 0
