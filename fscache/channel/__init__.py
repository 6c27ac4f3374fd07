"""The ways in which the kernel asks for data: one module each, one vocabulary for all.

A channel tells its handler which bytes of which file are wanted and hands over the right
to answer. Everything behind that (which blob, which chunks, from where) is no channel's
business. Only channels touch kernel event descriptors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

from erofs.errors import NydusError

__all__ = ["ChannelError", "Handler", "ReadRequest", "Reply", "Responder"]

logger = logging.getLogger(__name__)


class ChannelError(NydusError):
    """The kernel does not give what a channel needs, or a channel was used wrongly."""


class ReadRequest(NamedTuple):
    """A wanted range of a data file; `device` and `inode` identify it as `fstat` does."""

    device: int
    inode: int
    offset: int
    length: int


class Responder(Protocol):
    """The channel's side of an answer."""

    def respond(self, key: int, allow: bool) -> bool:
        """Answer the event that has this key and let go of it; return whether it still waited."""


class Reply:
    """The right, and the duty, to answer one event of the kernel exactly once.

    A reply that is closed or dropped without an answer denies: a reader never waits for
    nobody, and never reads bytes that nobody put there. The first answer counts, from
    whichever thread; later ones do nothing.
    """

    # A list, since its `pop` is atomic: one thread alone gets the key.
    __slots__ = ("_owned", "_responder", "request")

    def __init__(self, responder: Responder, key: int, request: ReadRequest) -> None:
        self._owned = [key]
        self._responder = responder
        self.request = request

    def _answer(self, allow: bool) -> bool:
        try:
            key = self._owned.pop()
        except IndexError:
            return False
        return self._responder.respond(key, allow)

    def allow(self) -> bool:
        """Let the read go on: the whole range has its bytes. Return whether this answered."""
        return self._answer(True)

    def deny(self, error: object) -> bool:
        """Fail the read with `EIO`. Return whether this answered.

        One failure denies many events, so the reason is only logged for debugging here; who
        found it has told it.
        """
        answered = self._answer(False)
        if answered:
            logger.debug("denied %s: %s", self.request, error)
        return answered

    def close(self) -> None:
        """Deny if there was no answer yet."""
        if self._owned and self.deny("dropped without an answer"):
            logger.error("a reply was dropped without an answer: %s", self.request)

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


# Called by the intake threads: answers at once or passes the reply on; never blocks on a
# fetch. If it raises, the event is denied.
Handler = Callable[[ReadRequest, Reply], None]
