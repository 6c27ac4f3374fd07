"""Bring what a layer has below symlinks of lower layers to where they lead, as unpacking does.

A layer says `bin/tool` where the image below has `bin -> usr/bin`: whoever unpacks layers one
over the other follows the link (containerd, Docker), unless the layer has a directory `bin` of
its own. Pure functions.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence

from builder.errors import BuildError
from builder.overlay import OPAQUE_MARKER, WHITEOUT_PREFIX, keep_attributes
from erofs import Node

__all__ = ["follow_links"]

_MAX_LINKS = 40


def follow_links(lower: Node, upper: Node, undescribed: set[int]) -> None:
    """Move the content of directories of `upper` that are symlinks in `lower`.

    Args:
        lower: the tree below.
        upper: the tree of one layer, changed in place.
        undescribed: identities of directories of `upper` of which only the path is known; what
            is made on the way joins them.

    Raises:
        BuildError: a loop of symlinks.
    """
    # Directories to look into; what was filled meanwhile has its turn when all else is done.
    filled: dict[tuple[bytes, ...], Node] = {(): upper} if undescribed else {}
    while filled:
        stack = list(filled.items())
        filled = {}
        while stack:
            path, directory = stack.pop()
            if OPAQUE_MARKER in directory.entries:
                continue  # nothing is below
            for name, child in list(directory.entries.items()):
                if not child.is_dir:
                    continue
                place = (*path, name)
                if not _leads_on(lower, directory, place, child, undescribed):
                    stack.append((place, child))
                    continue
                target = _resolve(lower, place)
                destination = _make(upper, target, undescribed)
                if destination is not None:
                    del directory.entries[name]
                    _merge(child, destination, undescribed)
                    filled[target] = destination


def _leads_on(
    lower: Node, directory: Node, place: tuple[bytes, ...], child: Node, undescribed: set[int]
) -> bool:
    """Tell whether a directory of a layer is a symlink below, and stays one."""
    if id(child) not in undescribed or WHITEOUT_PREFIX + place[-1] in directory.entries:
        return False
    return _is_link(_at(lower, place))


def _is_link(node: Node | None) -> bool:
    return node is not None and stat.S_ISLNK(node.mode)


def _at(root: Node, path: Sequence[bytes]) -> Node | None:
    node: Node | None = root
    for name in path:
        node = None if node is None or node.children is None else node.children.get(name)
    return node


def _resolve(root: Node, path: Sequence[bytes]) -> tuple[bytes, ...]:
    """Return a path without symlinks, none of which leads out of the root."""
    rest, links = list(path)[::-1], 0
    way: list[bytes] = []
    while rest:
        name = rest.pop()
        if name in (b"", b"."):
            continue
        if name == b"..":
            del way[-1:]
            continue
        node = _at(root, (*way, name))
        if node is None or not _is_link(node):
            way.append(name)
            continue
        links += 1
        if links > _MAX_LINKS:
            raise BuildError("parent is a loop of symlinks", entry=b"/".join(path))
        if node.target.startswith(b"/"):
            way.clear()
        rest.extend(node.target.split(b"/")[::-1])
    return tuple(way)


def _make(root: Node, path: Sequence[bytes], undescribed: set[int]) -> Node | None:
    """Return the directory of a path, made if absent; None where the layer has something else."""
    directory = root
    for name in path:
        child = directory.entries.get(name)
        if child is None:
            child = directory.entries[name] = Node.directory()
            undescribed.add(id(child))
        elif not child.is_dir:
            return None
        directory = child
    return directory


def _merge(source: Node, destination: Node, undescribed: set[int]) -> None:
    """Put the entries of one directory into another, which keeps its attributes."""
    stack = [(source, destination)]
    while stack:
        one, other = stack.pop()
        for name, child in one.entries.items():
            there = other.entries.get(name)
            if there is None or not (there.is_dir and child.is_dir):
                other.entries[name] = child
                continue
            if id(child) not in undescribed:
                keep_attributes(child, there)
                undescribed.discard(id(there))
            stack.append((child, there))
