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
from collections.abc import Callable, Sequence
from functools import partial

from erofs.errors import CodecError, NydusError
from erofs.values import Value
from fscache.backend.base import ShortRead, Unavailable
from fscache.cache.blobmap import BlobMap
from fscache.cache.cachedblob import CachedBlob, Unpacker
from fscache.cache.cachefile import CacheError
from fscache.fetch.complaints import Complaints
from fscache.fetch.failures import Failures
from fscache.fetch.fetchall import FetchAll, Progress
from fscache.fetch.locating import Locating
from fscache.fetch.outstanding import NOBODY, Done, Outstanding, Request, call
from fscache.fetch.pool import WorkerPool
from fscache.heartbeat import Heartbeat

__all__ = ["CachedBlob", "Fetcher", "FetcherOptions", "Progress"]

logger = logging.getLogger(__name__)

# Gives the stored bytes of a run of chunks of a map.
Read = Callable[[BlobMap, Sequence[int]], bytes | memoryview]

# Small chunks are unpacked and written together: each call of a library or the kernel gives up
# the interpreter's lock, and to get it back takes longer than a page.
_BATCH_BYTES = 256 << 10
_BATCH_CHUNKS = 64
_YIELD_SECONDS = 0.01
# Runs in the background that go on while somebody waits for a chunk: on a slow link nearly always
# somebody does, and so few slow nobody down there.
_AMID_READERS = 2
# A task ends by itself: all tries of a read together take less, however slow its backend is.
_STUCK_SECONDS = 600.0


class FetcherOptions(Value):
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


