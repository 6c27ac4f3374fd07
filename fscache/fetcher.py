"""Who fetches which chunk when: requests for ranges of blobs, answered exactly once.

A request for chunks that are all ready is answered at once. Otherwise each missing chunk is
fetched by one worker, whoever else waits for it: read, decompress, verify, write, mark ready,
answer, in this order. Everything here is independent of the channel that asks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from erofs.errors import NydusError
from fscache.backend.base import ShortRead, Unavailable
from fscache.cachedblob import CachedBlob
from fscache.cachefile import CacheError
from fscache.fetchall import FetchAll, Progress
from fscache.pool import WorkerPool

__all__ = ["CachedBlob", "Fetcher", "FetcherOptions", "Progress"]

logger = logging.getLogger(__name__)

Done = Callable[[NydusError | None], None]


@dataclass(frozen=True, slots=True)
class FetcherOptions:
    """Bounds of a `Fetcher`; times in seconds, sizes in bytes.

    Args:
        workers: threads that fetch, decode and write.
        workers_per_blob: how many of them one blob may keep busy.
        max_merge: largest range of the stored blob that neighbouring chunks are merged into.
        negative_ttl: how long a failed chunk fails at once, for the second event of the same
            read (ondemand 5.14 item 6).
        request_deadline: when a request fails whatever its workers do; below the hung-task
            limit of 120 s.
        sync_interval: pause between making ready chunks durable.
    """

    workers: int = 16
    workers_per_blob: int = 8
    max_merge: int = 4 << 20
    negative_ttl: float = 1.0
    request_deadline: float = 100.0
    sync_interval: float = 5.0


class _Request:
    """The duty to call `done` exactly once; a `Waiter` of every chunk it lacks."""

    __slots__ = ("_armed", "_done", "_left", "_outstanding", "background", "blob", "expires")

    def __init__(
        self, outstanding: _Outstanding, blob: CachedBlob, done: Done, *, background: bool
    ) -> None:
        self._outstanding = outstanding
        self.background = background
        self._done: Done | None = done
        self._left = 0
        self._armed = False
        self.blob = blob
        self.expires = 0.0

    def arm(self, waiting: int) -> None:
        """Tell how many chunks are waited for; some of them may be done already."""
        with self._outstanding.lock:
            self._left += waiting
            self._armed = True
            ended = self._left == 0
        if ended:
            self.finish(None)

    def chunk_done(self, error: NydusError | None) -> None:
        """Take the news of one chunk; the first error ends the request."""
        with self._outstanding.lock:
            self._left -= 1
            ended = error is not None or (self._armed and self._left == 0)
        if ended:
            self.finish(error)

    def finish(self, error: NydusError | None) -> None:
        """Answer, unless that was done."""
        with self._outstanding.lock:
            done, self._done = self._done, None
            self._outstanding.remove(self)
        if done is not None:
            _call(done, error)


class _Nobody:
    """A waiter that does not wait: for chunks that are fetched ahead."""

    def chunk_done(self, error: NydusError | None) -> None:
        """Take the news."""


_NOBODY = _Nobody()


class _Outstanding:
    """All requests without an answer, and the lock of their counters."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests: set[_Request] = set()
        # How many of them somebody waits for in the kernel.
        self.waiting = 0
        self.closed = False

    def add(self, request: _Request, deadline: float) -> None:
        """Register a request; raise `Unavailable` after `close`."""
        request.expires = time.monotonic() + deadline
        with self.lock:
            if self.closed:
                raise Unavailable("the daemon stops", blob=request.blob.blob_id)
            self.requests.add(request)
            self.waiting += not request.background

    def remove(self, request: _Request) -> None:
        """Forget an answered request; the lock is held."""
        if request in self.requests:
            self.requests.remove(request)
            self.waiting -= not request.background

    def close(self) -> None:
        """Refuse further requests."""
        with self.lock:
            self.closed = True

    def fail(self, chosen: Callable[[_Request], bool], what: str) -> None:
        """Answer the chosen requests with an error."""
        with self.lock:
            requests = [request for request in self.requests if chosen(request)]
        for request in requests:
            request.finish(Unavailable(what, temporary=True, blob=request.blob.blob_id))


