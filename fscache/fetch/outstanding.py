"""Requests that have no answer yet: each gets exactly one, whatever happens to its chunks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from erofs.errors import NydusError
from fscache.backend.base import Unavailable
from fscache.cache.cachedblob import CachedBlob

__all__ = ["NOBODY", "Done", "Outstanding", "Request", "call"]

logger = logging.getLogger(__name__)

Done = Callable[[NydusError | None], None]


class Request:
    """The duty to call `done` exactly once; a `Waiter` of every chunk it lacks."""

    __slots__ = ("_armed", "_done", "_left", "_outstanding", "background", "blob", "expires")

    def __init__(
        self, outstanding: Outstanding, blob: CachedBlob, done: Done, *, background: bool
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
            call(done, error)


class Nobody:
    """A waiter that does not wait: for chunks that are fetched ahead."""

    def chunk_done(self, error: NydusError | None) -> None:
        """Take the news."""


NOBODY = Nobody()


class Outstanding:
    """All requests without an answer, and the lock of their counters."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests: set[Request] = set()
        # How many of them somebody waits for in the kernel.
        self.waiting = 0
        self.closed = False

    def add(self, request: Request, deadline: float) -> None:
        """Register a request; raise `Unavailable` after `close`."""
        request.expires = time.monotonic() + deadline
        with self.lock:
            if self.closed:
                raise Unavailable("the daemon stops", blob=request.blob.blob_id)
            self.requests.add(request)
            self.waiting += not request.background

    def remove(self, request: Request) -> None:
        """Forget an answered request; the lock is held."""
        if request in self.requests:
            self.requests.remove(request)
            self.waiting -= not request.background

    def close(self) -> None:
        """Refuse further requests."""
        with self.lock:
            self.closed = True

    def fail(self, chosen: Callable[[Request], bool], what: str) -> None:
        """Answer the chosen requests with an error."""
        with self.lock:
            requests = [request for request in self.requests if chosen(request)]
        for request in requests:
            request.finish(Unavailable(what, temporary=True, blob=request.blob.blob_id))


def call(done: Done, error: NydusError | None) -> None:
    """Give an answer; what the callback raises is logged."""
    try:
        done(error)
    except Exception:
        # It was called, and the thread serves other requests.
        logger.exception("answering a request failed")
