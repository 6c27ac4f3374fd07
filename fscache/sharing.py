"""One cache directory as a process uses it, in one way: blobs that images share, and mounts.

A blob that several images hold is open once: they share its data file and every chunk that
one of them fetched. How the kernel asks for them is a subclass's business.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from erofs.errors import NydusError
from fscache.backend import BlobReader
from fscache.backend.retry import RetryPolicy
from fscache.cache.cachedblob import CachedBlob
from fscache.cache.cachefile import CacheError
from fscache.cache.plan import BlobPlan
from fscache.fetch.fetcher import Fetcher
from fscache.metrics import CacheMetrics
from fscache.mounting import Mount, MountJob
from fscache.trace import Trace
from fscache.transport import Transport

__all__ = ["Domain", "LazyUnsupported", "Shared", "prepare_work_dir"]


class LazyUnsupported(NydusError):
    """This machine cannot read lazily in some way; the text names what is missing."""


def prepare_work_dir(work_dir: Path) -> None:
    """Make the cache directory; raise `CacheError` when it cannot be made."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError.of("cache directory cannot be made", error, path=work_dir) from error


class Shared:
    """An open blob and the readers of the images that hold it.

    `ignored` is True while the kernel has been told that it need not ask for the blob.
    """

    def __init__(self, blob: CachedBlob, readers: list[BlobReader]) -> None:
        self.blob = blob
        self.readers = readers
        self.ignored = False


class Domain:
    """Serves the blobs below one cache directory; close it after all mounts are gone.

    Args:
        work_dir: the cache directory.
        fetcher: fetches for all domains of the process; not owned.

    Raises what a subclass says, `LazyUnsupported` where the machine lacks what it takes.
    """

    # Whether somebody has to answer as long as there is a mount.
    serves = True
    transport = Transport.AUTO

    def __init__(self, work_dir: Path, fetcher: Fetcher) -> None:
        self.work_dir = work_dir
        self._fetcher = fetcher
        self._lock = threading.Lock()
        self._shared: dict[str, Shared] = {}

    def mount(self, job: MountJob) -> Mount:
        """Mount an image whose blobs were acquired here; raise `NydusError`, with nothing left."""
        raise NotImplementedError

    def adopt(self, job: MountJob, device: int, name: str) -> Mount:
        """Go on with a mount of a killed worker whose blobs were acquired here.

        Args:
            job: its options and `attaching` have no effect.
            device, name: of the mount, see `Mount`.

        Raises `NydusError`, with nothing left.
        """
        raise NotImplementedError

    # Blobs

    def acquire(
        self, plan: BlobPlan, reader: BlobReader, metrics: CacheMetrics, retry: RetryPolicy
    ) -> CachedBlob:
        """Open a blob, or join those who hold it.

        Raises `NydusError`; then nothing is held.
        """
        with self._lock:
            shared = self._shared.get(reader.blob_id)
            if shared is not None:
                # Before that image is mounted.
                shared.blob.learn(plan.entry, plan.chunks)
                if not shared.blob.is_complete:
                    self._listen(shared)
                shared.readers.append(reader)
                shared.blob.use_readers(shared.readers)
                return shared.blob
            self._opening(reader.blob_id)
            blob = CachedBlob.open(
                self.work_dir,
                plan.entry,
                plan.chunks,
                reader,
                metrics,
                on_complete=partial(self._completed, reader.blob_id),
            )
            blob.retry = retry
            with ExitStack() as stack:
                stack.callback(blob.close)
                self._opened(blob)
                stack.callback(self._dropped, blob)
                self._fetcher.attach(blob)
                stack.pop_all()
            self._shared[blob.blob_id] = Shared(blob, [reader])
            return blob

    def blob(self, reader: BlobReader) -> CachedBlob:
        """Return the open blob of a reader that was acquired."""
        with self._lock:
            return self._shared[reader.blob_id].blob

    def watch(self, reader: BlobReader, trace: Trace) -> None:
        """Record all reads of a blob that was acquired, before its mount and until `unwatch`."""
        with self._lock:
            shared = self._shared[reader.blob_id]
            shared.blob.traces += (trace,)
            self._listen(shared)

    def unwatch(self, reader: BlobReader, trace: Trace) -> None:
        """Record no more, before `release`."""
        with self._lock:
            blob = self._shared[reader.blob_id].blob
            blob.traces = tuple(other for other in blob.traces if other is not trace)
        self._completed(reader.blob_id)

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
            self._dropped(shared.blob)
        self._fetcher.detach(shared.blob)

    # What a subclass does with blobs, the lock held but for `_completed`

    def _opening(self, blob_id: str) -> None:
        """Prepare for a blob that is about to be opened."""

    def _opened(self, blob: CachedBlob) -> None:
        """Serve a blob from now on; when this raises, `_dropped` does not follow."""

    def _listen(self, shared: Shared) -> None:
        """Hear of every read of a blob again."""

    def _completed(self, blob_id: str) -> None:
        """Take note that all known chunks of a blob are there and durable."""

    def _dropped(self, blob: CachedBlob) -> None:
        """Serve a blob no longer."""

    # Life

    def require_unmarked(self, bootstrap: Path) -> None:
        """Raise `MountError` for a bootstrap that this process would be asked for itself."""

    def start(self) -> None:
        """Begin to answer, where that does not begin by itself."""

    def pause(self) -> None:
        """Take no further reads: a successor will; raises nothing."""

    @property
    def trouble(self) -> str:
        """What is wrong with the way in which reads come here, empty when nothing is."""
        return ""

    @property
    def waiting(self) -> int:
        """How many reads were taken and wait for answers."""
        return 0

    def close(self) -> None:
        """Let go of everything; only after all mounts are gone."""