class Fetcher:
    """Fetches chunks of attached blobs into their data files; safe for many threads."""

    def __init__(self, options: FetcherOptions | None = None) -> None:
        self._options = options or FetcherOptions()
        self._stop = threading.Event()
        self._outstanding = Outstanding()
        self._failures = Failures(self._options.negative_ttl)
        self._told = Complaints()
        self._locating = Locating()
        self._blobs_lock = threading.Lock()
        self._blobs: set[CachedBlob] = set()
        self._sync_errors: dict[CachedBlob, str] = {}
        self._wake_sync = threading.Event()
        # Runs in the background: half of the workers is always there for readers.
        self._background = 0
        self._most_background = max(1, self._options.workers // 2)
        self._background_changed = threading.Condition()
        self._pool = WorkerPool(self._options.workers, self._options.workers_per_blob, "fetch")
        self._heartbeat = Heartbeat("deadlines of reads")
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
            call(done, error)
        else:
            self._request(blob, positions, done)
            if positions:
                self._look_ahead(blob, positions)

    def _look_ahead(self, blob: CachedBlob, positions: range) -> None:
        """Fetch what a reader will want next who goes on in a file, or sweeps through the blob."""
        table = blob.map
        following = table.following(positions[-1], blob.streams.ahead(positions))
        swept = blob.window.ahead(table, blob.chunks, positions)
        for wanted in (following, swept):
            if wanted and table.is_located and not blob.chunks.all_ready(wanted):
                self._claim_ahead(blob, table, wanted)

    def _claim_ahead(self, blob: CachedBlob, table: BlobMap, wanted: range) -> None:
        """Fetch what nobody waits for yet."""
        mine, _ = blob.chunks.claim(wanted, NOBODY, table.whole_contexts(wanted))
        self._submit(blob, table, mine, None)

    def _request(
        self, blob: CachedBlob, positions: range, done: Done, background: Read | None = None
    ) -> None:
        """Answer a request; one in the background says where its stored bytes come from."""
        try:
            request = self._prepare(blob, positions, done, background is not None)
        except NydusError as error:
            call(done, error)
            return
        if request is None:
            call(done, None)
            return
        claim = partial(self._claim, blob, positions, request, background)
        if blob.map.is_located:
            claim(None)
        elif self._locating.wait(blob, claim) and not self._pool.submit(
            blob, partial(self._locate, blob)
        ):
            self._locating.settle(blob, Unavailable("the daemon stops", blob=blob.blob_id))

    def _locate(self, blob: CachedBlob) -> None:
        """Learn where the chunks of a blob are stored, and go on with who waited for that."""
        failure: NydusError | None = None
        try:
            blob.locate(self._stop)
        except NydusError as error:
            failure = error
        except Exception as error:
            logger.exception("locating the chunks of blob %s failed", blob.blob_id)
            failure = CacheError(f"internal error ({error!r})", blob=blob.blob_id)
        if failure is not None:
            logger.error("%s (nothing of the blob can be fetched)", failure)
        self._locating.settle(blob, failure)

    def _claim(
        self,
        blob: CachedBlob,
        positions: range,
        request: Request,
        background: Read | None,
        error: NydusError | None,
    ) -> None:
        """Fetch what a request lacks and nobody fetches yet, or end it with an error."""
        if error is not None:
            for position in positions:
                self._failures.add(blob, position, error)
            request.finish(error)
            return
        table = blob.map
        wanted = positions
        if background is None:
            wanted = blob.window.around(table, blob.chunks, positions)
        mine, waiting = blob.chunks.claim(positions, request, table.whole_contexts(wanted))
        if background is None:
            blob.metrics.request(wanted=len(positions), missing=waiting)
        self._submit(blob, table, mine, background)
        request.arm(waiting)

    def _submit(
        self, blob: CachedBlob, table: BlobMap, mine: list[int], background: Read | None
    ) -> None:
        """Have claimed chunks fetched, run by run."""
        for run in table.runs(mine, self._options.max_merge):
            if background is None:
                taken = self._pool.submit(blob, partial(self._run, blob, run))
            else:
                taken = self._pool.submit_background(partial(self._run, blob, run, background))
            if not taken:
                self._fail(blob, run, Unavailable("the daemon stops", blob=blob.blob_id))

    def _prepare(
        self, blob: CachedBlob, positions: range, done: Done, background: bool
    ) -> Request | None:
        """Return a registered request, or None when everything is ready; raise a refusal."""
        if blob not in self._blobs:
            raise CacheError("blob is not attached", blob=blob.blob_id)
        blob.cache.check()
        if blob.chunks.all_ready(positions):
            if not background:
                blob.metrics.request(wanted=len(positions), missing=0)
            return None
        self._failures.check(blob, positions)
        request = Request(self._outstanding, blob, done, background=background)
        self._outstanding.add(request, self._options.request_deadline)
        return request

    @property
    def trouble(self) -> str:
        """What is wrong with the fetcher, empty when nothing is; a slow backend is nothing."""
        if self._stop.is_set():
            return ""
        if self._pool.is_stuck(_STUCK_SECONDS):
            return f"workers: all at one task for more than {_STUCK_SECONDS:.0f} s"
        if not all(thread.is_alive() for thread in self._threads):
            return "a thread of the fetcher has ended"
        return self._heartbeat.trouble

    @property
    def has_readers(self) -> bool:
        """Whether somebody waits for a chunk right now."""
        return self._outstanding.waiting > 0

    def wait_for_readers(self, stop: threading.Event) -> bool:
        """Wait until nobody waits for a chunk; return False when `stop` was set before."""
        while self.has_readers:
            if stop.wait(_YIELD_SECONDS):
                return False
        return not stop.is_set()

    def begin_background(self, stop: threading.Event) -> bool:
        """Wait for a worker that nobody needs; return False when `stop` was set before.

        While readers wait there are few of them. After True `prefetch` has to be called once.
        """
        with self._background_changed:
            while not stop.is_set():
                most = self._most_background
                if self.has_readers:
                    most = min(most, _AMID_READERS)
                if self._background < most:
                    self._background += 1
                    return True
                self._background_changed.wait(_YIELD_SECONDS)
        return False

    def prefetch(
        self, blob: CachedBlob, group: range, done: Done, read: Read | None = None
    ) -> None:
        """Make a run of `BlobMap.groups` ready for nobody, then call `done` once.

        Args:
            blob: an attached blob.
            group: of its chunks.
            done: as for `request`.
            read: gives the stored bytes where the caller has them already; raises `NydusError`.
        """

        def free(error: NydusError | None) -> None:
            with self._background_changed:
                self._background -= 1
                self._background_changed.notify()
            done(error)

        self._request(blob, group, free, read or partial(self._read, blob))

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

    def _run(self, blob: CachedBlob, run: Sequence[int], read: Read | None = None) -> None:
        """Fetch a run of claimed chunks; every one of them is completed or failed."""
        todo = deque(run)
        try:
            with blob.in_use():
                self._fetch(blob, blob.locate(self._stop), todo, read or partial(self._read, blob))
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

    def _read(self, blob: CachedBlob, table: BlobMap, run: Sequence[int]) -> bytes:
        return blob.retry.run(lambda: blob.read(table, run), self._stop)

    def _fetch(self, blob: CachedBlob, table: BlobMap, todo: deque[int], read: Read) -> None:
        # More than one run only when the blob's table has changed meanwhile.
        for run in table.runs(list(todo), self._options.max_merge):
            try:
                self._fetch_run(blob, table, todo, run, read)
            except ShortRead as error:
                if len(run) == 1:
                    raise
                # The chunks before the end of a truncated blob are still good.
                logger.warning("%s; trying single chunks", error)
                for single in table.runs(run, 1):
                    self._fetch_run(blob, table, todo, single, read)

    def _fetch_run(
        self, blob: CachedBlob, table: BlobMap, todo: deque[int], run: Sequence[int], read: Read
    ) -> None:
        """Read a run with one backend range and store its chunks; a bad chunk harms no other.

        Raises `BackendError`, with `todo` as it was.
        """
        stored = memoryview(read(table, run))
        blob.metrics.buffer(len(stored))
        try:
            unpacker = Unpacker(table)
            begin, _ = table.stored_range(run)
            for batch in table.batches(run, _BATCH_BYTES, _BATCH_CHUNKS):
                pieces = []
                for position in batch:
                    start = table.compressed_offsets[position] - begin
                    pieces.append(stored[start : start + table.compressed_sizes[position]])
                if len(batch) > 1 and self._store_all(blob, batch, pieces, unpacker):
                    self._settle(blob, todo, len(batch))
                    continue
                for position, piece in zip(batch, pieces, strict=True):
                    # Otherwise it has failed with the rest of its context.
                    if todo and todo[0] == position:
                        self._store(blob, todo, piece, unpacker)
        finally:
            blob.metrics.buffer(-len(stored))

    def _store_all(
        self, blob: CachedBlob, batch: range, pieces: Sequence[memoryview], unpacker: Unpacker
    ) -> bool:
        """Store small chunks in one go; False when they have to be looked at one by one."""
        try:
            blob.store_all(batch, pieces, unpacker)
        except NydusError as error:
            logger.debug("%s; storing single chunks", error)
            return False
        return True

    def _store(
        self, blob: CachedBlob, todo: deque[int], stored: memoryview, unpacker: Unpacker
    ) -> None:
        """Settle the first chunk of `todo` and take it off."""
        position = todo[0]
        try:
            blob.store(position, stored, unpacker)
        except NydusError as error:
            failed = [todo.popleft()]
            if isinstance(error, CodecError):
                failed += unpacker.table.rest_of_context(position, todo)
            for _ in failed[1:]:
                todo.popleft()
            self._fail(blob, failed, error)
            return
        self._settle(blob, todo, 1)

    def _settle(self, blob: CachedBlob, todo: deque[int], count: int) -> None:
        """Mark the first chunks of `todo`, which are written, and take them off."""
        positions = [todo.popleft() for _ in range(count)]
        blob.metrics.chunk_fetched(count)
        for waiter in blob.chunks.complete(*positions):
            waiter.chunk_done(None)
        for listener in blob.listeners:
            for position in positions:
                listener(position)

    def _fail(self, blob: CachedBlob, positions: Sequence[int], error: NydusError) -> None:
        # What is wrong with the cache itself fails every chunk of it: one line is enough.
        told = isinstance(error, CacheError) and not self._told.is_new(blob.blob_id, error.what)
        level = logging.DEBUG if told else logging.ERROR
        logger.log(level, "%s (%d chunks failed)", error, len(positions))
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
                logger.error("ready chunks are not kept: %s", text)
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
            self._heartbeat.beat()
            self._outstanding.fail(
                lambda request: request.expires <= time.monotonic(), "request took too long"
            )
