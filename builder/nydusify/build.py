"""`nydusify build`, also called `pack` (spec tools 15.4)."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from builder.backends import BlobPlaces, blob_directory
from builder.build import BuildOptions, build
from builder.chunkdict import dictionary_path
from builder.compact import CompactOptions, compact
from builder.errors import BuildError
from builder.nydusify.convert import COMPRESSORS, number
from builder.nydusify.flags import Command, Flag, UsageError, Values
from builder.nydusify.stores import decode_store, store_values
from builder.oci.media import NYDUS_BLOB
from builder.oci.objects import ObjectBlobs, object_backend
from builder.oci.records import Descriptor
from builder.options import BuildResult
from builder.progress import progress_during
from builder.report import owner_events, write_result
from fscache.backend import ObjectStoreConfig
from fscache.backend.retry import RetryPolicy

__all__ = ["COMMAND", "compact_settings", "run"]

logger = logging.getLogger(__name__)

_COPY_BYTES = 1 << 20
# Spec tools 15.4.
_COMPACT = {
    "min_used_ratio": 5,
    "compact_blob_size": 10 << 20,
    "max_compact_size": 100 << 20,
    "layers_to_compact": 32,
}

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
    """Build, and push what was built when that is wanted; return the exit status."""
    if values.text("fs-version") != "6":
        raise UsageError("RAFS v5 is not written, only v6 is: leave --fs-version out")
    if values.text("compressor") not in COMPRESSORS:
        raise UsageError(f"--compressor should be one of {', '.join(COMPRESSORS)}")
    output, name = Path(values.text("output-dir")), values.text("name")
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        pushes = values.flag("backend-push")
        bucket = _bucket(values) if pushes or values.flag("compact") else None
        parent = Path(values.text("parent-bootstrap")) if values.text("parent-bootstrap") else None
        if bucket is not None and values.flag("compact") and parent is not None:
            parent = _compacted(values, parent, output, bucket.blobs, stack)
        result = _build(values, output, name, parent, progress_during(stack, "chunking"))
        if pushes or parent is not None:
            _rename_blob(result, output)
        if bucket is not None and pushes:
            _push(result, bucket, output, name, stack)
    logger.info("built %s, data blobs: %s", result.bootstrap, ", ".join(result.blobs) or "none")
    return 0


def _build(
    values: Values,
    output: Path,
    name: str,
    parent: Path | None,
    progress: Callable[[int], None] | None,
) -> BuildResult:
    dictionary = values.text("chunk-dict")
    result = build(
        Path(values.text("source-dir")),
        BuildOptions(
            bootstrap=output / f"{name}.meta",
            blob=output / f"{name}.blob",
            compressor=COMPRESSORS[values.text("compressor")],
            chunk_size=number(values, "chunk-size"),
            chunk_dict=dictionary_path(dictionary) if dictionary else None,
            parent_bootstrap=parent,
            progress=progress,
        ),
    )
    write_result(output / "output.json", result, owner_events())
    return result


class _Bucket(NamedTuple):
    """Where metadata and data go: one bucket, two prefixes."""

    meta: ObjectStoreConfig
    blobs: ObjectStoreConfig


def _bucket(values: Values) -> _Bucket:
    """Return the bucket that flags name; raise `NydusError`."""
    found = store_values(values, "backend")
    if found is None or found["type"] == "localfs":
        raise UsageError("--backend-type should be one of [oss s3]")
    config = found["config"]
    usual = config.get("object_prefix", "")
    places = []
    for key in ("meta_prefix", "blob_prefix"):
        own = {k: v for k, v in config.items() if k not in ("meta_prefix", "blob_prefix")}
        own["object_prefix"] = config.get(key, usual)
        decoded = decode_store({"type": found["type"], "config": own}, "backend-config")
        if not isinstance(decoded, ObjectStoreConfig):
            raise UsageError("--backend-type should be one of [oss s3]")
        places.append(decoded)
    return _Bucket(*places)


def _compacted(
    values: Values, parent: Path, output: Path, config: ObjectStoreConfig, stack: ExitStack
) -> Path:
    """Rewrite the parent's blobs where that is worth it; return the bootstrap to build on."""
    local, remote = blob_directory(output), object_backend(config)
    stack.callback(local.close)
    stack.callback(remote.close)
    dictionary = values.text("chunk-dict")
    result = compact(
        parent,
        BlobPlaces(output, local, remote),
        CompactOptions(
            bootstrap=Path(f"{parent}.compact"),
            blob_dir=output,
            chunk_dict=dictionary_path(dictionary) if dictionary else None,
            progress=progress_during(stack, "compacting"),
            **compact_settings(values.text("compact-config-file")),
        ),
    )
    if result.bootstrap is None:
        raise BuildError("compacting gave no metadata", path=parent)
    write_result(output / "compact-result.json", result)
    logger.info("successfully compacted bootstrap %s, use new parent %s", parent, result.bootstrap)
    return result.bootstrap


def compact_settings(path: str) -> dict[str, int]:
    """Return the numbers of a configuration file over the defaults; raise `BuildError`.

    Names are as documented or as the real tool reads them: `min_used_ratio` or `MinUsedRatio`,
    numbers also as text.
    """
    if not path:
        return dict(_COMPACT)
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise BuildError("configuration of compacting is not JSON", path=path) from error
    if not isinstance(value, dict):
        raise BuildError("configuration of compacting is not an object", path=path)
    given = {name.replace("_", "").lower(): number for name, number in value.items()}
    found = {}
    for name, usual in _COMPACT.items():
        number = given.pop(name.replace("_", ""), usual)
        if not re.fullmatch(r"\d{1,15}", str(number)) or isinstance(number, bool):
            raise BuildError(f"{name} is no number", path=path)
        found[name] = int(number)
    if given:
        logger.warning("%s: unknown keys %s", path, ", ".join(sorted(given)))
    return found


def _rename_blob(result: BuildResult, output: Path) -> None:
    """Give a blob its id as name: the next build and the bucket find it by that."""
    if result.blob_path is not None and result.blob_path.is_file():
        result.blob_path = result.blob_path.rename(output / result.blobs[-1])


def _push(result: BuildResult, bucket: _Bucket, output: Path, name: str, stack: ExitStack) -> None:
    """Put blobs, the parent's here among them, and then the metadata that refers to them."""
    logger.info("start to push meta and blob to remote backend")
    blobs = ObjectBlobs(bucket.blobs, output, RetryPolicy())
    stack.callback(blobs.close)
    for blob in result.blobs:
        path = output / blob
        if path.is_file():
            size = path.stat().st_size
            logger.info("push blob %s", blob)
            with path.open("rb") as file:
                pieces = iter(lambda file=file: file.read(_COPY_BYTES), b"")  # type: ignore[misc]
                blobs.put(Descriptor(NYDUS_BLOB, f"sha256:{blob}", size), pieces)
    if result.bootstrap is not None:
        meta = ObjectBlobs(bucket.meta, output, RetryPolicy())
        stack.callback(meta.close)
        data = result.bootstrap.read_bytes()
        meta.store(name, [data], len(data))
