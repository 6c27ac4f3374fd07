"""The tree of an OCI image: its layers unpacked one over the other (OCI image spec, layer.md)."""

from __future__ import annotations

import hashlib
import stat
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import IO, NamedTuple, cast

from builder.errors import BuildError
from builder.oci.plain import PIECE_BYTES
from builder.proof.entry import Entry
from builder.tarpax import decode_pax
from erofs.digest import function
from erofs.errors import IntegrityError
from erofs.layout import encode_device_number
from erofs.rafs import Digester

__all__ = ["LayerItem", "lay_together", "read_layer"]

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_MAX_SYMLINKS = 40
# What eStargz keeps in the root of a layer for itself; no image has them (spec rafs-v6 3.8).
_NOT_CONTENT = (b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark")
_KINDS = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}
_XATTR_WORDS = ("SCHILY.xattr.", "LIBARCHIVE.xattr.", "SCHILY.acl.")


class LayerItem(NamedTuple):
    """A member of a layer: where it is, what it is, and for a hard link to which name."""

    parts: tuple[bytes, ...]
    entry: Entry
    link: tuple[bytes, ...] | None


class _Forward:
    """Pieces as the file that the library reads: forward only, which is how it reads a tar."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = b""
        self._place = 0
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        rest = position - self._position
        if rest < 0:
            raise tarfile.StreamError("seeking backwards")
        while rest:
            skipped = len(self.read(min(rest, PIECE_BYTES)))
            if not skipped:
                return
            rest -= skipped

    def read(self, size: int) -> bytes:
        """Return as many bytes, fewer only at the end."""
        data = self._piece[self._place : self._place + size]
        self._place += len(data)
        if len(data) < size:
            data = self._read_on(data, size)
        self._position += len(data)
        return data

    def _read_on(self, data: bytes, size: int) -> bytes:
        parts, missing = [data], size - len(data)
        while missing:
            self._piece = next(self._pieces, b"")
            if not self._piece:
                break
            parts.append(self._piece[:missing])
            self._place = len(parts[-1])
            missing -= self._place
        return b"".join(parts)


def _parts(name: str) -> tuple[bytes, ...]:
    raw = name.encode("utf-8", "surrogateescape")
    parts: list[bytes] = []
    for part in raw.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return tuple(parts)


def _xattrs(member: tarfile.TarInfo) -> tuple[dict[bytes, bytes], int | None]:
    """Return extended attributes, and the permissions that an access control list sets."""
    words = {
        key.encode("utf-8", "surrogateescape"): text.encode("utf-8", "surrogateescape")
        for key, text in member.pax_headers.items()
        if key.startswith(_XATTR_WORDS)
    }
    if not words:
        return {}, None
    fields = decode_pax(words, member.name.encode("utf-8", "surrogateescape"))
    return fields.xattrs, fields.permissions


def _entry(member: tarfile.TarInfo) -> Entry:
    kind = _KINDS.get(member.type, stat.S_IFREG)
    xattrs, permissions = _xattrs(member)
    mode = kind | member.mode & 0o7777
    if permissions is not None:
        mode = mode & ~0o777 | permissions
    entry = Entry(mode, member.uid, member.gid, int(member.mtime // 1), xattrs=xattrs)
    entry.has_fraction = member.mtime % 1 != 0
    if kind == stat.S_IFDIR:
        entry.children = {}
    elif kind == stat.S_IFLNK:
        entry.target = member.linkname.encode("utf-8", "surrogateescape")
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        entry.rdev = encode_device_number(member.devmajor, member.devminor)
    elif kind == stat.S_IFREG:
        entry.size = member.size
    return entry


def _digests(
    tar: tarfile.TarFile,
    stream: _Forward,
    member: tarfile.TarInfo,
    digest: Callable[[bytes], bytes],
    length: int,
) -> tuple[bytes, ...]:
    """Return the digests of the pieces of a file's content, each of `length` bytes."""
    if member.sparse is not None:
        content = cast(IO[bytes], tar.extractfile(member))
        return tuple(digest(piece) for piece in iter(partial(content.read, length), b""))
    stream.seek(member.offset_data)
    found, rest = [], member.size
    while rest:
        piece = stream.read(min(rest, length))
        if not piece:
            raise tarfile.ReadError("unexpected end of data")
        rest -= len(piece)
        found.append(digest(piece))
    return tuple(found)


def read_layer(
    pieces: Generator[bytes],
    diff_id: str,
    chunk_bytes: int,
    digester: Digester,
    progress: Callable[[int], None] | None = None,
) -> list[LayerItem]:
    """Read an unpacked layer, and return its members with digests of their content.

    Args:
        pieces: of the layer, read to the end.
        diff_id: digest of the plain layer that the configuration promises.
        chunk_bytes: length of the pieces that are digested.
        digester: of the pieces.
        progress: called with numbers of content bytes.

    Raises:
        IntegrityError: it is not what the configuration promises.
        BuildError: it is not a tar.
        NydusError: what the pieces raise.
    """
    total = hashlib.sha256()

    def summed() -> Iterator[bytes]:
        for piece in pieces:
            total.update(piece)
            yield piece

    with closing(pieces):
        rest = summed()
        items = list(_items(_Forward(rest), chunk_bytes, digester, progress))
        for _ in rest:
            pass
    found = f"sha256:{total.hexdigest()}"
    if found != diff_id:
        raise IntegrityError("plain layer has another digest", expected=diff_id, got=found)
    return items


