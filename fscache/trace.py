"""Which files of an image were read, when first, and how much: recorded on demand.

The kernel asks for ranges of blobs; they are recorded as they come, and only who asks for the
result pays for finding the files (spec tools 4.1, 8.1). Files are known by their nid, which is
their inode number in the mount.
"""

from __future__ import annotations

import logging
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from erofs import Bootstrap, open_bootstrap
from erofs.errors import NydusError
from fscache.metrics import of_reads, size_class
from fscache.settings import RafsConfig

__all__ = ["FileReads", "Trace", "open_trace"]

logger = logging.getLogger(__name__)

# So many reads are kept as they came before they are counted by file.
PENDING_MAX = 1 << 16


class _Index:
    """The files of an image by the ranges of its blobs.

    What several files share belongs to the smallest of them: whoever fetches that one again
    has the bytes, and the least besides.
    """

    def __init__(self, image: Bootstrap) -> None:
        found: list[dict[int, tuple[int, int, int]]] = [{} for _ in image.blobs]
        seen: set[int] = set()
        for _, inode in image.walk():
            if not inode.is_regular or not inode.size or inode.nid in seen:
                continue
            seen.add(inode.nid)
            for info in image.file_chunks(inode):
                extents, offset = found[info.blob_index], info.uncompressed_offset
                other = extents.get(offset)
                if other is None or inode.size < other[0]:
                    extents[offset] = (inode.size, inode.nid, info.uncompressed_size)
        self._blobs = {
            entry.id: _columns(extents) for entry, extents in zip(image.blobs, found, strict=True)
        }

    def files_in(self, blob_id: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (nid, bytes) of the files that have something in a range of a blob."""
        if blob_id not in self._blobs:
            return
        starts, ends, nids = self._blobs[blob_id]
        first = max(bisect_right(starts, offset) - 1, 0)
        for number in range(first, bisect_left(starts, offset + length)):
            shared = min(ends[number], offset + length) - max(starts[number], offset)
            if shared > 0:
                yield nids[number], shared


def _columns(
    extents: dict[int, tuple[int, int, int]],
) -> tuple[array[int], array[int], array[int]]:
    starts = array("Q", sorted(extents))
    ends = array("Q", (start + extents[start][2] for start in starts))
    return starts, ends, array("Q", (extents[start][1] for start in starts))


class FileReads:
    """What was read of one file: `first` is `time.time()` of the first read, sizes in bytes."""

    def __init__(self, nid: int, first: float) -> None:
        self.nid = nid
        self.first = first
        self.reads = 0
        self.failed = 0
        self.data_read = 0
        self.sizes = [0] * 8

    def copy(self) -> FileReads:
        """Return the counters as they are now."""
        other = FileReads(self.nid, self.first)
        other.reads, other.failed, other.data_read = self.reads, self.failed, self.data_read
        other.sizes = list(self.sizes)
        return other

    def count(self, begin: float, length: int, *, failed: bool) -> None:
        """Count one read, in any order of time."""
        self.first = min(self.first, begin)
        self.reads += 1
        self.sizes[size_class(length)] += 1
        if failed:
            self.failed += 1
        else:
            self.data_read += length


class Trace:
    """The reads of one image that reach the daemon; safe for many threads.

    Args:
        bootstrap: of the image.
        files: whether counters by file are wanted (`iostats_files`).
        pattern: whether the order of first reads is wanted (`access_pattern`).
        latest: whether the files read since the last question are wanted
            (`latest_read_files`).
    """

    def __init__(self, bootstrap: Path, *, files: bool, pattern: bool, latest: bool) -> None:
        self.files = files
        self.pattern = pattern
        self.latest = latest
        self._bootstrap = bootstrap
        self._lock = threading.Lock()
        self._index: _Index | None = None
        self._pending: deque[tuple[str, int, int, float, bool]] = deque()
        self._counting = False
        self._reads: dict[int, FileReads] = {}
        self._latest: set[int] = set()

    def record(self, blob_id: str, offset: int, length: int, begin: float, failed: bool) -> None:
        """Take note of an answered read that began at `time.time()` `begin`; never blocks."""
        self._pending.append((blob_id, offset, length, begin, failed))
        if len(self._pending) >= PENDING_MAX and not self._counting:
            self._counting = True
            threading.Thread(target=self._count_apart, name="trace", daemon=True).start()

    def _count_apart(self) -> None:
        try:
            with self._lock:
                self._count()
        except (NydusError, OSError) as error:
            # Who asks for the trace is told; here is nobody to tell, and memory is bounded.
            logger.warning("reads are not counted by file: %s", error)
            self._pending.clear()
        finally:
            self._counting = False

    def _count(self) -> None:
        """Find the files of the pending reads; the lock is held. Raises `FormatError`."""
        if self._index is None and self._pending:
            with open_bootstrap(self._bootstrap) as image:
                self._index = _Index(image)
        while self._pending and self._index is not None:
            blob_id, offset, length, begin, failed = self._pending.popleft()
            for nid, shared in self._index.files_in(blob_id, offset, length):
                reads = self._reads.get(nid)
                if reads is None:
                    reads = self._reads[nid] = FileReads(nid, begin)
                reads.count(begin, shared, failed=failed)
                if not failed:
                    self._latest.add(nid)

    def by_first_read(self) -> list[FileReads]:
        """Return the files that were read, first read first; copies. Raises `FormatError`."""
        with self._lock:
            self._count()
            copies = [reads.copy() for reads in self._reads.values()]
        return sorted(copies, key=lambda reads: reads.first)

    def paths(self, nids: Iterable[int]) -> dict[int, bytes]:
        """Return a path of each file, the first in the order of the tree; raise `FormatError`."""
        wanted = set(nids)
        found: dict[int, bytes] = {}
        with open_bootstrap(self._bootstrap) as image:
            for path, inode in image.walk():
                if len(found) == len(wanted):
                    break
                if inode.nid in wanted:
                    found.setdefault(inode.nid, path)
        return found

    def files_as_dict(self) -> dict[str, object]:
        """Return the counters by inode under the names of the API; only reads are counted."""
        if not self.files:
            return {}
        return {
            str(reads.nid): {
                "total_fops": reads.reads,
                "data_read": reads.data_read,
                "block_count_read": reads.sizes,
                "fop_hits": of_reads(reads.reads - reads.failed),
                "fop_errors": of_reads(reads.failed),
            }
            for reads in self.by_first_read()
        }

    def pattern_as_list(self, *, paths: bool = False) -> list[dict[str, object]]:
        """Return the files by their first read under the names of the API.

        With `paths` also `path`, bytes that are not UTF-8 as lone surrogates, and `data_read`.
        """
        if not self.pattern:
            return []
        files = self.by_first_read()
        names = self.paths(reads.nid for reads in files) if paths else {}
        result = []
        for reads in files:
            seconds, rest = divmod(reads.first, 1)
            item: dict[str, object] = {
                "ino": reads.nid,
                "nr_read": reads.reads,
                "first_access_time_secs": int(seconds),
                "first_access_time_nanos": int(rest * 1_000_000_000),
            }
            if paths:
                item["path"] = names[reads.nid].decode("utf-8", "surrogateescape")
                item["data_read"] = reads.data_read
            result.append(item)
        return result

    def take_latest(self) -> list[list[int]]:
        """Return inodes read since the last call, as `[first, last]` or `[only]`; forget them."""
        if not self.latest:
            return []
        with self._lock:
            self._count()
            nids = sorted(self._latest)
            self._latest.clear()
        result: list[list[int]] = []
        for nid in nids:
            if result and result[-1][-1] + 1 == nid:
                result[-1] = [result[-1][0], nid]
            else:
                result.append([nid])
        return result


def open_trace(bootstrap: Path, config: RafsConfig) -> Trace | None:
    """Return a trace of what the configuration asks for, None when that is nothing."""
    files, pattern, latest = config.iostats_files, config.access_pattern, config.latest_read_files
    if not (files or pattern or latest):
        return None
    return Trace(bootstrap, files=files, pattern=pattern, latest=latest)
