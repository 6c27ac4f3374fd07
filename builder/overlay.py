"""Lay one tree over another: OCI and overlayfs whiteouts (spec rafs-v6 5.4). Pure functions."""

from __future__ import annotations

import stat
from collections.abc import Collection

from builder.source.options import WhiteoutSpec
from erofs import Node

__all__ = ["apply_layer", "keep_attributes"]

WHITEOUT_PREFIX = b".wh."
OPAQUE_MARKER = b".wh..wh..opq"
OVERLAY_OPAQUE = b"trusted.overlay.opaque"


def apply_layer(
    lower: Node,
    upper: Node,
    spec: WhiteoutSpec = WhiteoutSpec.OCI,
    undescribed: Collection[int] = (),
) -> Node:
    """Return the root of `upper` over `lower`; both trees are used up.

    The upper root's attributes replace the lower one's. Recursion is replaced by a
    stack, since layers decide how deep their directories are.

    Args:
        lower: the tree below.
        upper: the tree above.
        spec: how `upper` marks deletions.
        undescribed: identities of directories of `upper` of which only the path is known, so
            that those below keep their attributes.
    """
    root = upper
    if id(upper) in undescribed:
        keep_attributes(lower, upper)
    stack = [(lower.entries, upper)]
    while stack:
        below, node = stack.pop()
        kept = _kept(below, node, spec)
        merged = below
        for name, child in kept.items():
            old = merged.get(name)
            if child.is_dir:
                inherited = old.entries if old is not None and old.is_dir else {}
                if old is not None and old.is_dir and id(child) in undescribed:
                    keep_attributes(old, child)
                if _take_opaque_mark(child, spec):
                    inherited = {}
                stack.append((inherited, child))
            merged[name] = child
        node.children = merged
    return root


def keep_attributes(lower: Node, upper: Node) -> None:
    """Give a directory the attributes of the one below it."""
    upper.mode, upper.uid, upper.gid = lower.mode, lower.uid, lower.gid
    upper.mtime, upper.mtime_nsec, upper.xattrs = lower.mtime, lower.mtime_nsec, lower.xattrs


def _kept(below: dict[bytes, Node], node: Node, spec: WhiteoutSpec) -> dict[bytes, Node]:
    """Carry out the deletions that `node` asks for in `below`; return its other children."""
    if spec is WhiteoutSpec.NONE:
        return dict(node.entries)
    if spec is WhiteoutSpec.OCI and OPAQUE_MARKER in node.entries:
        below.clear()
    kept: dict[bytes, Node] = {}
    for name, child in node.entries.items():
        deleted = _deleted_name(name, child, spec)
        if deleted is None:
            kept[name] = child
        else:
            below.pop(deleted, None)
    return kept


def _deleted_name(name: bytes, child: Node, spec: WhiteoutSpec) -> bytes | None:
    """Return which lower name an entry deletes, None when it is no deletion mark."""
    if spec is WhiteoutSpec.OCI:
        return name[len(WHITEOUT_PREFIX) :] if name.startswith(WHITEOUT_PREFIX) else None
    is_whiteout = stat.S_ISCHR(child.mode) and child.rdev == 0
    return name if is_whiteout else None


def _take_opaque_mark(child: Node, spec: WhiteoutSpec) -> bool:
    if spec is not WhiteoutSpec.OVERLAYFS or child.xattrs.get(OVERLAY_OPAQUE) != b"y":
        return False
    child.xattrs = {name: value for name, value in child.xattrs.items() if name != OVERLAY_OPAQUE}
    return True
