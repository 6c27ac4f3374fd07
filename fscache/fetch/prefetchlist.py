"""Which chunks are wanted first: files that the user names, or the bootstrap's prefetch table.

A named directory stands for all that is below it, and what is not there is only warned about.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from erofs import Bootstrap, NydusError
from erofs.rafs import ChunkInfo

__all__ = ["PrefetchListError", "check_paths", "chunks_below", "listed_nids", "read_prefetch_file"]

logger = logging.getLogger(__name__)

SIZE_LIMIT = 64 << 20


class PrefetchListError(NydusError):
    """A list of files that cannot be read, or a path in it that is not absolute."""


def check_paths(paths: Iterable[bytes]) -> tuple[bytes, ...]:
    """Return the paths, which have to be absolute; raise `PrefetchListError`."""
    checked = tuple(paths)
    for path in checked:
        if not path.startswith(b"/"):
            raise PrefetchListError("path to prefetch is not absolute", entry=path)
    return checked


def read_prefetch_file(path: Path) -> tuple[bytes, ...]:
    """Read a list of absolute paths, one a line (tools 3.2); raise `PrefetchListError`.

    Blanks around a path and empty lines do not count.
    """
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise PrefetchListError(
            f"list of files to prefetch cannot be read ({error.strerror})", path=path
        ) from error
    if len(data) > SIZE_LIMIT:
        raise PrefetchListError("list of files to prefetch is larger than 64 MiB", path=path)
    try:
        return check_paths(line.strip() for line in data.split(b"\n") if line.strip())
    except PrefetchListError as error:
        error.add_context(path=path)
        raise


def listed_nids(image: Bootstrap, paths: Sequence[bytes] | None) -> list[int]:
    """Return what is to be prefetched, in order: the paths, or without any the table.

    Raises `FormatError`.
    """
    if paths is None:
        return list(dict.fromkeys(image.prefetch_nids))
    nids: dict[int, None] = {}
    for path in paths:
        inode = image.lookup(path)
        if inode is None:
            logger.warning("file to prefetch is not in the image: %s", ascii(path))
        else:
            nids[inode.nid] = None
    return list(nids)


def chunks_below(image: Bootstrap, nids: Iterable[int]) -> Iterator[ChunkInfo]:
    """Yield the chunks of files, and of those below directories, by file; raise `FormatError`.

    Each file once, whatever names it has.
    """
    seen: set[int] = set()
    stack = list(nids)[::-1]
    while stack:
        nid = stack.pop()
        if nid in seen:
            continue
        seen.add(nid)
        inode = image.inode(nid)
        if inode.is_dir:
            names = [entry for entry in inode.entries() if entry.name not in (b".", b"..")]
            stack.extend(entry.nid for entry in reversed(names))
        elif inode.is_regular:
            yield from image.file_chunks(inode)
