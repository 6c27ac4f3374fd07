"""Blobs read from front to back; a transfer that breaks off goes on where it was."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator

from builder.oci.place import Verifier
from builder.oci.records import Descriptor
from fscache.backend.base import BackendError, BlobReader
from fscache.backend.retry import RetryPolicy

__all__ = ["resumed_pieces"]

logger = logging.getLogger(__name__)


def resumed_pieces(
    reader: BlobReader,
    descriptor: Descriptor,
    retry: RetryPolicy | None = None,
    stop: threading.Event | None = None,
) -> Generator[bytes]:
    """Yield a blob piece by piece.

    Args:
        reader: of the blob.
        descriptor: what it has to be.
        retry: how often it goes on without having got anything.
        stop: ends pauses.

    Raises:
        BackendError: it cannot be read.
        IntegrityError: it is another one, known at its end.
    """
    retry, stop = retry or RetryPolicy(), stop or threading.Event()
    verifier = Verifier(descriptor)
    failures, ranges = 0, True
    while verifier.size < descriptor.size or not descriptor.size:
        start = verifier.size if ranges else 0
        try:
            with reader.stream(start) as pieces:
                for piece in _skip(pieces, verifier.size - start):
                    verifier.update(piece)
                    failures = 0
                    yield piece
            break
        except BackendError as error:
            if start and not error.temporary:
                # A server without ranges gives it once more from the beginning.
                ranges = False
                continue
            failures += 1
            _pause(error, failures, retry, stop)
    verifier.finish()


def _pause(error: BackendError, failures: int, policy: RetryPolicy, stop: threading.Event) -> None:
    """Wait before another try, or raise the error when there is none."""
    if not error.temporary or failures >= policy.attempts:
        raise error
    delay = min(policy.first_delay * policy.factor ** (failures - 1), policy.max_delay)
    logger.info("transfer broke off, it goes on in a moment: %s", error)
    if stop.wait(max(delay, error.retry_after or 0.0)):
        raise error


def _skip(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Leave out the first bytes, which were there before."""
    for piece in pieces:
        if count >= len(piece):
            count -= len(piece)
            continue
        yield piece[count:] if count else piece
        count = 0
