"""The JSON report of `--output-json` (spec tools 2.12)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from builder.output import write_file
from erofs.rafs import Compressor
from erofs.version import VERSION

if TYPE_CHECKING:
    from builder.options import BuildResult

__all__ = ["COMPRESSOR_NAMES", "owner_events", "report", "write_report", "write_result"]

COMPRESSOR_NAMES = {
    Compressor.NONE: "none",
    Compressor.LZ4_BLOCK: "lz4_block",
    Compressor.GZIP: "gzip",
    Compressor.ZSTD: "zstd",
}
REPORT_MODE = 0o644


def report(
    *,
    bootstrap: Path | None,
    blobs: Sequence[str],
    external_bootstrap: Path | None = None,
    external_blobs: Sequence[str] = (),
    compressor: Compressor,
    version: int = 6,
    seconds: Mapping[str, float],
    events: Mapping[str, int | str],
) -> dict[str, object]:
    """Return the report with the keys that callers of the real tool read."""
    return {
        "version": VERSION,
        "bootstrap": "" if bootstrap is None else str(bootstrap),
        "blobs": list(blobs),
        "external_bootstrap": "" if external_bootstrap is None else str(external_bootstrap),
        "external_blobs": list(external_blobs),
        "trace": {
            "consumed_time": dict(sorted(seconds.items())),
            "registered_events": dict(events),
        },
        "fs_version": str(version),
        "compressor": COMPRESSOR_NAMES[compressor],
    }


def owner_events() -> dict[str, int | str]:
    """Return who ran the build, as the real report does."""
    return {"egid": str(os.getegid()), "euid": str(os.geteuid())}


def write_report(path: Path, content: dict[str, object], *, indent: int | None = 2) -> None:
    """Write the report atomically; raise `BuildError`."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(content, indent=indent, separators=separators, ensure_ascii=False)
    write_file(path, text.encode("utf-8", "surrogateescape"), REPORT_MODE)


def write_result(
    path: Path | None, result: BuildResult, events: Mapping[str, int | str] | None = None
) -> None:
    """Write the report of what was made, where one is wanted; raise `BuildError`."""
    if path is None:
        return
    content = report(
        bootstrap=result.bootstrap,
        blobs=result.blobs,
        external_bootstrap=result.external_bootstrap,
        external_blobs=result.external_blobs,
        compressor=result.compressor,
        seconds=result.seconds,
        events=events or {},
    )
    write_report(path, content)
