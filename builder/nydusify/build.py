"""`nydusify build`, also called `pack` (spec tools 15.4)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from builder.build import BuildOptions, build
from builder.chunkdict import dictionary_path
from builder.nydusify.convert import COMPRESSORS, number
from builder.nydusify.flags import Command, Flag, UsageError, Values
from builder.oci.errors import ImageError
from builder.report import owner_events, report, write_report

__all__ = ["COMMAND", "run"]

logger = logging.getLogger(__name__)

COMMAND = Command(
    "build",
    "Build a Nydus filesystem from a source directory",
    (
        Flag("source-dir", "Directory to build from", required=True, aliases=("target-dir",)),
        Flag("output-dir", "Output directory", "./.nydus-build-output", ("o",)),
        Flag("name", "Name of the results", required=True, aliases=("meta", "bootstrap")),
        Flag("backend-push", "Push the blob to a storage backend", False),
        Flag("backend-type", "Type of storage backend", "oss"),
        Flag("backend-config", "Json configuration string for storage backend"),
        Flag("backend-config-file", "Json configuration file for storage backend"),
        Flag("chunk-dict", "Chunk dictionary: bootstrap=PATH"),
        Flag("parent-bootstrap", "Bootstrap of the image to build on"),
        Flag("compact", "Compact the parent first", False),
        Flag("compact-config-file", "Configuration of compacting"),
        Flag("fs-version", "Nydus image format version number, possible values: 6", "6"),
        Flag("compressor", "Algorithm to compress data: none, lz4_block, zstd", "zstd"),
        Flag("chunk-size", "Size of data chunks", "0x100000"),
        Flag("nydus-image", "Accepted and not used: the builder is built in", "nydus-image"),
    ),
    ("pack",),
)


def run(values: Values, environment: Mapping[str, str]) -> int:
    """Build; return the exit status."""
    for name in ("backend-push", "compact"):
        if values.flag(name):
            raise ImageError(f"--{name} is not supported in this version")
    if values.text("fs-version") != "6":
        raise UsageError("RAFS v5 is not written, only v6 is: leave --fs-version out")
    if values.text("compressor") not in COMPRESSORS:
        raise UsageError(f"--compressor should be one of {', '.join(COMPRESSORS)}")
    output, name = Path(values.text("output-dir")), values.text("name")
    output.mkdir(parents=True, exist_ok=True)
    dictionary, parent = values.text("chunk-dict"), values.text("parent-bootstrap")
    result = build(
        Path(values.text("source-dir")),
        BuildOptions(
            bootstrap=output / f"{name}.meta",
            blob=output / f"{name}.blob",
            compressor=COMPRESSORS[values.text("compressor")],
            chunk_size=number(values, "chunk-size"),
            chunk_dict=dictionary_path(dictionary) if dictionary else None,
            parent_bootstrap=Path(parent) if parent else None,
        ),
    )
    content = report(
        bootstrap=result.bootstrap,
        blobs=result.blobs,
        compressor=result.compressor,
        seconds=result.seconds,
        events=owner_events(),
    )
    write_report(output / "output.json", content)
    logger.info("built %s, data blobs: %s", result.bootstrap, ", ".join(result.blobs) or "none")
    return 0
