"""What every source needs to know, and what it feeds."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from builder.chunker import ContentReader
from erofs import Node
from erofs.values import Value

__all__ = ["ContentSink", "SourceOptions", "WhiteoutSpec"]


class WhiteoutSpec(StrEnum):
    """How deletions are marked in a layer."""

    OCI = "oci"
    OVERLAYFS = "overlayfs"
    NONE = "none"


class ContentSink(Protocol):
    """Takes the content of regular files, in the order in which it is added."""

    def add_file(self, node: Node, content: ContentReader) -> None:
        """Cut `node.size` bytes of `content` into `node.chunks`."""


class SourceOptions(Value):
    """How sources are read.

    Args:
        whiteout_spec: which deletion marks a directory source leaves out.
        keep_owners: False puts 0/0 in place of every owner.
        pax_mtime: take times of PAX records, with nanoseconds, where the real tool only
            looks at the header's whole seconds.
        undescribed: takes the paths, without a slash in front, of directories that a tar has
            entries in but none for; they are empty for the root.
    """

    whiteout_spec: WhiteoutSpec = WhiteoutSpec.OCI
    keep_owners: bool = True
    pax_mtime: bool = False
    undescribed: list[bytes] | None = None