def _items(
    stream: _Forward,
    chunk_bytes: int,
    digester: Digester,
    progress: Callable[[int], None] | None,
) -> Iterator[LayerItem]:
    digest = function(digester)
    try:
        with tarfile.open(
            fileobj=cast(IO[bytes], stream), mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            for member in tar:
                # What was read is not needed again; the library would keep every header.
                tar.members = []  # type: ignore[attr-defined]
                parts = _parts(member.name)
                if len(parts) == 1 and parts[0] in _NOT_CONTENT:
                    continue
                entry = _entry(member)
                link = _parts(member.linkname) if member.islnk() else None
                if member.isreg() and entry.size:
                    entry.digests = _digests(tar, stream, member, digest, chunk_bytes)
                    if progress is not None:
                        progress(entry.size)
                yield LayerItem(parts, entry, link)
    except (tarfile.TarError, ValueError) as error:
        raise BuildError(f"not a tar ({error})") from error


class _Tree:
    def __init__(self) -> None:
        self.root = Entry.directory()

    def directory(self, parts: Sequence[bytes], layer: int) -> Entry:
        """Return the directory of a path, symlinks followed below the root; it is made if absent.

        What is no directory gives way to one, as when unpacking.
        """
        rest, way, links = list(parts)[::-1], [self.root], 0
        while rest:
            part = rest.pop()
            if part == b"..":
                if len(way) > 1:
                    way.pop()
                continue
            if part in (b"", b"."):
                continue
            children = cast("dict[bytes, Entry]", way[-1].children)
            child = children.get(part)
            if child is not None and stat.S_ISLNK(child.mode) and links < _MAX_SYMLINKS:
                links += 1
                if child.target.startswith(b"/"):
                    del way[1:]
                rest.extend(child.target.split(b"/")[::-1])
                continue
            if child is None or child.children is None:
                child = children[part] = Entry.directory(layer)
            way.append(child)
        return way[-1]

    def find(self, parts: Sequence[bytes]) -> Entry | None:
        """Return what a name stands for; its directories' symlinks are followed."""
        if not parts:
            return self.root
        entry: Entry | None = self.root
        for part in parts[:-1]:
            entry = entry.children.get(part) if entry is not None and entry.children else None
            if entry is not None and stat.S_ISLNK(entry.mode):
                entry = self.directory(parts[:-1], entry.layer)
                break
        if entry is None or not entry.children:
            return None
        return entry.children.get(parts[-1])

    def put(self, item: LayerItem, layer: int) -> bool:
        """Put a member where it belongs; tell whether it could be, which a hard link may not."""
        if not item.parts:
            self._describe(self.root, item.entry)
            return True
        directory = self.directory(item.parts[:-1], layer)
        children = cast("dict[bytes, Entry]", directory.children)
        name = item.parts[-1]
        if item.link is not None:
            found = self.find(item.link)
            if found is None or found.children is not None:
                return False
            children[name] = found
            return True
        old = children.get(name)
        entry = item.entry
        entry.layer = layer
        if entry.children is not None and old is not None and old.children is not None:
            entry.children = old.children
        children[name] = entry
        return True

    @staticmethod
    def _describe(root: Entry, entry: Entry) -> None:
        root.mode, root.uid, root.gid, root.mtime = entry.mode, entry.uid, entry.gid, entry.mtime
        root.xattrs, root.has_fraction = entry.xattrs, entry.has_fraction

    def white_out(self, parts: Sequence[bytes], layer: int) -> None:
        """Delete what lower layers have, as a deletion mark says."""
        directory = self.directory(parts[:-1], layer)
        children = cast("dict[bytes, Entry]", directory.children)
        if parts[-1] == OPAQUE:
            _clear(directory, layer)
            return
        name = parts[-1][len(WHITEOUT) :]
        old = children.get(name)
        if old is None:
            return
        if old.layer < layer:
            del children[name]
        elif old.children is not None:
            _clear(old, layer)


def _clear(directory: Entry, layer: int) -> None:
    """Remove what came from lower layers out of a directory, however deep it is."""
    stack = [directory]
    while stack:
        children = cast("dict[bytes, Entry]", stack.pop().children)
        for name, child in list(children.items()):
            if child.layer < layer:
                del children[name]
            elif child.children is not None:
                stack.append(child)


def lay_together(layers: Sequence[Sequence[LayerItem]]) -> Entry:
    """Return the tree of layers, lowest first; the items are used up.

    Raises:
        BuildError: a hard link to what is not there.
    """
    tree = _Tree()
    for number, items in enumerate(layers):
        waiting = []
        for item in items:
            if item.parts and item.parts[-1].startswith(WHITEOUT):
                tree.white_out(item.parts, number)
            elif not tree.put(item, number):
                waiting.append(item)
        while waiting:
            left = [item for item in waiting if not tree.put(item, number)]
            if len(left) == len(waiting):
                raise BuildError("hard link to what is not there", entry=b"/".join(left[0].parts))
            waiting = left
    return tree.root
