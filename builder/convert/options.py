"""What a conversion is asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from builder.oci.place import Source
from builder.oci.records import Descriptor
from erofs.rafs import DEFAULT_CHUNK_SIZE, Compressor

__all__ = ["ConvertOptions", "Dictionary"]

FS_VERSION = "6"
# Layers that are read, built and sent at the same time; each has three pieces of an upload and
# some chunks in memory.
MAX_LAYERS = 3
# More have nothing to do beside the one thread that walks a layer, and take memory each.
MAX_WORKERS = 4


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A chunk dictionary: its bootstrap, the blobs that it refers to, and where they are."""

    bootstrap: Path
    digest: str
    blobs: tuple[Descriptor, ...] = ()
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert.

    Args:
        work: a scratch directory that the caller makes and removes.
        builder_version: for the manifest's annotation.
        oci_ref: leave the data in the original layers (zran).
        oci: turn Docker's media types into OCI's.
        merge_platform: an index with the original and the Nydus image.
        with_referrer: name the original as `subject`.
        all_platforms: convert every image of an index; wins over `platforms`.
        platforms: which images of an index to convert, as a comma list; this machine's if empty.
        patterns: prefetch patterns.
        dictionary: chunks that need not be stored.
        layers_at_once: how many layers are under way together.
        workers: threads that digest and compress one layer.
        layer_attempts: how often a layer is begun whose upload the registry forgets.
        progress: called with numbers of content bytes.
    """

    work: Path
    builder_version: str = ""
    compressor: Compressor = Compressor.ZSTD
    chunk_size: int = DEFAULT_CHUNK_SIZE
    batch_size: int = 0
    oci_ref: bool = False
    oci: bool = False
    merge_platform: bool = False
    with_referrer: bool = False
    all_platforms: bool = False
    platforms: str = ""
    patterns: tuple[bytes, ...] = (b"/",)
    dictionary: Dictionary | None = None
    layers_at_once: int = min(MAX_LAYERS, os.cpu_count() or 1)
    workers: int = min(MAX_WORKERS, os.cpu_count() or 1)
    layer_attempts: int = 3
    progress: Callable[[int], None] | None = None

    def layer_key(self) -> str:
        """Return what a converted layer depends on beside its source, as one word."""
        patterns = hashlib.sha256(b"\n".join(self.patterns)).hexdigest()[:16]
        parts = [
            f"fs={FS_VERSION}",
            "type=targz-ref" if self.oci_ref else "type=tar-rafs",
            f"chunk={self.chunk_size:#x}",
        ]
        if not self.oci_ref:
            parts += [
                f"compressor={self.compressor.name.lower()}",
                f"batch={self.batch_size:#x}",
                f"prefetch={patterns}",
            ]
        if self.dictionary is not None:
            parts.append(f"dict={self.dictionary.digest}")
        parts.append(f"builder={self.builder_version}")
        return ";".join(parts)
