"""Entries of trees that are compared, and how they are written down."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Entry", "Named", "tree_digest", "walk"]


@dataclass(slots=True, eq=False)
class Entry:
    """A file of any type; hard links are one entry under several names.

    Args:
        mode: the whole st_mode.
        mtime: in whole seconds; None when nobody said it.
        has_fraction: whether there was more than whole seconds, which a tar's header may have
            rounded up.
        rdev: in Linux' encoding.
        size: of a regular file in bytes.
        digests: of the pieces of a regular file, each as long as a chunk of the image.
        children: of a directory.
        layer: which layer it came from.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int | None = None
    rdev: int = 0
    size: int = 0
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    digests: tuple[bytes, ...] = ()
    children: dict[bytes, Entry] | None = None
    layer: int = 0
    has_fraction: bool = False

    @classmethod
    def directory(cls, layer: int = 0) -> Entry:
        """Return a directory that nobody described."""
        return cls(stat.S_IFDIR | 0o755, children={}, layer=layer)

    @property
    def content(self) -> str:
        """Digest of the digests of the pieces; empty for what has no content."""
        if not self.digests:
            return ""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()


@dataclass(frozen=True, slots=True)
class Named:
    """An entry with its path; `first` is the smallest path of the same file."""

    path: bytes
    entry: Entry
    first: bytes

    def describe(self) -> str:
        """Return it as `check` prints it (spec tools 15.2)."""
        entry = self.entry
        xattrs = " ".join(
            f"{_text(name)}:{value.hex()}" for name, value in sorted(entry.xattrs.items())
        )
        target = _text(entry.target) if entry.target else _text(self.path)
        return (
            f"path: {_text(self.path)}, size: {entry.size}, mode: {_go_mode(entry.mode)},"
            f" rdev: {entry.rdev}, symink: {target}, uid: {entry.uid}, gid: {entry.gid},"
            f" xattrs: map[{xattrs}], hash: {entry.content}"
        )

    def line(self) -> bytes:
        """Return all that is compared, as one line."""
        entry = self.entry
        xattrs = b",".join(
            name.hex().encode() + b"=" + value.hex().encode()
            for name, value in sorted(entry.xattrs.items())
        )
        words = (
            self.path.hex().encode(), b"%o" % entry.mode, b"%d" % entry.uid, b"%d" % entry.gid,
            b"" if entry.mtime is None else b"%d" % entry.mtime, b"%x" % entry.rdev,
            b"%d" % entry.size, entry.target.hex().encode(), xattrs, entry.content.encode(),
            self.first.hex().encode() if self.first != self.path else b"",
        )  # fmt: skip
        return b" ".join(words) + b"\n"


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _go_mode(mode: int) -> int:
    """Return the decimal mode that Go's programs print: permissions, and bits of their own."""
    kinds = {
        stat.S_IFDIR: 1 << 31, stat.S_IFLNK: 1 << 27, stat.S_IFIFO: 1 << 25,
        stat.S_IFSOCK: 1 << 24, stat.S_IFBLK: 1 << 26, stat.S_IFCHR: 1 << 26 | 1 << 21,
    }  # fmt: skip
    value = mode & 0o777 | kinds.get(stat.S_IFMT(mode), 0)
    for bit, go in ((stat.S_ISUID, 1 << 23), (stat.S_ISGID, 1 << 22), (stat.S_ISVTX, 1 << 20)):
        if mode & bit:
            value |= go
    return value


def walk(root: Entry) -> Iterator[Named]:
    """Yield every name in the order of paths, the root first as `/`."""
    firsts: dict[int, bytes] = {}
    stack: list[tuple[bytes, Entry]] = [(b"/", root)]
    while stack:
        path, entry = stack.pop()
        yield Named(path, entry, firsts.setdefault(id(entry), path))
        if entry.children is not None:
            base = path.rstrip(b"/")
            stack.extend(
                (base + b"/" + name, entry.children[name])
                for name in sorted(entry.children, reverse=True)
            )


def tree_digest(root: Entry) -> tuple[str, int]:
    """Return the digest of a whole tree, and the number of its names."""
    total, count = hashlib.sha256(), 0
    for named in walk(root):
        total.update(named.line())
        count += 1
    return f"sha256:{total.hexdigest()}", count