def _call(done: Done, error: NydusError | None) -> None:
    try:
        done(error)
    except Exception:
        # It was called, and the thread serves other requests.
        logger.exception("answering a request failed")


class _Failures:
    """Chunks that failed a moment ago, with their errors."""

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._lock = threading.Lock()
        self._errors: dict[tuple[CachedBlob, int], tuple[float, NydusError]] = {}

    def add(self, blob: CachedBlob, position: int, error: NydusError) -> None:
        """Remember a failure, and forget old ones."""
        now = time.monotonic()
        with self._lock:
            # The oldest come first, because all live equally long.
            while self._errors:
                key = next(iter(self._errors))
                if self._errors[key][0] > now:
                    break
                del self._errors[key]
            self._errors.pop((blob, position), None)
            self._errors[blob, position] = (now + self._ttl, error)

    def forget(self, blob: CachedBlob) -> None:
        """Forget the failures of one blob."""
        with self._lock:
            self._errors = {key: value for key, value in self._errors.items() if key[0] is not blob}

    def check(self, blob: CachedBlob, positions: range) -> None:
        """Raise the error of a chunk of the range that failed a moment ago."""
        if not self._errors:
            return
        now = time.monotonic()
        for position in positions:
            found = self._errors.get((blob, position))
            if found is not None and found[0] > now and not blob.chunks.is_ready(position):
                raise found[1]


