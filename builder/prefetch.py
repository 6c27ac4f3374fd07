"""Prefetch patterns: which files to fetch first (spec rafs-v6 2.6, tools 2.2)."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterable
from enum import StrEnum
from itertools import accumulate

from erofs import Node
from erofs.tree import iter_names

__all__ = ["PrefetchPolicy", "files_below", "find_node", "parse_patterns", "pattern_nodes"]

logger = logging.getLogger(__name__)


class PrefetchPolicy(StrEnum):
    """What a pattern list is for: a table in the bootstrap, the order in the blob, nothing."""

    FS = "fs"
    BLOB = "blob"
    NONE = "none"


def parse_patterns(lines: Iterable[bytes]) -> list[bytes]:
    """Return absolute paths in order, without those below an earlier one."""
    # In order; the root is empty here.
    chosen: dict[bytes, None] = {}
    for line in lines:
        text = line.strip()
        if not text:
            continue
        if not text.startswith(b"/"):
            logger.warning("prefetch pattern %r is not absolute, left out", text)
            continue
        parts = (b"/" + part for part in text.split(b"/") if part)
        *above, path = accumulate(parts, initial=b"")
        if path not in chosen and chosen.keys().isdisjoint(above):
            chosen[path] = None
    return [path or b"/" for path in chosen]


def find_node(root: Node, path: bytes) -> Node | None:
    """Return the node at an absolute path; symlinks are not followed."""
    node: Node | None = root
    for part in path.split(b"/"):
        if part:
            node = node.children.get(part) if node is not None and node.children else None
    return node


def pattern_nodes(root: Node, patterns: Iterable[bytes]) -> list[Node]:
    """Return the nodes that patterns name exactly; empty files and absent paths have none."""
    nodes = []
    for pattern in patterns:
        node = find_node(root, pattern)
        if node is None:
            logger.warning("prefetch pattern %r names nothing", pattern)
        elif not stat.S_ISREG(node.mode) or node.size:
            nodes.append(node)
    return nodes


def files_below(root: Node, patterns: Iterable[bytes]) -> list[Node]:
    """Return the regular files that patterns name or hold, by pattern, then in visiting order."""
    files = []
    for pattern in patterns:
        node = find_node(root, pattern)
        if node is None:
            continue
        if node.is_dir:
            files += [child for _, _, child in iter_names(node) if stat.S_ISREG(child.mode)]
        elif stat.S_ISREG(node.mode):
            files.append(node)
    return files
