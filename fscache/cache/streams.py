"""Which readers of a blob go from chunk to chunk: how far to fetch ahead of them."""

from __future__ import annotations

import threading
from collections import OrderedDict

__all__ = ["Streams"]

# Readers that are followed at once; who is forgotten begins anew.
REMEMBERED = 64
# How many requests are made of what is fetched ahead of one reader.
_REQUESTS = 4


class Streams:
    """The last chunk of recent requests, and how long each has gone on without a jump.

    A reader is followed when its request begins where a recent one ended; everybody else is
    not, since blind look-ahead costs random readers half of their rate.

    Args:
        limit: the most chunks to be ahead.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._group = max(1, limit // _REQUESTS)
        self._lock = threading.Lock()
        self._ends: OrderedDict[int, int] = OrderedDict()

    def ahead(self, positions: range) -> int:
        """Note a request for chunks; return how many of the following ones to fetch, 0 for none.

        Who is followed as far as can be is so in steps, each of which is one request: a request
        for each chunk would take more time of both sides than what it brings.
        """
        first, last = positions[0], positions[-1]
        with self._lock:
            # Within one chunk a reader comes several times.
            length = self._ends.pop(first, None)
            if length is None or last > first:
                length = (self._ends.pop(first - 1, 0) if length is None else length) + 1
            self._ends[last] = length
            if len(self._ends) > REMEMBERED:
                self._ends.popitem(last=False)
        count = 0 if length < 2 else min(self._limit, 1 << min(length - 2, 16))
        if count == self._limit:
            count -= (last + 1 + count) % self._group
        return count
