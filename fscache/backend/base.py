"""What every backend is: readers of blobs by id, their errors and counters.

No transport lives here; a registry or an object store is one more module beside this one.
"""

from __future__ import annotations

import errno
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol, Self, runtime_checkable

from erofs.errors import NydusError
from fscache.backend.settings import Credentials

__all__ = [
    "LATENCY_CLASSES",
    "AuthError",
    "Backend",
    "BackendCounts",
    "BackendError",
    "BackendMetrics",
    "BlobReader",
    "NotFound",
    "ShortRead",
    "TakesCredentials",
    "Unavailable",
    "check_blob_id",
]

MAX_BLOB_ID_BYTES = 255

# Upper ends of the classes in bytes and milliseconds, of whole ones; the eighth class has none
# (tools 8.1, 8.2).
_SIZE_CLASSES = (1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20)
LATENCY_CLASSES = (1, 20, 50, 100, 500, 1000, 2000)


class BackendError(NydusError):
    """A backend that does not give what was asked for.

    Args:
        what: what went wrong, one clause, without secrets.
        temporary: whether the caller should repeat the request a moment later.
        retry_after: seconds the server asks to be left alone for, None when it does not.
        where: the places of `NydusError`.
    """

    def __init__(
        self,
        what: str,
        *,
        temporary: bool = False,
        retry_after: float | None = None,
        **where: object,
    ) -> None:
        super().__init__(what, **where)
        self.temporary = temporary
        self.retry_after = retry_after

    def again(self) -> Self:
        """Return a copy for another thread that waited for the same thing."""
        return type(self)(
            self.what, temporary=self.temporary, retry_after=self.retry_after, **self.where
        )


class NotFound(BackendError, FileNotFoundError):
    """The backend has no blob of this id."""

    errno = errno.ENOENT


class AuthError(BackendError):
    """The backend refuses these credentials, or wants some."""


class ShortRead(BackendError):
    """Fewer bytes than asked for: a truncated blob or a broken transfer."""


class Unavailable(BackendError):
    """The backend cannot be reached, is overloaded, or takes too long."""


def check_blob_id(blob_id: str) -> str:
    """Return an id that is safe as one component of a path or URL, or raise `BackendError`.

    Ids come from bootstraps and from requests, so they are hostile.
    """
    try:
        length = len(blob_id.encode())
    except UnicodeEncodeError as error:
        raise BackendError("blob id is not text", blob=ascii(blob_id)[:80]) from error
    if not 0 < length <= MAX_BLOB_ID_BYTES or blob_id[0] == "." or set(blob_id) & {"/", "\0"}:
        raise BackendError("refused blob id", blob=ascii(blob_id)[:80])
    return blob_id


class BlobReader(Protocol):
    """One blob of a backend; safe to use from many threads at once."""

    @property
    def blob_id(self) -> str:
        """The id the reader was opened with."""

    def size(self) -> int:
        """Return the length of the stored blob in bytes; raise `BackendError`."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes of the stored blob from `offset`.

        One attempt: the caller repeats it (`fscache.backend.retry`). The time one attempt
        takes is bounded by the backend. Raises `BackendError`.
        """

    def stream(self, offset: int) -> AbstractContextManager[Iterator[bytes]]:
        """Open one request for everything from `offset` on; its bytes come piece by piece.

        From 0 it is a request without a range: a peer-to-peer proxy takes the blob in whole.
        One attempt, ended with the block, however much was taken. The wait for a piece is
        bounded by the backend, the whole is not. Raises `BackendError`, at the start and
        with every piece; a body that ends before its announced length is a `ShortRead`.
        """


class Backend(Protocol):
    """A place that holds blobs."""

    @property
    def metrics(self) -> BackendMetrics:
        """The counters of all readers of this backend."""

    def open(self, blob_id: str) -> BlobReader:
        """Return a reader; raise `BackendError` for an id that is refused.

        Nothing is read or connected yet, and the reader holds nothing that needs closing.
        """

    def close(self) -> None:
        """Drop idle connections; readers must not be used afterwards."""


@runtime_checkable
class Prepares(Protocol):
    """A backend whose first read takes longer, unless it was prepared."""

    def prepare(self) -> None:
        """Do what a first read would have to, like loading a library; nothing is sent."""


@runtime_checkable
class TakesCredentials(Protocol):
    """A backend whose credentials can be replaced while it is read from."""

    def set_credentials(self, credentials: Credentials | None) -> None:
        """Use other credentials for all requests made afterwards."""


class BackendCounts(NamedTuple):
    """A copy of `BackendMetrics`; `seconds` and `latencies` are of reads that succeeded."""

    type: str
    reads: int
    errors: int
    bytes_read: int
    seconds: float
    latencies: tuple[int, ...]


class BackendMetrics:
    """Counters of one backend in nydusd's shape (tools 8.2); safe to use from many threads."""

    def __init__(self, backend_type: str) -> None:
        self._lock = threading.Lock()
        self._type = backend_type
        self._count = self._errors = self._amount = 0
        self._seconds = 0.0
        self._millis_by_size = [0] * 8
        self._count_by_size = [0] * 8
        self._by_size_and_latency = [[0] * 8 for _ in range(8)]

    @contextmanager
    def measure(self, length: int) -> Iterator[None]:
        """Count the block as one read of `length` bytes, failed when it raises."""
        with self.measure_pieces() as add:
            yield
            add(length)

    @contextmanager
    def measure_pieces(self) -> Iterator[Callable[[int], None]]:
        """Count the block as one read of as many bytes as it adds, failed when it raises."""
        length = 0

        def add(piece: int) -> None:
            nonlocal length
            length += piece

        begin = time.monotonic()
        try:
            yield add
        except BaseException:
            with self._lock:
                self._count += 1
                self._errors += 1
            raise
        seconds = time.monotonic() - begin
        millis = int(seconds * 1000)
        size_class = bisect_left(_SIZE_CLASSES, length)
        latency_class = bisect_left(LATENCY_CLASSES, millis)
        with self._lock:
            self._count += 1
            self._amount += length
            self._seconds += seconds
            self._millis_by_size[size_class] += millis
            self._count_by_size[size_class] += 1
            self._by_size_and_latency[size_class][latency_class] += 1

    def counts(self) -> BackendCounts:
        """Return a consistent copy."""
        with self._lock:
            latencies = tuple(map(sum, zip(*self._by_size_and_latency, strict=True)))
            return BackendCounts(
                self._type, self._count, self._errors, self._amount, self._seconds, latencies
            )

    def as_dict(self) -> dict[str, object]:
        """Return a consistent copy under the names of the API."""
        with self._lock:
            return {
                "backend_type": self._type,
                "read_count": self._count,
                "read_errors": self._errors,
                "read_amount_total": self._amount,
                "read_cumulative_latency_millis_total": sum(self._millis_by_size),
                "read_cumulative_latency_millis_dist": list(self._millis_by_size),
                "read_count_block_size_dist": list(self._count_by_size),
                "read_latency_sizes_dist": [list(row) for row in self._by_size_and_latency],
            }
