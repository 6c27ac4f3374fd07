"""Two trees beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from builder.proof.entry import Entry, Named, walk
from erofs.errors import NydusError

__all__ = ["COMPARED", "Difference", "TreesDiffer", "compare", "require_equal"]

COMPARED = (
    "path", "type", "permissions", "owner", "group", "mtime", "device number", "size",
    "link target", "extended attributes", "content", "hard links",
)  # fmt: skip
_SHOWN = 10


class TreesDiffer(NydusError):
    """A converted image that is not its source."""


class Difference(NamedTuple):
    """Entries of one path that are not equal; None where there is none."""

    source: Named | None
    target: Named | None

    def describe(self) -> str:
        """Return both, as `check` prints them."""
        source = "nothing" if self.source is None else self.source.describe()
        target = "nothing" if self.target is None else self.target.describe()
        reason = self._reason()
        return f"\n\t[source] {source}\n\t[target] {target}{reason}"

    def _reason(self) -> str:
        """Return what the lines do not show."""
        if self.source is None or self.target is None:
            return ""
        one, other = self.source.entry, self.target.entry
        if not _same_time(one, other):
            return f"\n\tmtime: {one.mtime} and {other.mtime}"
        if self.source.first != self.target.first:
            return f"\n\thard link: {self.source.first!r} and {self.target.first!r}"
        return ""


def _equal(one: Named, other: Named) -> bool:
    first, second = one.entry, other.entry
    return (
        first.mode == second.mode
        and first.uid == second.uid
        and first.gid == second.gid
        and _same_time(first, second)
        and first.rdev == second.rdev
        and first.size == second.size
        and first.target == second.target
        and first.digests == second.digests
        and first.xattrs == second.xattrs
        and one.first == other.first
    )


def _same_time(source: Entry, target: Entry) -> bool:
    """Tell whether times are equal as far as an image keeps them: whole seconds of the header.

    A directory that no layer describes has no time of its own. Python's tar writer, for one,
    rounds the header's seconds and puts the exact time into a record.
    """
    if source.mtime is None or source.mtime == target.mtime:
        return True
    return source.has_fraction and target.mtime == source.mtime + 1


def compare(source: Entry, target: Entry) -> Iterator[Difference]:
    """Yield the differences of two trees, in the order of paths."""
    ones, others = walk(source), walk(target)
    one, other = next(ones, None), next(others, None)
    while one is not None or other is not None:
        if one is not None and other is not None and one.path == other.path:
            if not _equal(one, other):
                yield Difference(one, other)
            one, other = next(ones, None), next(others, None)
        elif other is None or (one is not None and _key(one.path) < _key(other.path)):
            yield Difference(one, None)
            one = next(ones, None)
        else:
            yield Difference(None, other)
            other = next(others, None)


def _key(path: bytes) -> list[bytes]:
    return path.split(b"/")


def require_equal(source: Entry, target: Entry) -> None:
    """Raise `TreesDiffer` unless two trees are equal; names the first differences."""
    found = list(islice(compare(source, target), _SHOWN))
    if found:
        text = "".join(one.describe() for one in found)
        raise TreesDiffer(f"file not match in target image:{text}")
