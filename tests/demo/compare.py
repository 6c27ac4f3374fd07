"""Read a mounted image to the last byte and compare it with its source.

A program of its own, `python -m tests.demo.compare SOURCE MOUNT [TAR]`, because a process
that reads from a mount must be one that can be ended. TAR is what SOURCE was extracted from.
"""

from __future__ import annotations

import stat
import sys
import tarfile
from pathlib import Path, PurePosixPath

from tests.treecompare import Entry, differences, read_tree

__all__ = ["compare"]

SHOWN = 20
Tree = dict[bytes, Entry]


def _folders_in(tar: Path) -> set[bytes]:
    with tarfile.open(tar) as archive:
        return {
            str(PurePosixPath("/", member.name)).encode(errors="surrogateescape")
            for member in archive
            if member.isdir()
        }


def _align_implied_folders(expected: Tree, got: Tree, tar: Path) -> None:
    """Let the time of folders that the tar does not list be that of the image, which is 0."""
    undated = [
        name
        for name, entry in got.items()
        if stat.S_ISDIR(entry.mode) and entry.mtime_ns == 0 and name in expected
    ]
    if undated:
        listed = _folders_in(tar)
        for name in undated:
            if name not in listed:
                expected[name] = expected[name]._replace(mtime_ns=0)


def compare(source: Path, mount: Path, tar: Path | None) -> tuple[int, int, list[str]]:
    """Return the number of entries and of content bytes of the mount, and the differences."""
    expected, got = read_tree(source), read_tree(mount)
    # RAFS keeps no time of a source folder itself (spec rafs-v6 3.8).
    for tree in (expected, got):
        tree[b"/"] = tree[b"/"]._replace(mtime_ns=0)
    if tar is not None:
        _align_implied_folders(expected, got, tar)
    # Files with several names count once.
    content = sum(
        entry.size
        for name, entry in got.items()
        if stat.S_ISREG(entry.mode) and name == entry.links[0]
    )
    return len(got), content, differences(expected, got)


def main(arguments: list[str]) -> int:
    """Print one line when the trees are equal, else their differences, with status 1."""
    if not 2 <= len(arguments) <= 3:
        print("usage: python -m tests.demo.compare SOURCE MOUNT [TAR]", file=sys.stderr)
        return 2
    paths = [Path(argument) for argument in arguments]
    try:
        entries, content, found = compare(paths[0], paths[1], paths[2] if paths[2:] else None)
    except (OSError, tarfile.TarError) as error:
        print(f"Error: comparing failed: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"trees are identical: {entries:,} entries, {content:,} bytes")
        return 0
    print(f"trees differ: {len(found):,} differences")
    for line in found[:SHOWN]:
        print(line)
    if found[SHOWN:]:
        print(f"... and {len(found) - SHOWN:,} more")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
