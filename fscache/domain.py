"""One cache directory as a process uses it: the marked directory, its channel, shared blobs.

A blob that several images hold is open once: they share its data file and every chunk that
one of them fetched.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from erofs.errors import NydusError
from fscache.backend import BlobReader
from fscache.backend.retry import RetryPolicy
from fscache.cachedblob import CachedBlob
from fscache.channel.fanotify import FanotifyChannel
from fscache.fetcher import Fetcher
from fscache.metrics import CacheMetrics
from fscache.plan import BlobPlan
from fscache.probe import lazy_supported, probe
from fscache.service import Service
from fscache.store import ServeDirectory, remove_stale

__all__ = ["CacheDomain", "LazyUnsupported", "prepare_work_dir"]

logger = logging.getLogger(__name__)


class LazyUnsupported(NydusError):
    """This machine cannot read lazily; the text names what is missing."""


def prepare_work_dir(work_dir: Path) -> None:
    """Make the cache directory; raise `LazyUnsupported` when it cannot be made."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LazyUnsupported(
            f"cache directory cannot be made ({error.strerror})", path=work_dir
        ) from error


@dataclass(slots=True)
class _Shared:
    """An open blob and the readers of the images that hold it."""

    blob: CachedBlob
    readers: list[BlobReader]
    ignored: bool = False


class CacheDomain:
    """Serves the blobs below one cache directory to the kernel; close it after all mounts.

    Args:
        work_dir: the cache directory, on a file system that takes pre-content marks.
        fetcher: fetches for all domains of the process; not owned.

    Raises:
        LazyUnsupported: the text names what the machine lacks.
        NydusError: the channel or the directories cannot be made.
    """

    def __init__(self, work_dir: Path, fetcher: Fetcher) -> None:
        self.work_dir = work_dir
        self._fetcher = fetcher
        self._lock = threading.Lock()
        self._shared: dict[str, _Shared] = {}
        prepare_work_dir(work_dir)
        verdict = lazy_supported(probe(work_dir))
        if not verdict.ok:
            raise LazyUnsupported(
                f"lazy reading is not possible here: {verdict.detail}"
                " (--eager fetches everything first)"
            )
        for path in remove_stale(work_dir):
            logger.info("removed %s of a daemon that is gone", path)
        with ExitStack() as stack:
            self._store = ServeDirectory.create(work_dir)
            stack.callback(self._store.remove)
            self._service = Service(fetcher)
            self._channel = FanotifyChannel(self._store.directory, self._service.handle)
            stack.callback(self._channel.close)
            # In reverse: the group closes, then the links go.
            self._stack = stack.pop_all()

    def acquire(
        self, plan: BlobPlan, reader: BlobReader, metrics: CacheMetrics, retry: RetryPolicy
    ) -> Path:
        """Open a blob, or join those who hold it; return the path for the kernel.

        Raises `NydusError`; then nothing is held.
        """
        with self._lock:
            shared = self._shared.get(reader.blob_id)
            if shared is not None:
                self._join(shared, plan)
                shared.readers.append(reader)
                shared.blob.use_readers(shared.readers)
                return self._store.path(reader.blob_id)
            blob = CachedBlob.open(
                self.work_dir,
                plan.entry,
                plan.chunks,
                reader,
                metrics,
                on_complete=partial(self._completed, reader.blob_id),
            )
            blob.retry = retry
            self._shared[blob.blob_id] = _Shared(blob, [reader])
            try:
                link = self._store.link(blob.blob_id, blob.path)
                self._service.add(blob)
                self._fetcher.attach(blob)
            except BaseException:
                del self._shared[blob.blob_id]
                self._service.remove(blob)
                blob.close()
                raise
            return link

    def blob(self, reader: BlobReader) -> CachedBlob:
        """Return the open blob of a reader that was acquired."""
        with self._lock:
            return self._shared[reader.blob_id].blob

    def _join(self, shared: _Shared, plan: BlobPlan) -> None:
        """Tell an open blob what a further image knows, before that image is mounted."""
        shared.blob.learn(plan.entry, plan.chunks)
        if shared.ignored and not shared.blob.is_complete:
            self._channel.unignore(shared.blob.cache.fileno())
            shared.ignored = False

    def _completed(self, blob_id: str) -> None:
        """Stop the events of a blob whose known chunks are all there and durable."""
        with self._lock:
            shared = self._shared.get(blob_id)
            # Meanwhile an image may have told of further chunks, or the channel has ended.
            if shared is None or not shared.blob.is_complete or self._channel.fileno() < 0:
                return
            self._channel.ignore(shared.blob.cache.fileno())
            shared.ignored = True

    def release(self, reader: BlobReader) -> None:
        """Let go of a blob, after the file system that used it is gone."""
        with self._lock:
            shared = self._shared.get(reader.blob_id)
            if shared is None or reader not in shared.readers:
                return
            shared.readers.remove(reader)
            if shared.readers:
                shared.blob.use_readers(shared.readers)
                return
            del self._shared[reader.blob_id]
            self._service.remove(shared.blob)
            self._store.unlink(reader.blob_id)
        self._fetcher.detach(shared.blob)

    def close(self) -> None:
        """Close the channel and remove the directory; only after all mounts are gone."""
        # With the lock, so that no blob becomes complete between a look at the channel and its use.
        with self._lock:
            self._stack.close()