class Fetcher:
    """Fetches chunks of attached blobs into their data files; safe for many threads."""

    def __init__(self, options: FetcherOptions | None = None) -> None:
        self._options = options or FetcherOptions()
        self._stop = threading.Event()
        self._outstanding = _Outstanding()
        self._failures = _Failures(self._options.negative_ttl)
        self._blobs_lock = threading.Lock()
        self._blobs: set[CachedBlob] = set()
        self._sync_errors: dict[CachedBlob, str] = {}
        self._wake_sync = threading.Event()
        self._pool = WorkerPool(self._options.workers, self._options.workers_per_blob, "fetch")
        self._threads = [
            threading.Thread(target=self._sync_loop, name="fetch-sync", daemon=True),
            threading.Thread(target=self._deadline_loop, name="fetch-deadline", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # Blobs

    def attach(self, blob: CachedBlob) -> None:
        """Take over a blob; `detach` or `close` closes it. Raises `Unavailable` after `close`."""
        with self._blobs_lock:
            if self._stop.is_set():
                raise Unavailable("the daemon stops", blob=blob.blob_id)
            self._blobs.add(blob)
        if blob.wants_sync:
            self._wake_sync.set()

    def detach(self, blob: CachedBlob) -> None:
        """Fail the blob's requests, make its chunks durable, and close it."""
        with self._blobs_lock:
            self._blobs.discard(blob)
        self._outstanding.fail(lambda request: request.blob is blob, "the blob is detached")
        self._sync(blob)
        blob.close()
        self._sync_errors.pop(blob, None)
        self._failures.forget(blob)

    def close(self, deadline: float) -> None:
        """Refuse new requests, let those under way end, fail the rest, and stop.

        Args:
            deadline: seconds for the requests under way, and again for the threads. A thread
                that hangs in a backend is left to end by itself.
        """
        self._outstanding.close()
        end = time.monotonic() + deadline
        while self._outstanding.requests and time.monotonic() < end:
            self._stop.wait(0.01)
        self._stop.set()
        self._outstanding.fail(lambda request: True, "the daemon stops")
        self._pool.close(deadline)
        self._wake_sync.set()
        for thread in self._threads:
            thread.join(deadline)
        with self._blobs_lock:
            blobs = list(self._blobs)
        for blob in blobs:
            self.detach(blob)

    # Requests

    def request(self, blob: CachedBlob, offset: int, length: int, done: Done) -> None:
        """Make a range of the blob's uncompressed space ready, then call `done`.

        `done` is called exactly once, with None or with the error: by this call when nothing
        has to be fetched or the request is refused, else by another thread. It must be short.
        """
        try:
            positions = blob.map.chunks_in(offset, length)
        except NydusError as error:
            _call(done, error)
        else:
            self._request(blob, positions, done)
            if positions:
                self._look_ahead(blob, positions)

    def _look_ahead(self, blob: CachedBlob, positions: range) -> None:
        """Fetch what a sequential reader will want next, in the same file; nobody waits for it."""
        count = blob.streams.ahead(positions)
        if not count:
            return
        following = blob.map.following(positions[-1], count)
        if not following or blob.chunks.all_ready(following):
            return
        mine, _ = blob.chunks.claim(following, _NOBODY)
        for group in blob.map.groups(mine, self._options.max_merge):
            if not self._pool.submit(blob, partial(self._run, blob, group)):
                self._fail(blob, group, Unavailable("the daemon stops", blob=blob.blob_id))

    def _request(
        self, blob: CachedBlob, positions: range, done: Done, *, background: bool = False
    ) -> None:
        try:
            request = self._prepare(blob, positions, done, background)
        except NydusError as error:
            _call(done, error)
            return
        if request is None:
            _call(done, None)
            return
        mine, waiting = blob.chunks.claim(positions, request)
        if not background:
            blob.metrics.request(wanted=len(positions), missing=waiting)
        # Keys take turns in the pool, so what nobody waits for holds nobody up for long.
        key = (blob, "background") if background else blob
        for group in blob.map.groups(mine, self._options.max_merge):
            if not self._pool.submit(key, partial(self._run, blob, group)):
                self._fail(blob, group, Unavailable("the daemon stops", blob=blob.blob_id))
        request.arm(waiting)

    def _prepare(
        self, blob: CachedBlob, positions: range, done: Done, background: bool
    ) -> _Request | None:
        """Return a registered request, or None when everything is ready; raise a refusal."""
        if blob not in self._blobs:
            raise CacheError("blob is not attached", blob=blob.blob_id)
        blob.cache.check()
        if blob.chunks.all_ready(positions):
            if not background:
                blob.metrics.request(wanted=len(positions), missing=0)
            return None
        self._failures.check(blob, positions)
        request = _Request(self._outstanding, blob, done, background=background)
        self._outstanding.add(request, self._options.request_deadline)
        return request

    @property
    def has_readers(self) -> bool:
        """Whether somebody waits for a chunk right now."""
        return self._outstanding.waiting > 0

    def prefetch(self, blob: CachedBlob, group: range, done: Done) -> None:
        """Fetch a run of `BlobMap.groups` behind those who wait, then call `done` once."""
        self._request(blob, group, done, background=True)

    def ensure(self, blob: CachedBlob, offset: int, length: int) -> None:
        """Make a range ready and return; raise the `NydusError` of a failure."""
        answer: list[NydusError | None] = []
        answered = threading.Event()

        def done(error: NydusError | None) -> None:
            answer.append(error)
            answered.set()

        self.request(blob, offset, length, done)
        answered.wait()
        if answer[0] is not None:
            raise answer[0]

    def fetch_all(self, blob: CachedBlob, progress: Progress | None = None) -> None:
        """Make every known chunk ready and durable, in order, by merged ranges.

        Args:
            blob: an attached blob.
            progress: called by several threads, one at a time, with bytes done and in all.

        Raises the first `NydusError`; what is under way then ends first.
        """
        # Half of the blob's workers stay free for readers who wait.
        slots = max(1, self._options.workers_per_blob // 2)
        run = FetchAll(blob, slots, progress)
        for group in blob.map.groups(blob.map.positions(), self._options.max_merge):
            if not run.begin():
                break
            self._request(blob, group, run.done_with(group))
        run.wait()
        blob.sync()

    # Work

    def _run(self, blob: CachedBlob, group: range) -> None:
        """Fetch a run of claimed chunks; every one of them is completed or failed."""
        todo = deque(group)
        try:
            with blob.in_use():
                self._fetch(blob, todo)
        except NydusError as error:
            failure = error
        except Exception as error:
            # Readers wait in the kernel for these chunks, whatever went wrong here.
            logger.exception("fetching chunks of blob %s failed", blob.blob_id)
            failure = CacheError(f"internal error ({error!r})", blob=blob.blob_id)
        if todo:
            self._fail(blob, list(todo), failure)
        if blob.is_complete:
            self._wake_sync.set()

    def _fetch(self, blob: CachedBlob, todo: deque[int]) -> None:
        try:
            self._fetch_run(blob, todo, range(todo[0], todo[-1] + 1))
        except ShortRead as error:
            if len(todo) == 1:
                raise
            # The chunks before the end of a truncated blob are still good.
            logger.warning("%s; trying single chunks", error)
            while todo:
                self._fetch_run(blob, todo, range(todo[0], todo[0] + 1))

    def _fetch_run(self, blob: CachedBlob, todo: deque[int], run: range) -> None:
        """Read a run with one backend range and store its chunks; a bad chunk harms no other.

        Raises `BackendError`, with `todo` as it was.
        """
        stored = memoryview(blob.retry.run(lambda: blob.read(run), self._stop))
        blob.metrics.buffer(len(stored))
        try:
            start = 0
            for position in run:
                end = start + blob.map.compressed_sizes[position]
                self._store(blob, todo, stored[start:end])
                start = end
        finally:
            blob.metrics.buffer(-len(stored))

    def _store(self, blob: CachedBlob, todo: deque[int], stored: memoryview) -> None:
        """Settle the first chunk of `todo` and take it off."""
        position = todo[0]
        try:
            blob.store(position, stored)
        except NydusError as error:
            todo.popleft()
            self._fail(blob, [position], error)
            return
        todo.popleft()
        blob.metrics.chunk_fetched()
        for waiter in blob.chunks.complete(position):
            waiter.chunk_done(None)

    def _fail(self, blob: CachedBlob, positions: range | list[int], error: NydusError) -> None:
        logger.error("%s (%d chunks failed)", error, len(positions))
        for position in positions:
            # First the memory, then the claim: a request in between sees one of them.
            self._failures.add(blob, position, error)
            for waiter in blob.chunks.fail(position):
                waiter.chunk_done(error)

    # Durability and deadlines

    def _sync(self, blob: CachedBlob) -> None:
        """Make a blob's ready chunks durable; log a failure when it is a new one."""
        try:
            blob.sync()
        except NydusError as error:
            text = str(error)
            if self._sync_errors.get(blob) != text:
                logger.error("ready chunks are not durable: %s", text)
            self._sync_errors[blob] = text
        except Exception:
            # A callback of somebody else must not end the only thread that syncs.
            logger.exception("completing blob %s failed", blob.blob_id)
        else:
            self._sync_errors.pop(blob, None)

    def _sync_loop(self) -> None:
        while not self._stop.is_set():
            self._wake_sync.wait(self._options.sync_interval)
            self._wake_sync.clear()
            with self._blobs_lock:
                blobs = [blob for blob in self._blobs if blob.wants_sync]
            for blob in blobs:
                self._sync(blob)

    def _deadline_loop(self) -> None:
        while not self._stop.wait(min(1.0, self._options.request_deadline / 4)):
            self._outstanding.fail(
                lambda request: request.expires <= time.monotonic(), "request took too long"
            )
