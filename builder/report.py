"""The JSON report of `--output-json` (spec tools 2.12)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from builder.output import write_file
from erofs.rafs import Compressor
from erofs.version import VERSION

__all__ = ["COMPRESSOR_NAMES", "owner_events", "report", "write_report"]

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
    seconds: dict[str, float],
    events: dict[str, int | str],
) -> dict[str, object]:
    """Return the report with the keys that callers of the real tool read."""
    return {
        "version": VERSION,
        "bootstrap": "" if bootstrap is None else str(bootstrap),
        "blobs": list(blobs),
        "external_bootstrap": "" if external_bootstrap is None else str(external_bootstrap),
        "external_blobs": list(external_blobs),
        "trace": {"consumed_time": dict(sorted(seconds.items())), "registered_events": events},
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
