"""What the demo prints: numbered steps, commands to repeat, and numbers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from erofs import open_bootstrap

__all__ = ["Fetched", "ImageFacts", "Printer", "percent", "size_text"]


def size_text(count: int) -> str:
    """Return a size in MB of a million bytes, small ones in kB of a thousand."""
    if count < 100_000:
        return f"{count / 1e3:.1f} kB" if count else "0 bytes"
    value = count / 1e6
    return f"{value:,.0f} MB" if value >= 100 else f"{value:.1f} MB"


def percent(part: int, whole: int) -> str:
    """Return a share in per cent."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


class Printer:
    """Prints steps; `names` are directories and what commands show in their place."""

    def __init__(self) -> None:
        self._number = 0
        self.names: dict[Path, str] = {}

    def line(self, text: str, indent: int = 3) -> None:
        """Print a line below the step."""
        safe = text.encode("utf-8", "backslashreplace").decode()
        sys.stdout.write(" " * indent + safe + "\n")
        sys.stdout.flush()

    def step(self, text: str) -> None:
        """Begin the next step."""
        self._number += 1
        self.line(f"\n{self._number}. {text}", 0)

    def command(self, words: Sequence[str]) -> None:
        """Print a command as the reader would type it."""
        self.line(f"$ {self.short(shlex.join(words))}")

    def short(self, text: str) -> str:
        """Put the names of directories in."""
        for directory, name in self.names.items():
            text = text.replace(str(directory), name)
        return text


class ImageFacts(NamedTuple):
    """Sizes and counts of an image; `references` are the chunks that its files consist of."""

    entries: int
    files: int
    content_bytes: int
    references: int
    chunks: int
    chunk_bytes: int
    blob_bytes: int
    bootstrap_bytes: int

    @classmethod
    def read(cls, bootstrap: Path) -> ImageFacts:
        """Count what a bootstrap says; files with several names count once."""
        with open_bootstrap(bootstrap) as image:
            entries = 0
            files: dict[int, int] = {}
            for _, inode in image.walk():
                entries += 1
                if inode.is_regular:
                    files[inode.nid] = inode.size
            return cls(
                entries=entries,
                files=len(files),
                content_bytes=sum(files.values()),
                references=sum(-(-size // image.chunk_size) for size in files.values()),
                chunks=len(image.chunk_infos),
                chunk_bytes=sum(info.uncompressed_size for info in image.chunk_infos),
                blob_bytes=sum(blob.compressed_size for blob in image.blobs),
                bootstrap_bytes=bootstrap.stat().st_size,
            )

    def lines(self) -> list[str]:
        """Describe the image."""
        again = self.references - self.chunks
        return [
            f"{self.entries:,} entries, {self.files:,} of them files with"
            f" {size_text(self.content_bytes)}",
            f"{self.references:,} chunks, {self.chunks:,} are different: deduplication saves"
            f" {again:,} chunks, {size_text(self.content_bytes - self.chunk_bytes)}",
            f"blob {size_text(self.blob_bytes)} ({percent(self.blob_bytes, self.content_bytes)}"
            f" of the content), bootstrap {size_text(self.bootstrap_bytes)}",
        ]


class Fetched(NamedTuple):
    """What has come from the server since the start."""

    requests: int
    transferred_bytes: int
    chunks: int

    def line(self, image: ImageFacts) -> str:
        """Say how much of the image that is."""
        return (
            f"fetched so far: {self.requests:,} requests,"
            f" {size_text(self.transferred_bytes)} of {size_text(image.blob_bytes)}"
            f" ({percent(self.transferred_bytes, image.blob_bytes)}),"
            f" {self.chunks:,} of {image.chunks:,} chunks ({percent(self.chunks, image.chunks)})"
        )
