"""Compare two file trees entry by entry: names, attributes, links, xattrs and every byte."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Entry", "compare_trees", "differences", "read_tree"]

_READ_BYTES = 1 << 20


class Entry(NamedTuple):
    """One name: all that two equal trees have in common (`st_ino` and sizes of folders are not).

    `links` is the sorted tuple of all names of the inode below the top.
    """

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    rdev: int
    links: tuple[bytes, ...]
    xattrs: tuple[tuple[str, bytes], ...]
    size: int
    content: str


def _names(top: bytes) -> Iterator[tuple[bytes, bytes, os.stat_result]]:
    yield b"/", top, os.lstat(top)
    stack = [(b"", top)]
    while stack:
        inside, path = stack.pop()
        with os.scandir(path) as found:
            entries = [(e.name, e.stat(follow_symlinks=False)) for e in found]
        for name, status in entries:
            child = path + b"/" + name
            yield inside + b"/" + name, child, status
            if stat.S_ISDIR(status.st_mode):
                stack.append((inside + b"/" + name, child))


def _content(path: bytes, status: os.stat_result, progress: Callable[[int], None] | None) -> str:
    if stat.S_ISLNK(status.st_mode):
        return os.fsdecode(os.readlink(path))
    if not stat.S_ISREG(status.st_mode):
        return ""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            if progress is not None:
                progress(len(data))
    return digest.hexdigest()


def _xattrs(path: bytes) -> tuple[tuple[str, bytes], ...]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError:
        return ()
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in sorted(names))


def read_tree(
    top: Path, *, content: bool = True, progress: Callable[[int], None] | None = None
) -> dict[bytes, Entry]:
    """Read a whole tree; raise `OSError` where something cannot be read."""
    found = list(_names(os.fsencode(top)))
    groups: dict[tuple[int, int], list[bytes]] = {}
    for inside, _, status in found:
        if not stat.S_ISDIR(status.st_mode):
            groups.setdefault((status.st_dev, status.st_ino), []).append(inside)
    tree = {}
    for inside, path, status in found:
        is_dir = stat.S_ISDIR(status.st_mode)
        links = () if is_dir else tuple(sorted(groups[status.st_dev, status.st_ino]))
        tree[inside] = Entry(
            mode=status.st_mode,
            uid=status.st_uid,
            gid=status.st_gid,
            mtime_ns=status.st_mtime_ns,
            rdev=status.st_rdev,
            links=links,
            xattrs=_xattrs(path),
            size=0 if is_dir else status.st_size,
            content=_content(path, status, progress) if content else "",
        )
    return tree


def differences(
    expected: dict[bytes, Entry], got: dict[bytes, Entry], *, ignore: frozenset[str] = frozenset()
) -> list[str]:
    """Return one line for each difference; `ignore` names fields of `Entry`."""
    lines = [f"missing: {name!r}" for name in sorted(expected.keys() - got.keys())]
    lines += [f"surplus: {name!r}" for name in sorted(got.keys() - expected.keys())]
    for name in sorted(expected.keys() & got.keys()):
        for field, old, new in zip(Entry._fields, expected[name], got[name], strict=True):
            if old != new and field not in ignore:
                lines.append(f"{name!r}: {field}: expected {old!r}, got {new!r}")
    return lines


def compare_trees(
    expected: Path,
    got: Path,
    *,
    ignore: frozenset[str] = frozenset(),
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Read both trees and return their differences; the root's own mtime does not count.

    RAFS keeps no time of a source folder itself (spec rafs-v6 3.8).
    """
    trees = [read_tree(top, progress=progress) for top in (expected, got)]
    for tree in trees:
        tree[b"/"] = tree[b"/"]._replace(mtime_ns=0)
    return differences(*trees, ignore=ignore)
